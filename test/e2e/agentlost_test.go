// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"
)

// deadAfter is the protocol's promise (SPEC.md): a dead link is noticed within that time. The rest is for a busy machine.
const deadAfter = 20*time.Second + 4*time.Second

// startTransfers opens one connection that only receives, one that only sends, and one that does nothing, and lets them flow. senders tells
// how each write of the second one ends.
func (s *oneSite) startTransfers() (conns []net.Conn, sending <-chan error) {
	s.t.Helper()
	down := s.cloud.mustDial(s.edge.serve(servicePort, source(-1)))
	up := s.cloud.mustDial(s.edge.serve(10250, hold))
	idle := s.cloud.mustDial(s.edge.serve(10255, echo))
	if err := exchange(idle, "here"); err != nil {
		s.t.Fatal(err)
	}
	if _, err := io.CopyN(io.Discard, down, 4<<20); err != nil {
		s.t.Fatal(err)
	}
	begun, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		piece := make([]byte, 64<<10)
		for n := 0; ; n++ {
			if _, err := up.Write(piece); err != nil {
				ended <- err
				return
			}
			if n == 32 {
				close(begun)
			}
		}
	}()
	select {
	case <-begun:
	case err := <-ended:
		s.t.Fatal(err)
	}
	return []net.Conn{down, idle}, ended
}

// wantTransfersReset checks that all of them are reset within the limit.
func (s *oneSite) wantTransfersReset(conns []net.Conn, sending <-chan error, limit time.Duration) {
	s.t.Helper()
	deadline := time.Now().Add(limit)
	for _, conn := range conns {
		waitReset(s.t, conn, time.Until(deadline))
	}
	select {
	case <-sending: // a write can only fail because of a reset
	case <-time.After(time.Until(deadline)):
		s.t.Errorf("the sender was not reset within %v", limit)
	}
}

// An agent that is killed in mid-transfer: its connections are reset, what was opened is closed, the node is offline, and works again
// when the agent is back.
func TestAgentKilled(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	conns, sending := s.startTransfers()
	s.agent.Kill()
	s.wantTransfersReset(conns, sending, deadAfter)
	s.server.waitEnded("tunnel_lost", 3)
	s.server.waitIdle()
	for _, conn := range conns {
		if r := s.server.record(conn.LocalAddr()); r.Reason != "tunnel_lost" || r.Received == 0 {
			t.Errorf("record %+v", r)
		}
	}
	s.server.waitTarget(s.edge.V4, "offline")
	_, err := s.cloud.dial(s.edge.at(10255))
	wantErrno(t, err, syscall.EHOSTUNREACH)

	s.agent = s.edge.startAgent([]*host{s.cloud})
	s.server.waitTarget(s.edge.V4, "online")
	s.cloud.mustEcho(s.edge.at(10255))
	s.server.waitIdle()
	s.agent.waitIdle()
}

// The same with a link that dies silently: no FIN, no RST, no ICMP message. Both ends have to notice by themselves.
func TestLinkCutSilently(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	conns, sending := s.startTransfers()
	s.home.cut()
	s.wantTransfersReset(conns, sending, deadAfter)
	s.server.waitIdle()
	s.server.waitTarget(s.edge.V4, "offline")
	_, err := s.cloud.dial(s.edge.at(10255))
	wantErrno(t, err, syscall.EHOSTUNREACH)
	s.agent.waitIdle() // the edge's services are let go, too
	for _, conn := range conns {
		if r := s.agent.record(conn.LocalAddr()); r.Reason != "tunnel_lost" {
			t.Errorf("the agent's record %+v", r)
		}
	}

	s.home.mend()
	s.server.waitTarget(s.edge.V4, "online")
	s.cloud.mustEcho(s.edge.at(10255))
}

// The network of an agent that has been away for so long that it makes long pauses comes back: it dials at once.
func TestNetworkComesBack(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	cloud := w.cloud("cloud-1")
	home := w.site("home")
	edge := home.edge("edge-1")
	server := cloud.startServer()
	addr := edge.serve(10250, echo)
	edge.link(false)
	agent := edge.launchAgent([]*host{cloud}, "--tunnels", "1")
	agent.waitLog("started")

	// Pauses are random up to a limit that grows: wait for one that leaves no doubt about what ended it.
	const long, soon = 9 * time.Second, 5 * time.Second
	eventually(t, 5*time.Minute, func() error {
		list, err := agent.client().Tunnels(t.Context())
		if err != nil {
			return err
		}
		for _, tunnel := range list.Tunnels {
			if tunnel.RetrySeconds > long.Seconds() {
				return nil
			}
		}
		return fmt.Errorf("tunnels %+v", list.Tunnels)
	})
	back := time.Now()
	edge.link(true)
	server.waitTarget(edge.V4, "online")
	if waited := time.Since(back); waited > soon {
		t.Errorf("the agent was back after %v", waited)
	}
	cloud.mustEcho(addr)
}

// A network that comes back as another one: the old connection is dead, nobody says so, and the keepalive would notice only later.
func TestNetworkChanges(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.edge.serve(servicePort, echo)
	list, err := s.server.client().Tunnels(t.Context())
	if err != nil || len(list.Tunnels) == 0 {
		t.Fatalf("tunnels %v, %v", list, err)
	}
	rules := "table inet cut { chain through { type filter hook forward priority -10;"
	old := make(map[string]bool)
	for _, tunnel := range list.Tunnels {
		old[tunnel.RemoteAddr] = true
		port := netip.MustParseAddrPort(tunnel.RemoteAddr).Port() // masquerading keeps it where it can
		rules += fmt.Sprintf(" tcp sport %d drop; tcp dport %d drop;", port, port)
	}
	nft(t, s.home.Router, rules+" }; }")
	s.edge.link(false)
	time.Sleep(300 * time.Millisecond) // the agent looks once per burst of events: a shorter flap is no change
	s.edge.link(true)
	eventually(t, 9*time.Second, func() error { // the keepalive needs ten at least
		list, err := s.server.client().Tunnels(t.Context())
		if err != nil {
			return err
		}
		for _, tunnel := range list.Tunnels {
			if tunnel.Node == "edge-1" && tunnel.State == "up" && !old[tunnel.RemoteAddr] {
				return nil
			}
		}
		return fmt.Errorf("tunnels %+v", list.Tunnels)
	})
	s.cloud.mustEcho(s.edge.at(servicePort))
}

// link pulls or plugs an edge node's cable. Its default routes go with it.
func (h *host) link(up bool) {
	h.t.Helper()
	if err := h.SetLink("eth0", up); err != nil {
		h.t.Fatal(err)
	}
	if !up {
		return
	}
	// As a network daemon would: the addresses are still there (IPv6 ones are not), the routes are not.
	gateway := h.V4.As4()
	gateway[3] = 1
	h.mustRun("ip", "route", "replace", "default", "via", netip.AddrFrom4(gateway).String())
}
