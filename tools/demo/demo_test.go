// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

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

// build makes the programs that the demo shows.
func build(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	cmd := exec.CommandContext(t.Context(), "go", "build", "-o", dir, "../../cmd/tunnel-server", "../../cmd/tunnel-agent", "../../cmd/tunnelctl")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return dir
}

func TestDemo(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	bin := build(t)
	// Labs of this test only, whatever runs beside it.
	tmp := t.TempDir()
	t.Setenv("TMPDIR", tmp)
	before := leftovers(t, tmp)
	for _, c := range []struct{ name, until string }{
		{"to its end", ""},
		{"interrupted when the server has started", "tunnel-agent --server"},
		{"interrupted beside a dead agent", "kill -KILL"},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			out := &watcher{text: c.until, interrupt: cancel}
			if c.until == "" {
				out.interrupt = func() {}
			}
			err := run(ctx, out, bin, 3*time.Minute)
			if want := ctx.Err(); !errors.Is(err, want) {
				t.Errorf("ended with %v, want %v; it wrote:\n%s", err, want, out)
			}
			after := leftovers(t, tmp)
			// A thread ends a moment after its last goroutine.
			for deadline := time.Now().Add(5 * time.Second); after != before && time.Now().Before(deadline); after = leftovers(t, tmp) {
				time.Sleep(10 * time.Millisecond)
			}
			if after != before {
				t.Errorf("before: %s, after: %s", before, after)
			}
		})
	}
}

// leftovers is what a demo could have forgotten: labs on disk, and threads in the namespaces of nodes.
func leftovers(t *testing.T, tmp string) string {
	t.Helper()
	labs, err := filepath.Glob(filepath.Join(tmp, "etlab-*"))
	if err != nil {
		t.Fatal(err)
	}
	tasks, err := filepath.Glob("/proc/self/task/*/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	namespaces := map[string]bool{}
	for _, task := range tasks {
		if to, err := os.Readlink(task); err == nil {
			namespaces[to] = true
		}
	}
	return fmt.Sprintf("labs %q, %d namespaces", labs, len(namespaces))
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
