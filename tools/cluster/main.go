// SPDX-License-Identifier: Apache-2.0

// Command cluster runs the Kubernetes of the tests for people; "make" calls it.
//
//	cluster build      build the programs if the cache lacks them, and print where they are
//	cluster up         start a cluster that goes on when the command has ended, and print how to use it
//	cluster down       remove it, with every trace
//
// The cluster lives in a process of its own ("cluster hold"): its namespaces and programs end with that process, however it ends.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/edge-tunnel/edge-tunnel/test/kubebed"
	"github.com/edge-tunnel/edge-tunnel/test/netlab"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	cache, err := kubebed.CacheDir()
	if err != nil {
		return err
	}
	s := state{filepath.Join(cache, "cluster")}
	switch strings.Join(args, " ") {
	case "build":
		path, err := kubebed.Build(ctx, os.Stderr)
		if err == nil {
			fmt.Println(path)
		}
		return err
	case "up":
		return s.up(ctx)
	case "down":
		return s.down()
	case "hold":
		return s.hold(ctx)
	}
	return errors.New("usage: cluster build|up|down")
}

// state is the folder of the running cluster. Whoever holds the lock on its file "lock" is the process that has the cluster; its id is
// in the file.
type state struct{ dir string }

func (s state) file(name string) string { return filepath.Join(s.dir, name) }

// holder is the process that has the cluster, or 0.
func (s state) holder() (int, error) {
	lock, err := os.OpenFile(s.file("lock"), os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	defer lock.Close()
	if unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
		return 0, nil
	}
	content, err := os.ReadFile(s.file("lock"))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(content)))
}

// up starts the process that has the cluster, and waits until it says that all is ready.
func (s state) up(ctx context.Context) error {
	if os.Geteuid() != 0 {
		return errors.New("a cluster is made of namespaces, mounts and cgroups: run it as root")
	}
	pid, err := s.holder()
	if err != nil {
		return err
	}
	if pid != 0 {
		return fmt.Errorf("a cluster is running already (process %d)\nhint: make cluster-down", pid)
	}
	if _, err := kubebed.Build(ctx, os.Stdout); err != nil {
		return err
	}
	if _, err := kubebed.Runtime(ctx, os.Stdout); err != nil {
		return err
	}
	if err := errors.Join(os.RemoveAll(s.dir), os.MkdirAll(s.dir, 0o700)); err != nil {
		return err
	}
	log, err := os.Create(s.file("log"))
	if err != nil {
		return err
	}
	defer log.Close()
	self, err := os.Executable()
	if err != nil {
		return err
	}
	hold := exec.Command(self, "hold")
	hold.Stdout, hold.Stderr = log, log
	hold.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := hold.Start(); err != nil {
		return err
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = hold.Wait() // what went wrong is in the log
	}()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		if text, err := os.ReadFile(s.file("ready")); err == nil {
			fmt.Print(string(text))
			return nil
		}
		select {
		case <-ctx.Done():
			_ = hold.Process.Signal(syscall.SIGTERM) // it may have ended
			<-ended
			return ctx.Err()
		case <-ended:
			text, _ := os.ReadFile(s.file("log"))
			return fmt.Errorf("the cluster did not start:\n%s", text)
		case <-tick.C:
		}
	}
}

// down ends the process, waits until it has removed everything, and sweeps up if it was killed earlier.
func (s state) down() error {
	pid, err := s.holder()
	if err != nil {
		return err
	}
	if pid != 0 {
		if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
			return err
		}
	}
	for deadline := time.Now().Add(time.Minute); pid != 0; time.Sleep(50 * time.Millisecond) {
		if pid, err = s.holder(); err != nil {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("process %d does not end: see %s", pid, s.file("log"))
		}
	}
	return errors.Join(netlab.Sweep(), os.RemoveAll(s.dir))
}
