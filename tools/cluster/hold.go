// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/edge-tunnel/edge-tunnel/test/kubebed"
)

// hold has a cluster until ctx ends. What it made is gone when it returns.
func (s state) hold(ctx context.Context) (err error) {
	lock, err := os.OpenFile(s.file("lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("lock %s: %w", s.file("lock"), err)
	}
	if _, err := fmt.Fprintln(lock, os.Getpid()); err != nil {
		return err
	}
	stage := &stage{}
	defer stage.clear(&err)
	c := kubebed.New(stage)
	if err := errors.Join(c.StartDNS(), c.StartMetricsServer()); err != nil {
		return err
	}
	door, err := openDoor(ctx, c)
	if err != nil {
		return err
	}
	defer door.close()
	if err := c.WriteAdmin(s.file("kubeconfig"), "https://"+door.Addr().String()); err != nil {
		return err
	}
	if err := os.Symlink(c.Program("kubectl"), s.file("kubectl")); err != nil {
		return err
	}
	if err := s.ready(c); err != nil {
		return err
	}
	<-ctx.Done()
	return nil
}

// ready tells the waiting "cluster up" what to print.
func (s state) ready(c *kubebed.Cluster) error {
	var text strings.Builder
	fmt.Fprintf(&text, "export KUBECONFIG=%s\n", s.file("kubeconfig"))
	fmt.Fprintf(&text, "# kubectl of the cluster's version: %s\n", s.file("kubectl"))
	fmt.Fprintf(&text, "# pods may use the image %s (imagePullPolicy: Never)\n", kubebed.WorkloadImage)
	for _, n := range c.Nodes() {
		fmt.Fprintf(&text, "# %s %-10s  cgroup %s  enter: nsenter --target %d --net --mount\n", n.Name, n.V4, n.Cgroup(), n.PID())
	}
	part := s.file("ready.part")
	if err := os.WriteFile(part, []byte(text.String()), 0o600); err != nil {
		return err
	}
	return os.Rename(part, s.file("ready"))
}

// door lets the machine's own loopback into the cluster's network, at the API server.
type door struct {
	net.Listener
	cancel context.CancelFunc
	wait   sync.WaitGroup
}

func openDoor(ctx context.Context, c *kubebed.Cluster) (*door, error) {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	d := &door{Listener: l, cancel: cancel}
	d.wait.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			d.wait.Go(func() { carry(ctx, conn, c) })
		}
	})
	return d, nil
}

func (d *door) close() {
	d.cancel()
	d.Close()
	d.wait.Wait()
}

// carry relays a connection until either end closes it. TLS needs no half-close.
func carry(ctx context.Context, conn net.Conn, c *kubebed.Cluster) {
	defer conn.Close()
	api, err := c.Cloud[0].Dial(ctx, "tcp", c.Addr().String())
	if err != nil {
		return
	}
	defer api.Close()
	stop := context.AfterFunc(ctx, func() {
		conn.Close()
		api.Close()
	})
	defer stop()
	var back sync.WaitGroup
	back.Go(func() {
		_, _ = io.Copy(conn, api) // an end is not an error here
		conn.Close()
	})
	_, _ = io.Copy(api, conn)
	api.Close()
	back.Wait()
}

// stage is the cluster's T outside of a test.
type stage struct {
	cleanups []func()
	failed   bool
}

// fatal is the panic value by which Fatalf leaves; clear turns it into an error.
type fatal struct{ text string }

func (s *stage) Helper()                           {}
func (s *stage) Logf(format string, args ...any)   { fmt.Printf(format+"\n", args...) }
func (s *stage) Fatalf(format string, args ...any) { panic(fatal{fmt.Sprintf(format, args...)}) }
func (s *stage) Skipf(format string, args ...any)  { s.Fatalf(format, args...) }
func (s *stage) Failed() bool                      { return s.failed }
func (s *stage) Cleanup(f func())                  { s.cleanups = append(s.cleanups, f) }

// clear undoes everything, last thing first.
func (s *stage) clear(err *error) {
	if p := recover(); p != nil {
		f, ok := p.(fatal)
		if !ok {
			defer panic(p) // after the clean-up
		}
		*err = errors.New(f.text)
	}
	s.failed = *err != nil
	for i := len(s.cleanups) - 1; i >= 0; i-- {
		s.cleanups[i]()
	}
}
