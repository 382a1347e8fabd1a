// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"runtime/debug"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	testscript.Main(leakChecked{m}, map[string]func(){
		"waiter": func() { Main(waiter) },
	})
}

// leakChecked runs the tests and fails when a goroutine outlives them.
type leakChecked struct{ m *testing.M }

func (l leakChecked) Run() int {
	status := l.m.Run()
	if err := goleak.Find(); err != nil && status == 0 {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return status
}

// waiter is a daemon: it says what it hears, and with --stubborn it does not end when it should.
func waiter(ctx context.Context, env Env) error {
	fmt.Fprintln(env.Stdout, "ready")
	for {
		select {
		case <-env.Reload:
			fmt.Fprintln(env.Stdout, "reloaded")
		case <-ctx.Done():
			if len(env.Args) == 0 {
				return ctx.Err()
			}
			fmt.Fprintln(env.Stdout, "stopping")
			if env.Args[0] == "--stubborn" {
				select {}
			}
			return nil
		}
	}
}

func run(t *testing.T, f func(context.Context, Env) error, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	status = Run(t.Context(), Env{Name: "prog", Args: args, Stdin: strings.NewReader(""), Stdout: &out, Stderr: &errs}, f)
	return status, out.String(), errs.String()
}

func TestReport(t *testing.T) {
	plain := errors.New("disk is full")
	for _, c := range []struct {
		name   string
		err    error
		status int
		want   string
	}{
		{"nothing", nil, 0, ""},
		{"done", fmt.Errorf("wrapped: %w", ErrDone), 0, ""},
		{"plain", plain, 1, "error: disk is full\n"},
		{"hint below", fmt.Errorf("write: %w", WithHint(plain, "free some space")), 1, "error: write: disk is full\nhint: free some space\n"},
		{"outermost hint", WithHint(fmt.Errorf("write: %w", WithHint(plain, "inner")), "outer"), 1, "error: write: disk is full\nhint: outer\n"},
		{"empty hint is none", WithHint(WithHint(plain, "inner"), ""), 1, "error: disk is full\nhint: inner\n"},
		{"usage", Usagef("no such node %q", "x"), 2, "error: no such node \"x\"\nhint: prog --help shows what is possible\n"},
		{"wrapped usage", fmt.Errorf("start: %w", WithHint(Usagef("bad"), "do better")), 2, "error: start: bad\nhint: do better\n"},
		{
			"joined, one usage", errors.Join(WithHint(errors.New("a"), "h"), errors.Join(errors.New("b"), WithHint(Usagef("c"), "i"))), 2,
			"error: a\nhint: h\nerror: b\nerror: c\nhint: i\n",
		},
		{"shared hint once", errors.Join(WithHint(errors.New("a"), "h"), WithHint(errors.New("b"), "h")), 1, "error: a\nerror: b\nhint: h\n"},
		{
			"usage around a join", Usagef("%w", errors.Join(errors.New("a"), errors.New("b"))), 2,
			"error: a; b\nhint: prog --help shows what is possible\n",
		},
		{
			"a hint where there is none", OrHint(errors.Join(Usagef("a"), WithHint(errors.New("b"), "own"), errors.New("c")), "h"), 2,
			"error: a\nhint: h\nerror: b\nhint: own\nerror: c\nhint: h\n",
		},
		{"words before a join", fmt.Errorf("start: %w", errors.Join(WithHint(errors.New("a"), "h"), WithHint(errors.New("b"), "i"))), 1,
			"error: start: a; b\nhint: h\nhint: i\n"},
		{"two causes are no join", fmt.Errorf("%w while %w", WithHint(errors.New("a"), "h"), errors.New("b")), 1, "error: a while b\nhint: h\n"},
		{"control characters", errors.New("bad name \x1b]0;x\x07 \u202e"), 1, "error: bad name \ufffd]0;x\ufffd \ufffd\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			status, out, errs := run(t, func(context.Context, Env) error { return c.err })
			if status != c.status || errs != c.want || out != "" {
				t.Errorf("status %d, stderr:\n%s\nwant status %d:\n%s\nstdout: %q", status, errs, c.status, c.want, out)
			}
		})
	}
}

func TestHintKeepsTheChain(t *testing.T) {
	if WithHint(nil, "h") != nil || OrHint(nil, "h") != nil {
		t.Error("a hint made an error of nil")
	}
	err := WithHint(Usagef("open: %w", fs.ErrNotExist), "h")
	if !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v lost its cause", err)
	}
}

func TestVersion(t *testing.T) {
	setting := func(kv ...string) (s []debug.BuildSetting) {
		for i := 0; i < len(kv); i += 2 {
			s = append(s, debug.BuildSetting{Key: kv[i], Value: kv[i+1]})
		}
		return s
	}
	for _, c := range []struct {
		info debug.BuildInfo
		want string
	}{
		{debug.BuildInfo{Main: debug.Module{Version: "v1.2.3"}}, "v1.2.3"},
		{debug.BuildInfo{Main: debug.Module{Version: "(devel)"}}, "unknown"},
		{debug.BuildInfo{Settings: setting("vcs.revision", "0123456789abcdef0123", "vcs.modified", "true")}, "0123456789ab-dirty"},
		{debug.BuildInfo{Settings: setting("vcs.revision", "01234", "vcs.modified", "false")}, "01234"},
	} {
		if got := versionOf(&c.info); got != c.want {
			t.Errorf("versionOf(%v) = %q, want %q", c.info, got, c.want)
		}
	}
	if Version() == "" {
		t.Error("no version at all")
	}
}

func TestLogger(t *testing.T) {
	var b bytes.Buffer
	Log{Level: slog.LevelWarn, JSON: true}.Logger(&b).Info("quiet")
	if b.Len() != 0 {
		t.Errorf("logged below the level: %s", &b)
	}
	Log{JSON: true}.Logger(&b).Info("hello", "n", 1)
	if !strings.Contains(b.String(), `"msg":"hello","n":1}`) {
		t.Errorf("not JSON: %s", &b)
	}
	b.Reset()
	Log{}.Logger(&b).Info("hello", "n", 1)
	if !strings.Contains(b.String(), `level=INFO msg=hello n=1`) {
		t.Errorf("not text: %s", &b)
	}
}

func TestNearest(t *testing.T) {
	flags := []string{"ca-cert", "cert", "key", "listen-tunnel", "log-level", "log-format", "tunneled-ports"}
	for word, want := range map[string]string{
		"tunneld-ports": "tunneled-ports", "tuneled-prots": "tunneled-ports", "listen": "listen-tunnel", "cret": "cert", "kye": "key",
		"CERT": "cert", "zzz": "", "": "", "quite-something-else": "", "c": "", strings.Repeat("x", 1<<16): "",
	} {
		if got := Nearest(word, flags); got != want {
			t.Errorf("Nearest(%.20q) = %q, want %q", word, got, want)
		}
	}
}
