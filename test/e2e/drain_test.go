// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"
)

// SIGTERM: the agent is told; connects are intercepted until the tunnels have moved, or for 2 s as there is nowhere to move to; then they are
// refused; what is open may finish; the end is a good one.
func TestServerDrains(t *testing.T) {
	t.Parallel()
	s := newSite(t, "--drain-timeout", "60s")
	addr := s.edge.serve(servicePort, echo)
	open := s.cloud.mustDial(addr)
	if err := exchange(open, "one"); err != nil {
		t.Fatal(err)
	}
	if err := s.server.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	s.agent.waitLog("server is about to stop")
	s.cloud.mustEcho(addr) // the agent knows, and the two seconds have just begun

	eventually(t, patience, func() error {
		conn, err := s.cloud.dial(addr)
		if err == nil {
			conn.Close()
			return fmt.Errorf("a connect is still taken")
		}
		wantErrno(t, err, syscall.ECONNREFUSED)
		return nil
	})
	if err := exchange(open, "two"); err != nil {
		t.Errorf("the open connection: %v", err)
	}
	select {
	case <-s.server.Exited():
		t.Fatal("the server did not wait for the open connection")
	default:
	}
	if err := open.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if rest, err := io.ReadAll(open); len(rest) != 0 || err != nil {
		t.Errorf("the end of the open connection: %q, %v", rest, err)
	}
	wantStopped(t, s.server, 0)
	for _, r := range s.server.records() {
		if r.Reason != "closed" {
			t.Errorf("record %+v", r)
		}
	}
}

// A connection that does not end is reset after --drain-timeout, and the exit status is 0 all the same.
func TestServerDrainTimesOut(t *testing.T) {
	t.Parallel()
	s := newSite(t, "--drain-timeout", "1s")
	conn := s.cloud.mustDial(s.edge.serve(servicePort, echo))
	if err := exchange(conn, "one"); err != nil {
		t.Fatal(err)
	}
	if err := s.server.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	wantStopped(t, s.server, 1)
	waitReset(t, conn, patience)
	if r := s.server.record(conn.LocalAddr()); r.Reason != "canceled" || r.Sent != 3 || r.Received != 3 {
		t.Errorf("record %+v", r)
	}
	s.agent.waitIdle()
}

// wantStopped waits for a daemon that was told to stop. Its exit status has to be 0, and its last words how many connections it reset.
func wantStopped(t *testing.T, d *daemon, reset int) {
	t.Helper()
	d.waitExit()
	for _, line := range d.lines() {
		if line["msg"] == "stopped" {
			if got := fmt.Sprint(line["reset"]); got != fmt.Sprint(reset) {
				t.Errorf("%s connections were reset, want %d", got, reset)
			}
			return
		}
	}
	t.Errorf("%s on %s did not say that it stopped", d.name, d.host.Name)
}

// A successor that is started while the server still serves waits for the lock and says so. It takes over while its predecessor's last
// connections go on.
func TestSuccessorWaits(t *testing.T) {
	t.Parallel()
	s := newSite(t, "--drain-timeout", "60s")
	addr := s.edge.serve(servicePort, echo)
	open := s.cloud.mustDial(addr)
	if err := exchange(open, "one"); err != nil {
		t.Fatal(err)
	}
	links := s.cloud.linkIDs()

	successor := s.cloud.launchServer("--tunneled-ports", fmt.Sprint(servicePort))
	successor.waitLog("Waiting for another tunnel-server")
	s.cloud.mustEcho(addr) // nothing has changed
	if strings.Contains(successor.Log(), `"started"`) {
		t.Fatal("two servers at once")
	}

	if err := s.server.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	successor.waitLog(`"started"`) // until then it is the predecessor that answers where daemons are asked
	successor.waitReady()
	successor.waitTarget(s.edge.V4, "online")
	s.cloud.mustEcho(addr)
	if err := exchange(open, "two"); err != nil {
		t.Errorf("the predecessor's connection: %v", err)
	}
	select {
	case <-s.server.Exited():
		t.Error("the predecessor did not wait for its connection")
	default:
	}
	open.Close()
	wantStopped(t, s.server, 0)
	wantLinks(t, s.cloud, links)
	s.cloud.mustEcho(addr)
	successor.waitIdle()
}

// With two servers, the stop of one is nothing to the other: its tunnel, and what goes through it, stays; the agent moves at once, so the
// first one need not wait for two seconds.
func TestOtherServerUntouched(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one, two := w.cloud("cloud-1"), w.cloud("cloud-2")
	edge := w.site("home").edge("edge-1")
	addr := edge.serve(10250, echo)
	first, second := one.startServer("--drain-timeout", "1s"), two.startServer()
	agent := edge.startAgent([]*host{one, two})
	first.waitTarget(edge.V4, "online")
	second.waitTarget(edge.V4, "online")
	one.mustEcho(addr)
	conn := two.mustDial(addr)
	if err := exchange(conn, "one"); err != nil {
		t.Fatal(err)
	}
	before, err := second.client().Tunnels(t.Context())
	if err != nil || len(before.Tunnels) != 1 {
		t.Fatalf("tunnels %+v, %v", before, err)
	}

	first.stop()
	if strings.Contains(first.Log(), "have not moved") {
		t.Error("the agent has another server and did not move")
	}
	if err := exchange(conn, "two"); err != nil {
		t.Errorf("the other server's connection: %v", err)
	}
	two.mustEcho(addr)
	// No listener, and no tunnel either: which of them a connect meets first depends on how far the server came with its targets.
	if _, err := one.dial(addr); !errors.Is(err, syscall.EHOSTUNREACH) && !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a connect on the stopped server's node: %v", err)
	}
	after, err := second.client().Tunnels(t.Context())
	if err != nil || len(after.Tunnels) != 1 || after.Tunnels[0].RemoteAddr != before.Tunnels[0].RemoteAddr || !after.Tunnels[0].Since.Equal(before.Tunnels[0].Since) {
		t.Errorf("tunnels %+v, %v, before %+v", after, err, before)
	}

	first = one.startServer()
	first.waitTarget(edge.V4, "online")
	one.mustEcho(addr)
	agent.waitMetric(`edge_tunnel_agent_tunnels{state="up"}`, 2)
	if err := exchange(conn, "three"); err != nil {
		t.Errorf("the other server's connection: %v", err)
	}
}

// An agent that is stopped takes no more connections and lets the open ones finish.
func TestAgentDrains(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	addr := s.edge.serve(servicePort, echo)
	open := s.cloud.mustDial(addr)
	if err := exchange(open, "one"); err != nil {
		t.Fatal(err)
	}
	if err := s.agent.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	s.agent.waitLog("stopping")
	// Refused in the kernel, or taken and reset: it depends on who is faster.
	if conn, err := s.cloud.dial(addr); err == nil {
		waitReset(t, conn, patience)
	}
	if err := exchange(open, "two"); err != nil {
		t.Errorf("the open connection: %v", err)
	}
	time.Sleep(10 * time.Millisecond)
	open.Close()
	wantStopped(t, s.agent, 0)
	s.server.waitTarget(s.edge.V4, "offline")
	s.server.waitIdle()
}

// What a service has said before the agent stopped arrives whole, also what the agent had just taken over when its last connection
// ended.
func TestAgentStopLosesNothing(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	const clients, size = 8, 200 << 10
	speak := make(chan struct{})
	addr := s.edge.serve(servicePort, func(conn *net.TCPConn) {
		if _, err := io.WriteString(conn, greeting); err != nil {
			return
		}
		<-speak
		source(size)(conn)
	})
	var conns []*net.TCPConn
	for range clients {
		conn := s.cloud.mustDial(addr)
		_ = conn.SetDeadline(time.Now().Add(patience))
		if _, err := io.ReadFull(conn, make([]byte, len(greeting))); err != nil {
			t.Fatal(err)
		}
		if err := conn.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
	}
	if err := s.agent.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	s.agent.waitLog("stopping")
	close(speak)
	wantStopped(t, s.agent, 0)
	for i, conn := range conns {
		if n, err := io.Copy(io.Discard, conn); n != size || err != nil {
			t.Errorf("client %d got %d bytes of %d, %v", i, n, size, err)
		}
	}
}

// The same in the other direction: what a client has said before the server stopped arrives at the service, which may have said all that it
// has to say long before.
func TestServerStopLosesNothing(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	const clients, size = 8, 200 << 10
	arrived := make(chan int64, clients)
	addr := s.edge.serve(servicePort, func(conn *net.TCPConn) {
		_, _ = io.WriteString(conn, greeting)
		_ = conn.CloseWrite()
		n, _ := io.Copy(io.Discard, conn)
		arrived <- n
	})
	var conns []*net.TCPConn
	for range clients {
		conn := s.cloud.mustDial(addr)
		_ = conn.SetDeadline(time.Now().Add(patience))
		if said, err := io.ReadAll(conn); err != nil || string(said) != greeting {
			t.Fatalf("the service said %q, %v", said, err)
		}
		conns = append(conns, conn)
	}
	if err := s.server.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	s.server.waitLog("some agents have not moved")
	for _, conn := range conns {
		if _, err := io.Copy(conn, io.LimitReader(zeros{}, size)); err != nil {
			t.Fatal(err)
		}
		if err := conn.CloseWrite(); err != nil {
			t.Fatal(err)
		}
	}
	wantStopped(t, s.server, 0)
	for range clients {
		select {
		case n := <-arrived:
			if n != size {
				t.Errorf("%d bytes of %d arrived", n, size)
			}
		case <-time.After(patience):
			t.Fatal("the service waits for more")
		}
	}
}
