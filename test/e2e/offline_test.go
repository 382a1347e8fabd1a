// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
	"syscall"
	"testing"
	"time"
)

// A node without a tunnel is refused in the kernel: EHOSTUNREACH, counted, and no packet leaves. The cloud node has a route that packets
// could take, and a counter that sees them.
func TestOfflineNodeIsRefusedInTheKernel(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	pod := s.cloud.pod("pod-1")
	s.edge.serve(servicePort, echo)
	s.cloud.mustEcho(s.edge.at(servicePort))
	s.agent.stop()
	for _, addr := range s.edge.addrs() {
		s.server.waitTarget(addr, "offline")
	}
	s.cloud.mustRun("ip", "route", "add", "default", "via", s.home.Router.V4.String())
	s.cloud.mustRun("ip", "-6", "route", "add", "default", "via", s.home.Router.V6.String())

	for _, h := range []*host{s.cloud, pod} {
		h.countPackets(s.edge.addrs())
		// First that the counter counts: a port that is not tunneled goes out, and nobody answers.
		if _, _, err := h.dialWith(s.edge.at(4444), dialOptions{timeout: 200 * time.Millisecond}); err == nil {
			t.Fatal("there is a way to the edge without a tunnel")
		}
		sent := h.packets()
		if sent == 0 {
			t.Fatalf("%s: no packet was counted of a connect that is not intercepted", h.Name)
		}
		for _, addr := range []netip.AddrPort{s.edge.at(servicePort), s.edge.at6(servicePort)} {
			before := s.server.metrics()
			_, took, err := h.dialWith(addr, dialOptions{})
			wantErrno(t, err, syscall.EHOSTUNREACH)
			after := s.server.metrics()
			if got := after.bpf("offline") - before.bpf("offline"); got != 1 {
				t.Errorf("%s: %s: %v connects were counted as offline, want 1", h.Name, addr, got)
			}
			if after["edge_tunnel_connections_begun_total"] != before["edge_tunnel_connections_begun_total"] {
				t.Errorf("%s: %s: the server saw the connection", h.Name, addr)
			}
			// Nothing was waited for. (How long it takes is the benchmarks' business.)
			if took > time.Second {
				t.Errorf("%s: %s: refused after %v", h.Name, addr, took)
			}
		}
		// Of the control, retransmissions may come late; they are to another port, but the rule counts by address.
		if now := h.packetsTo(servicePort); now != 0 {
			t.Errorf("%s: %d packets left for a node that is offline", h.Name, now)
		}
	}
}

// countPackets counts, in the host's namespace, TCP packets to these addresses, and those of them to the service's port.
func (h *host) countPackets(addrs []netip.Addr) {
	h.t.Helper()
	rules := "table inet count { counter any {}; counter service {}; chain out { type filter hook output priority -200;"
	for _, a := range addrs {
		family := "ip"
		if a.Is6() {
			family = "ip6"
		}
		rules += fmt.Sprintf(" %s daddr %s meta l4proto tcp counter name any; %s daddr %s tcp dport %d counter name service;",
			family, a, family, a, servicePort)
	}
	nft(h.t, h.Node, rules+" }; }")
}

var packetCount = regexp.MustCompile(`packets (\d+)`)

func (h *host) counter(name string) int {
	h.t.Helper()
	out, err := h.Command(context.Background(), "nft", "list", "counter", "inet", "count", name).CombinedOutput()
	found := packetCount.FindSubmatch(out)
	if err != nil || found == nil {
		h.t.Fatalf("read the counter %s on %s: %v: %s", name, h.Name, err, out)
	}
	n, err := strconv.Atoi(string(found[1]))
	if err != nil {
		h.t.Fatal(err)
	}
	return n
}

func (h *host) packets() int { return h.counter("any") }

func (h *host) packetsTo(port uint16) int {
	if port != servicePort {
		h.t.Fatalf("packets to port %d are not counted", port)
	}
	return h.counter("service")
}
