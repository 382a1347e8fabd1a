// SPDX-License-Identifier: Apache-2.0

// Command demo shows edge-tunnel at work on one machine ("make demo"): a cloud node with a pod, an edge node behind NAT,
// the real daemons, and programs nobody here wrote. It says what it does, checks what comes back, fails if that is
// not what it should be, and removes everything it made, also when it is interrupted.
//
//	main.go      flags, signals, the way out
//	story.go     the steps, top to bottom
//	site.go      the machines and what is started on them
//	show.go      how commands and their output are printed
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"
)

func main() {
	bin := flag.String("bin", "bin", "folder of the built programs")
	limit := flag.Duration("limit", 5*time.Minute, "give up after this time")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	os.Exit(exitStatus(ctx, run(ctx, os.Stdout, *bin, *limit)))
}

func exitStatus(ctx context.Context, err error) int {
	switch {
	case ctx.Err() != nil:
		fmt.Fprintln(os.Stderr, "interrupted: everything was removed")
		return 130
	case err != nil:
		fmt.Fprintln(os.Stderr, "error:", err)
		return 1
	}
	fmt.Println("Everything was removed: namespaces, cgroups, mounts, BPF programs, processes.")
	return 0
}

// run tells the whole story. What it made is gone when it returns.
func run(ctx context.Context, out io.Writer, bin string, limit time.Duration) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("the demo makes network namespaces and loads BPF: run it as root")
	}
	if bin, err = filepath.Abs(bin); err != nil {
		return err
	}
	for _, program := range []string{"tunnel-server", "tunnel-agent", "tunnelctl"} {
		if _, err := os.Stat(filepath.Join(bin, program)); err != nil {
			return fmt.Errorf("%w\nhint: make build", err)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()

	stage := &stage{out: out}
	defer stage.clear(&err)
	return newStory(ctx, stage, bin).tell()
}

// stage is the lab's T outside of a test: it keeps what has to be undone, and what it is told is fatal ends the demo.
type stage struct {
	out      io.Writer
	cleanups []func()
	failed   bool
}

// fatal is the panic value by which Fatalf leaves; clear turns it into an error.
type fatal struct{ text string }

func (s *stage) Helper()                           {}
func (s *stage) Logf(format string, args ...any)   { fmt.Fprintf(s.out, format+"\n", args...) }
func (s *stage) Fatalf(format string, args ...any) { panic(fatal{fmt.Sprintf(format, args...)}) }
func (s *stage) Skipf(format string, args ...any)  { s.Fatalf(format, args...) }
func (s *stage) Failed() bool                      { return s.failed }
func (s *stage) Cleanup(f func())                  { s.cleanups = append(s.cleanups, f) }

// clear undoes everything, last thing first. It is deferred, and also runs when something panics.
func (s *stage) clear(err *error) {
	if p := recover(); p != nil {
		f, ok := p.(fatal)
		if !ok {
			defer panic(p) // after the clean-up
		}
		*err = errors.New(f.text)
	}
	s.failed = *err != nil && !errors.Is(*err, context.Canceled)
	for i := len(s.cleanups) - 1; i >= 0; i-- {
		s.cleanups[i]()
	}
}
