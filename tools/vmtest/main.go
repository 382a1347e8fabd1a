// SPDX-License-Identifier: Apache-2.0

// Command vmtest proves that the programs run on kernels other than this machine's ("make test-kernels"). It gets Debian's kernels,
// boots each under QEMU's software emulation with nothing but busybox and static test programs as its memory disk, and
// fails if a test fails there, or if a machine does not come to its end.
//
//	main.go        flags, signals
//	payload.go     what is tested: builds the programs, issues the certificates, lists the jobs
//	kernel.go      gets a kernel from Debian, without touching the machine's apt
//	module.go      which of its modules must be loaded, and in which order
//	machine.go     the initramfs, QEMU, the judgement
//	cpio.go        the format of an initramfs
//	console.go     reads the serial line
//	report.go      what a person sees
//	guest/         what runs inside: init.sh and the daemons' scenario
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
	"runtime"
	"strings"
	"syscall"
	"time"
)

func main() {
	var o options
	flag.StringVar(&o.bin, "bin", "bin", "folder of the built programs; logs go to kernels/ below it")
	flag.StringVar(&o.cache, "cache", "", "folder that keeps the kernels")
	flag.StringVar(&o.kernels, "kernels", "5.10 6.1 6.12", "versions to boot: 5.10, 6.1, 6.12")
	flag.StringVar(&o.job, "job", "", "only this: redirect (the tests of pkg/redirect) or daemons (their scenario)")
	flag.StringVar(&o.run, "run", "", "of the tests of pkg/redirect only these, a pattern as for go test -run")
	flag.DurationVar(&o.limit, "limit", 20*time.Minute, "give up on one kernel after this time")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	os.Exit(exitStatus(ctx, run(ctx, os.Stdout, o)))
}

type options struct {
	bin, cache, kernels string
	job, run            string
	limit               time.Duration
}

func exitStatus(ctx context.Context, err error) int {
	switch {
	case err != nil && ctx.Err() != nil:
		fmt.Fprintln(os.Stderr, "interrupted")
		return 130
	case err != nil:
		fmt.Fprintln(os.Stderr, "error:", err)
		return 1
	}
	return 0
}

func run(ctx context.Context, out io.Writer, o options) error {
	if runtime.GOARCH != "amd64" {
		return errors.New("the kernels are amd64's: run it on an amd64 machine")
	}
	versions := strings.FieldsFunc(o.kernels, func(r rune) bool { return r == ' ' || r == ',' })
	if len(versions) == 0 || o.cache == "" {
		return errors.New("-kernels and -cache must not be empty")
	}
	work, err := os.MkdirTemp("", "vmtest-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	logs := filepath.Join(o.bin, "kernels")
	if err := os.MkdirAll(logs, 0o755); err != nil {
		return err
	}
	p, err := newPayload(ctx, work, o)
	if err != nil {
		return err
	}

	// Every kernel is tried, also after one failed.
	var errs []error
	for _, version := range versions {
		k, err := fetchKernel(ctx, out, o.cache, version)
		if err == nil {
			err = p.run(ctx, out, k, logs, o.limit)
		}
		errs = append(errs, err)
		if ctx.Err() != nil {
			break
		}
	}
	return errors.Join(errs...)
}
