// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"net/netip"
	"testing"
)

// What the edge does not accept is a reset for the client, at once or after the agent's dial timeout; records and counters of both ends say
// why.
func TestEdgeRefuses(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	cloud := w.cloud("cloud-1")
	edge := w.site("home").edge("edge-1")
	var (
		stranger = netip.MustParseAddr("10.99.200.1") // in the certificate, but not the node's
		absent   = netip.MustParseAddr("10.99.200.2") // the same, and allowed; there is no way to it
	)
	w.issueAgent("edge-1", append(edge.addrs(), stranger, absent)...)
	edge.mustRun("ip", "route", "add", "unreachable", absent.String())
	nft(t, edge.Node, "table inet silent { chain in { type filter hook input priority 0; tcp dport 9101 drop; }; }")
	server := cloud.startServer("--tunneled-ports", "9100,9101")
	agent := edge.startAgent([]*host{cloud}, "--allow", absent.String()+":9100")
	server.waitTarget(stranger, "online")

	for _, c := range []struct {
		name, reason string
		to           netip.AddrPort
	}{
		{"closed", "refused", edge.at(9100)},
		{"closed, IPv6", "refused", edge.at6(9100)},
		{"closed on loopback and on the node", "refused", edge.at(10250)},
		{"drops everything", "timed_out", edge.at(9101)},
		{"not the node's", "not_allowed", netip.AddrPortFrom(stranger, 9100)},
		{"not reachable from there", "unreachable", netip.AddrPortFrom(absent, 9100)},
	} {
		before, agentBefore := server.metrics(), agent.metrics()
		cloud.wantReset(c.to, dialOptions{}, patience)
		r := server.recordTo(c.to)
		if r.Reason != c.reason || r.Dst != c.to || r.Node != "edge-1" || r.PID != uint32(cloud.hands.pid) {
			t.Errorf("%s: the server's record %+v", c.name, r)
		}
		if a := agent.recordTo(c.to); a.Reason != c.reason || a.Trace != r.Trace {
			t.Errorf("%s: the agent's record %+v", c.name, a)
		}
		server.waitEnded(c.reason, before[`edge_tunnel_connections_ended_total{reason="`+c.reason+`"}`]+1)
		agent.waitEnded(c.reason, agentBefore[`edge_tunnel_agent_connections_ended_total{reason="`+c.reason+`"}`]+1)
	}
	server.waitIdle()
	agent.waitIdle()
}

// Somebody who dials a redirect listener has no destination: reset and counted, from wherever.
func TestRedirectListenerDialedDirectly(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	pod := s.cloud.pod("pod-1")
	s.edge.serve(servicePort, echo)

	tries := 0
	for _, c := range []struct {
		from *host
		to   string
		uid  int
	}{
		{s.cloud, "127.0.0.1:10270", 0},
		{s.cloud, "[::1]:10277", 0},
		{s.cloud, "127.0.0.1:10271", nobody},
		{s.cloud, s.cloud.at(10272).String(), 0},
		{pod, s.cloud.at(10270).String(), 0},
		{pod, s.cloud.at6(10270).String(), 0},
		{s.edge, s.cloud.at(10270).String(), 0}, // from another machine
	} {
		before := s.server.metrics()
		c.from.wantReset(netip.MustParseAddrPort(c.to), dialOptions{uid: c.uid}, patience)
		tries++
		s.server.waitEnded("not_intercepted", float64(tries))
		if got := s.server.metrics().bpf("accepted_unknown") - before.bpf("accepted_unknown"); got != 1 {
			t.Errorf("%s to %s: the kernel counted %v", c.from.Name, c.to, got)
		}
	}
	if r := s.server.records(); len(r) != 0 {
		t.Errorf("strangers fill the log: %+v", r)
	}
	s.cloud.mustEcho(s.edge.at(servicePort))
}
