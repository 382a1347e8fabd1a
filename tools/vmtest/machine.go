// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

//go:embed guest/init.sh
var initScript []byte

// job is one program that a test machine runs.
type job struct {
	name string // one word
	args []string
}

// payload is what is the same for every kernel: programs, certificates, jobs.
type payload struct {
	busybox string            // static
	files   map[string]string // where in the machine: file here; only its owner, root, may read or run it
	jobs    []job
	limit   time.Duration // of one job
}

// usedModules are what the tests make in their network namespaces, as far as it is not built into the kernel.
func usedModules() []string { return []string{"veth", "bridge", "dummy", "tun"} }

// writeInitramfs makes the whole disk of a test machine.
func (p payload) writeInitramfs(ctx context.Context, w io.Writer, k kernel) error {
	a := newArchive(w)
	for _, dir := range []string{"/bin", "/dev", "/etc", "/proc", "/run", "/sys", "/tmp", "/jobs", "/modules"} {
		a.folder(dir)
	}
	a.device("/dev/console", 5, 1) // before devtmpfs is mounted, init writes here
	a.file("/init", 0o755, initScript)
	a.file("/etc/hosts", 0o644, []byte("127.0.0.1 localhost\n::1 localhost\n"))
	a.file("/etc/passwd", 0o644, []byte("root:x:0:0:root:/tmp:/bin/sh\nnobody:x:65534:65534:nobody:/tmp:/bin/sh\n"))
	a.file("/job.env", 0o644, fmt.Appendf(nil, "JOB_LIMIT=%d\n", int(p.limit.Seconds())))

	files := map[string]string{"/bin/busybox": p.busybox}
	for name, file := range p.files {
		files[name] = file
	}
	for name, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		a.file(name, 0o700, content)
	}
	for i, j := range p.jobs {
		a.file(fmt.Sprintf("/jobs/%02d-%s", i, j.name), 0o755, []byte("#!/bin/sh\nexec "+quote(j.args)+" 2>&1\n"))
	}

	loaded, err := modules(ctx, k.modules, p.busybox, usedModules()...)
	if err != nil {
		return err
	}
	var order strings.Builder
	for _, m := range loaded {
		a.file("/modules/"+m.name, 0o644, m.content)
		order.WriteString(m.name + "\n")
	}
	a.file("/modules/order", 0o644, []byte(order.String()))
	return a.close()
}

func quote(args []string) string {
	quoted := make([]string, len(args))
	for i, arg := range args {
		quoted[i] = "'" + strings.ReplaceAll(arg, "'", `'\''`) + "'"
	}
	return strings.Join(quoted, " ")
}

// boot runs the kernel with the initramfs until the machine powers off, and copies its serial line to out. It is software
// emulation on purpose: it works in virtual machines and on build machines alike. There is no network device and no disk.
func boot(ctx context.Context, k kernel, initramfs string, out io.Writer) error {
	cmd := exec.CommandContext(ctx, emulator,
		"-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "1536",
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
		"-kernel", k.image, "-initrd", initramfs,
		// Only errors of the kernel's own; a panic ends the machine at once.
		"-append", "console=ttyS0 loglevel=4 panic=-1 softlockup_panic=1 no5lvl")
	cmd.Stdout = out
	var complaint strings.Builder
	cmd.Stderr = &complaint
	// The machine must not outlive this program, even if that is killed. The signal comes when the starting thread ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return errors.New("the machine did not end in time")
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, exec.ErrNotFound):
		return fmt.Errorf("%s is missing\nhint: make deps", emulator)
	case err != nil:
		return fmt.Errorf("%s: %w\n%s", emulator, err, strings.TrimSpace(complaint.String()))
	}
	return nil
}

const emulator = "qemu-system-x86_64"

// run boots one kernel, lets it do all jobs and judges them. The serial log is left in logs/VERSION.log.
func (p payload) run(ctx context.Context, out io.Writer, k kernel, logs string, limit time.Duration) (err error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	initramfs, err := os.Create(filepath.Join(logs, k.version+".cpio"))
	if err != nil {
		return err
	}
	defer os.Remove(initramfs.Name())
	if err := errors.Join(p.writeInitramfs(ctx, initramfs, k), initramfs.Close()); err != nil {
		return err
	}
	logName := filepath.Join(logs, k.version+".log")
	log, err := os.Create(logName)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, log.Close()) }()

	fmt.Fprintf(out, "%s\n", k.version)
	c := &console{onEnd: func(j jobResult) { printJob(out, j) }}
	start := time.Now()
	booted := boot(ctx, k, initramfs.Name(), io.MultiWriter(log, c))
	if ctx.Err() != nil && !errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return ctx.Err()
	}
	if err := errors.Join(booted, p.judge(c)); err != nil {
		fmt.Fprint(out, c.evidence())
		return fmt.Errorf("kernel %s: %w\nhint: the whole serial log is %s", k.version, err, logName)
	}
	fmt.Fprintf(out, "  Linux %s, %d s\n", c.release, int(time.Since(start).Seconds()))
	return nil
}

// judge says why the run of a machine was not a success.
func (p payload) judge(c *console) error {
	if c.release == "" {
		return errors.New("it did not boot")
	}
	var errs []error
	for i, j := range p.jobs {
		switch {
		case i >= len(c.jobs):
			errs = append(errs, fmt.Errorf("%s did not run", j.name))
		case c.jobs[i].name != j.name || !c.jobs[i].ended:
			errs = append(errs, fmt.Errorf("%s did not end", j.name))
		case !c.jobs[i].ok():
			errs = append(errs, fmt.Errorf("%s: %s", j.name, c.jobs[i].verdict()))
		}
	}
	if broken := c.brokenKernel(); broken != "" {
		errs = append(errs, errors.New(broken))
	}
	if !c.done {
		errs = append(errs, errors.New("it ended before its jobs"))
	}
	return errors.Join(errs...)
}
