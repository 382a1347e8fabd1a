// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
)

// Exit statuses.
const (
	StatusOK     = 0
	StatusFailed = 1
	StatusUsage  = 2
)

// Env is everything that a program gets from the outside.
type Env struct {
	Name           string   // of the program, without its folder
	Args           []string // without the program's name
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Getenv         func(string) string

	// Reload has an element when somebody wants files read again (SIGHUP); requests that come faster than they are
	// served become one. Nil never asks.
	Reload <-chan struct{}
}

// Main runs a program with the process's arguments, files and signals, and exits with its status.
//
// SIGINT and SIGTERM cancel the context, with a cause that names the signal; a second one ends the process at once, for a
// user whose patience is over. SIGHUP goes to Env.Reload.
func Main(run func(context.Context, Env) error) {
	ctx, cancel := context.WithCancelCause(context.Background())
	reload := make(chan struct{}, 1)
	env := Env{
		Name: filepath.Base(os.Args[0]), Args: os.Args[1:],
		Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr,
		Getenv: os.Getenv,
		Reload: reload,
	}

	// Registered before run starts: a signal that comes early must not kill a daemon in the middle of its start.
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	go func() {
		for sig := range signals {
			switch {
			case sig == syscall.SIGHUP:
				select {
				case reload <- struct{}{}:
				default:
				}
			case ctx.Err() == nil:
				cancel(stopped{sig})
			default:
				fmt.Fprintf(env.Stderr, "error: ended at once by a second signal (%v)\n", sig)
				os.Exit(StatusFailed)
			}
		}
	}()
	os.Exit(Run(ctx, env, run))
}

// Run runs a program in env, tells the user about its error and returns the exit status.
func Run(ctx context.Context, env Env, run func(context.Context, Env) error) int {
	err := run(ctx, env)
	if err == nil || errors.Is(err, ErrDone) {
		return StatusOK
	}
	// "context canceled" says nothing to somebody who has just pressed Ctrl-C.
	if cause := context.Cause(ctx); cause != nil && errors.Is(err, context.Canceled) {
		err = cause
	}
	report(env, err)
	if usage := (*UsageError)(nil); errors.As(err, &usage) {
		return StatusUsage
	}
	return StatusFailed
}

// stopped is the cause of a context that a signal canceled.
type stopped struct{ signal os.Signal }

func (s stopped) Error() string { return fmt.Sprintf("stopped by a signal (%v)", s.signal) }
