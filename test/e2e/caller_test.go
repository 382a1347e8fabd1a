// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// caller is a process of a node that makes a socket when it is told to, and connects it when it is told to.
type caller struct {
	t     *testing.T
	pid   int
	say   io.Writer
	heard *bufio.Scanner
}

// newCaller starts one.
func (h *host) newCaller() *caller {
	h.t.Helper()
	cmd := h.helper(context.Background(), "caller")
	say, err := cmd.StdinPipe()
	if err != nil {
		h.t.Fatal(err)
	}
	heard, err := cmd.StdoutPipe()
	if err != nil {
		h.t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		h.t.Fatalf("start a caller on %s: %v", h.Name, err)
	}
	h.t.Cleanup(func() {
		say.Close() // which ends it
		_ = cmd.Wait()
	})
	return &caller{h.t, cmd.Process.Pid, say, bufio.NewScanner(heard)}
}

// do has it do one thing, and fails the test if that fails.
func (c *caller) do(words ...any) {
	c.t.Helper()
	order := fmt.Sprintln(words...)
	if _, err := io.WriteString(c.say, order); err != nil {
		c.t.Fatal(err)
	}
	if !c.heard.Scan() || c.heard.Text() != "done" {
		c.t.Fatalf("%s: %q, %v", strings.TrimSpace(order), c.heard.Text(), c.heard.Err())
	}
}

// callerMain knows "socket 4", "socket 6", and "call ADDR", which connects the socket to an echo and uses it.
func callerMain([]string) int {
	socket := -1
	orders := bufio.NewScanner(os.Stdin)
	for orders.Scan() {
		verb, argument, _ := strings.Cut(orders.Text(), " ")
		var err error
		switch verb {
		case "socket":
			family := unix.AF_INET
			if argument == "6" {
				family = unix.AF_INET6
			}
			socket, err = unix.Socket(family, unix.SOCK_STREAM, 0)
		case "call":
			err = call(socket, netip.MustParseAddrPort(argument))
		default:
			err = fmt.Errorf("unknown order %q", verb)
		}
		if err != nil {
			fmt.Println(err)
			continue
		}
		fmt.Println("done")
	}
	return 0
}

// call connects, as a C program would, sends something to an echo, and closes the socket.
func call(socket int, addr netip.AddrPort) error {
	defer unix.Close(socket)
	var to unix.Sockaddr
	if addr.Addr().Is4() {
		to = &unix.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().As4()}
	} else {
		to = &unix.SockaddrInet6{Port: int(addr.Port()), Addr: addr.Addr().As16()}
	}
	if err := unix.Connect(socket, to); err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	const message = "hello"
	if _, err := unix.Write(socket, []byte(message)); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	got := make([]byte, len(message))
	if n, err := unix.Read(socket, got); err != nil || string(got[:n]) != message {
		return fmt.Errorf("read %q: %w", got[:n], err)
	}
	return nil
}

// A process that is older than the server, with a socket that is, too: intercepted all the same when it connects.
func TestOlderThanTheServer(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	cloud := w.cloud("cloud-1")
	pod := cloud.pod("pod-1")
	edge := w.site("home").edge("edge-1")
	to := map[int]netip.AddrPort{4: edge.serve(10250, echo), 6: edge.serveAt(edge.at6(10250), echo)}
	callers := make(map[*caller]int)
	for _, h := range []*host{cloud, pod} {
		for family := range to {
			c := h.newCaller()
			c.do("socket", family)
			callers[c] = family
		}
	}
	server := cloud.startServer()
	agent := edge.startAgent([]*host{cloud})
	server.waitTarget(edge.V4, "online")
	server.waitTarget(edge.V6, "online")
	for c, family := range callers {
		c.do("call", to[family])
	}
	server.waitEnded("closed", 4)
	for _, r := range server.records() {
		found := false
		for c, family := range callers {
			found = found || r.PID == uint32(c.pid) && r.Dst == to[family]
		}
		if !found {
			t.Errorf("record %+v is of none of the callers", r)
		}
	}
	server.waitIdle()
	agent.waitIdle()
}

// Processes in cgroups below the node's, as those of services and of containers are; the record has the cgroup.
func TestChildCgroup(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	pod := s.cloud.pod("pod-1")
	to := map[int]netip.AddrPort{4: s.edge.serve(servicePort, echo), 6: s.edge.serveAt(s.edge.at6(servicePort), echo)}
	for _, h := range []*host{s.cloud, pod} {
		dir := filepath.Join(h.Cgroup(), "system.slice", "child.service")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(dir)
		if err != nil {
			t.Fatal(err)
		}
		id := info.Sys().(*syscall.Stat_t).Ino
		c := h.newCaller()
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(fmt.Sprint(c.pid)), 0); err != nil {
			t.Fatal(err)
		}
		for family, addr := range to {
			c.do("socket", family)
			c.do("call", addr)
		}
		var records []record
		eventually(t, patience, func() error {
			records = nil
			for _, r := range s.server.records() {
				if r.PID == uint32(c.pid) {
					records = append(records, r)
				}
			}
			if len(records) < len(to) {
				return fmt.Errorf("%d records of the caller on %s", len(records), h.Name)
			}
			return nil
		})
		for _, r := range records {
			if r.Cgroup != id || r.Reason != "closed" {
				t.Errorf("record %+v, want the cgroup %d", r, id)
			}
		}
	}
}
