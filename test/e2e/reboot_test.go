// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"net/netip"
	"syscall"
	"testing"

	"github.com/edge-tunnel/edge-tunnel/pkg/redirect"
)

// A machine that was rebooted has nothing in its kernel, and its agents are away. What --state-dir remembers is in force, offline, with
// the first program: no connect is ever sent to a wrong place, or waits.
func TestReboot(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	addr, addr6 := s.edge.serve(servicePort, echo), s.edge.serveAt(s.edge.at6(servicePort), echo)
	s.cloud.mustEcho(addr)
	s.agent.stop()
	s.server.stop()
	// What a reboot takes away: programs, links and maps.
	if out, err := s.cloud.ctl("cleanup"); err != nil {
		t.Fatalf("cleanup: %v: %s", err, out)
	}
	if _, err := redirect.ReadPinned(s.cloud.BPFFS()); !errors.Is(err, redirect.ErrNotInstalled) {
		t.Fatalf("still in the kernel: %v", err)
	}
	_, err := s.cloud.dial(addr)
	wantErrno(t, err, syscall.ENETUNREACH) // not intercepted: the node itself has no route

	s.server = s.cloud.launchServer("--tunneled-ports", fmt.Sprint(servicePort))
	// From the first connect that is intercepted on, all are, and all are refused.
	var seen []error
	eventually(t, patience, func() error {
		_, err := s.cloud.dial(addr)
		seen = append(seen, err)
		if !errors.Is(err, syscall.EHOSTUNREACH) {
			return fmt.Errorf("not intercepted yet: %w", err)
		}
		return nil
	})
	for _, err := range seen[:len(seen)-1] {
		wantErrno(t, err, syscall.ENETUNREACH)
	}
	s.server.waitReady()
	for _, to := range []netip.AddrPort{addr, addr6} {
		_, err := s.cloud.dial(to)
		wantErrno(t, err, syscall.EHOSTUNREACH)
	}
	for _, a := range s.edge.addrs() {
		if target, err := s.server.target(a); err != nil || target.State != "offline" || target.Node != "edge-1" {
			t.Errorf("target %+v, %v", target, err)
		}
	}
	if logins := s.server.metrics()["edge_tunnel_logins_total"]; logins != 0 {
		t.Errorf("%v logins before the agent was started", logins)
	}

	s.agent = s.edge.startAgent([]*host{s.cloud})
	s.server.waitTarget(s.edge.V4, "online")
	s.cloud.mustEcho(addr)
	s.cloud.mustEcho(addr6)
}
