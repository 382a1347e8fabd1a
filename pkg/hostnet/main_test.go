// SPDX-License-Identifier: Apache-2.0

package hostnet

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netns"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// enter moves the test to a new network namespace, which ends with it. Nothing is in there but a loopback, down.
func enter(t *testing.T) netns.NsHandle {
	t.Helper()
	runtime.LockOSThread() // never unlocked: the thread ends with the test
	ns, err := netns.New()
	if err != nil {
		t.Fatalf("make a network namespace (needs root): %v", err)
	}
	t.Cleanup(func() { ns.Close() })
	return ns
}

// ip runs ip commands, one a line, in the thread's namespace.
func ip(t *testing.T, commands string) {
	t.Helper()
	cmd := exec.Command("ip", "-batch", "-")
	cmd.Stdin = strings.NewReader(commands)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("ip: %v\n%s\n%s", err, commands, out)
	}
}

func sysctl(t *testing.T, path, value string) {
	t.Helper()
	if err := os.WriteFile("/proc/sys/net/"+path, []byte(value), 0); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T) State {
	t.Helper()
	s, err := Read(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func has(list []netip.Addr, addr string) bool {
	return slices.Contains(list, netip.MustParseAddr(addr))
}

// watched is a running Watcher and what it told.
type watched struct {
	*Watcher
	changes chan Change
}

// watch runs a Watcher in ns, until the test ends.
func watch(t *testing.T, ns netns.NsHandle, w *Watcher) *watched {
	t.Helper()
	out := &watched{w, make(chan Change, 1000)}
	w.Changed = func(c Change) { out.changes <- c }
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if err := netns.Set(ns); err != nil {
			done <- err
			return
		}
		done <- w.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
	})
	return out
}

// until waits for a change that is as wanted, and reports whether one on the way there was a gain.
func (w *watched) until(t *testing.T, what string, ok func(Change) bool) (gained bool) {
	t.Helper()
	timeout := time.After(20 * time.Second)
	var seen []string
	for {
		select {
		case c := <-w.changes:
			gained = gained || c.Gained
			if ok(c) {
				return gained
			}
			seen = append(seen, fmt.Sprintf("%+v", c))
		case <-timeout:
			t.Fatalf("never told: %s; told:\n%s", what, strings.Join(seen, "\n"))
		}
	}
}

// quiet checks that nothing is told for a while.
func (w *watched) quiet(t *testing.T) {
	t.Helper()
	select {
	case c := <-w.changes:
		t.Errorf("told without need: %+v", c)
	case <-time.After(4 * settle):
	}
}
