// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// watcher calls interrupt as soon as text was written.
type watcher struct {
	bytes.Buffer
	text      string
	interrupt func()
}

func (w *watcher) Write(p []byte) (int, error) {
	n, err := w.Buffer.Write(p)
	if strings.Contains(w.String(), w.text) {
		w.interrupt()
	}
	return n, err
}

// play tells some chapters and returns the lab's folder too.
func play(ctx context.Context, stage *stage, chapters func(*story) error) (dir string, err error) {
	defer stage.clear(&err)
	s := newStory(ctx, stage, ".")
	dir = s.lab.Dir()
	return dir, chapters(s)
}

func TestInterruptedDemoLeavesNothing(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	ctx, cancel := context.WithCancel(t.Context())
	out := &watcher{text: "sshd", interrupt: cancel}
	dir, err := play(ctx, &stage{out: out}, func(s *story) error { return errors.Join(s.topology(), s.unreachable()) })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("ended with %v, want canceled; it wrote:\n%s", err, out)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is left: %v", dir, err)
	}
}

func TestFatalBecomesAnErrorAfterCleanup(t *testing.T) {
	s := &stage{out: new(bytes.Buffer)}
	var order []string
	s.Cleanup(func() { order = append(order, "first made") })
	s.Cleanup(func() { order = append(order, "last made") })
	err := func() (err error) {
		defer s.clear(&err)
		s.Fatalf("no %s", "luck")
		return nil
	}()
	if err == nil || err.Error() != "no luck" {
		t.Errorf("error %v, want no luck", err)
	}
	if got := strings.Join(order, ", "); got != "last made, first made" {
		t.Errorf("undone: %s", got)
	}
}

func TestShellLine(t *testing.T) {
	for want, args := range map[string][]string{
		"curl -sS http://10.0.0.1/":     {"curl", "-sS", "http://10.0.0.1/"},
		"echo 'a b' '$x' 'it'\\''s'":    {"echo", "a b", "$x", "it's"},
		"curl 'http://[fd99::2]:9100/'": {"curl", "http://[fd99::2]:9100/"},
	} {
		if got := shellLine(args); got != want {
			t.Errorf("shellLine(%q) = %s, want %s", args, got, want)
		}
	}
}
