// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"syscall"
	"testing"

	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
)

// waitAmbiguous waits until the server says of an address that these nodes claim it.
func (d *daemon) waitAmbiguous(addr netip.Addr, claimants string) {
	d.t.Helper()
	eventually(d.t, patience, func() error {
		target, err := d.target(addr)
		if want := (admin.Target{Addr: addr, Node: claimants, State: "ambiguous", Reason: "ambiguous"}); err == nil && target != want {
			err = fmt.Errorf("%+v, want %+v", target, want)
		}
		return err
	})
}

// An address that two nodes claim is nobody's, on every server, until one of the claims is withdrawn. All else of the two stays as it was.
func TestTwoNodesClaimOneAddress(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	clouds := []*host{w.cloud("cloud-1"), w.cloud("cloud-2")}
	first, second := w.site("one").edge("edge-1"), w.site("two").edge("edge-2")
	shared := netip.MustParseAddr("10.98.7.7")
	for _, e := range []*host{first, second} {
		if err := e.AddAddr("eth0", netip.PrefixFrom(shared, 32)); err != nil {
			t.Fatal(err)
		}
	}
	w.issueAgent("edge-1", append(first.addrs(), shared)...)
	w.issueAgent("edge-2", append(second.addrs(), shared)...)
	at := netip.AddrPortFrom(shared, servicePort)
	var servers []*daemon
	for _, c := range clouds {
		// The longer a server is away, the longer its agents wait until they try again.
		servers = append(servers, c.startServer("--tunneled-ports", fmt.Sprint(servicePort), "--drain-timeout", "0s"))
	}
	first.startAgent(clouds)
	firstOwn, secondOwn := first.serve(servicePort, echo), second.serve(servicePort, echo)
	first.serveAt(at, echo)
	for _, s := range servers {
		s.waitTarget(shared, "online")
	}
	open := clouds[0].mustDial(at)
	if err := exchange(open, "before"); err != nil {
		t.Fatal(err)
	}

	agent := second.startAgent([]*host{clouds[1], clouds[0]})
	for i, s := range servers {
		s.waitAmbiguous(shared, "edge-1,edge-2")
		s.waitTarget(second.V4, "online")
		before := s.metrics()
		_, err := clouds[i].dial(at)
		wantErrno(t, err, syscall.EHOSTUNREACH)
		m := s.metrics()
		if m.bpf("ambiguous") != before.bpf("ambiguous")+1 || m[`edge_tunnel_targets_refused{reason="ambiguous"}`] != 2 || m[`edge_tunnel_targets{state="ambiguous"}`] != 1 {
			t.Errorf("counted %v connects, %v claims, %v targets", m.bpf("ambiguous")-before.bpf("ambiguous"),
				m[`edge_tunnel_targets_refused{reason="ambiguous"}`], m[`edge_tunnel_targets{state="ambiguous"}`])
		}
		clouds[i].mustEcho(firstOwn)
		clouds[i].mustEcho(secondOwn)
	}
	out, err := clouds[1].ctl("targets")
	if err != nil || !containsFields(out, shared.String(), "edge-1,edge-2", "ambiguous", "ambiguous") {
		t.Errorf("tunnelctl targets: %v\n%s", err, out)
	}
	if err := exchange(open, "open before the claim"); err != nil {
		t.Error(err)
	}

	// A restart, of a server or of an agent, decides nothing. Not even the death of one: a node that is away still has its addresses.
	agent.Kill()
	servers[0].stop()
	servers[0] = clouds[0].startServer("--tunneled-ports", fmt.Sprint(servicePort))
	servers[0].waitTarget(first.V4, "online")
	for i, s := range servers {
		s.waitTarget(second.V4, "offline")
		s.waitAmbiguous(shared, "edge-1,edge-2")
		_, err = clouds[i].dial(at)
		wantErrno(t, err, syscall.EHOSTUNREACH)
	}

	// Withdrawn with another certificate, or by somebody who knows that the node is gone.
	if out, err := clouds[1].ctl("forget", "edge-2"); err != nil {
		t.Fatalf("forget: %v: %s", err, out)
	}
	servers[1].waitTarget(shared, "online")
	clouds[1].mustEcho(at)
	w.issueAgent("edge-2", second.addrs()...)
	second.startAgent(clouds)
	for i, s := range servers {
		s.waitTarget(shared, "online")
		s.waitTarget(second.V4, "online")
		clouds[i].mustEcho(at)
		clouds[i].mustEcho(secondOwn)
	}
}

// containsFields reports whether a line of a table has these cells in a row.
func containsFields(table string, cells ...string) bool {
	want := strings.Join(cells, " ")
	for line := range strings.Lines(table) {
		if strings.Contains(" "+strings.Join(strings.Fields(line), " ")+" ", " "+want+" ") {
			return true
		}
	}
	return false
}

// What a node claims and must not have goes direct, as without us, and is named with the reason.
func TestForbiddenClaims(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	cloud := w.cloud("cloud-1")
	pod := cloud.pod("pod-1")
	edge := w.site("home").edge("edge-1")
	later := netip.MustParseAddr("10.99.0.200") // becomes one of the server's own
	claims := []struct {
		addr   netip.Addr
		reason string // none: a target
	}{
		{edge.V4, ""},
		{later, ""},
		{netip.MustParseAddr("127.0.0.1"), "loopback"},
		{netip.MustParseAddr("127.1.2.3"), "loopback"},
		{netip.IPv6Loopback(), "loopback"},
		{netip.IPv4Unspecified(), "unspecified"},
		{netip.IPv6Unspecified(), "unspecified"},
		{netip.MustParseAddr("0.1.2.3"), "unspecified"},
		{netip.MustParseAddr("224.0.0.251"), "multicast"},
		{netip.MustParseAddr("ff02::1"), "multicast"},
		{netip.MustParseAddr("169.254.169.254"), "link_local"},
		{netip.MustParseAddr("fe80::1"), "link_local"},
		{netip.MustParseAddr("255.255.255.255"), "broadcast"},
		{cloud.V4, "local_address"},
		{cloud.V6, "local_address"},
		{netip.MustParseAddr("10.244.1.1"), "local_address"}, // to its pods
		{netip.MustParseAddr("192.0.2.1"), "reserved"},
		{netip.MustParseAddr("2001:db8::1"), "reserved"},
		{netip.MustParseAddr("8.8.8.8"), "outside_target_cidr"},
		{edge.V6, "outside_target_cidr"},
	}
	f := forged{name: "edge-1"}
	reasons := make(map[string]int)
	for _, c := range claims {
		f.addrs = append(f.addrs, c.addr)
		reasons[c.reason]++
	}
	w.forge(f)
	server := cloud.startServer("--tunneled-ports", fmt.Sprint(servicePort), "--target-cidr", "10.99.0.0/16,10.80.0.0/16")
	edge.startAgent([]*host{cloud})
	server.waitTarget(edge.V4, "online")

	out, err := cloud.ctl("targets")
	if err != nil {
		t.Fatalf("tunnelctl targets: %v: %s", err, out)
	}
	for _, c := range claims {
		want := admin.Target{Addr: c.addr, Node: "edge-1", State: "refused", Reason: c.reason}
		if c.reason == "" {
			want.State = "online"
		}
		if got, err := server.target(c.addr); err != nil || got != want {
			t.Errorf("%+v, %v, want %+v", got, err, want)
		}
		if c.reason != "" && !containsFields(out, c.addr.String(), "edge-1", "refused", c.reason) {
			t.Errorf("tunnelctl targets does not say that %s is refused as %s:\n%s", c.addr, c.reason, out)
		}
	}
	m := server.metrics()
	for reason, n := range reasons {
		if name := fmt.Sprintf("edge_tunnel_targets_refused{reason=%q}", reason); reason != "" && m[name] != float64(n) {
			t.Errorf("%s is %v, want %d", name, m[name], n)
		}
	}

	// Both ways to this node's own services stay as they are.
	edge.serve(servicePort, echo)
	for _, own := range []string{"127.0.0.1:9100", "[::1]:9100", cloud.at(servicePort).String(), cloud.at6(servicePort).String(), "10.244.1.1:9100"} {
		at := netip.MustParseAddrPort(own)
		cloud.serveAt(at, greet)
		for _, from := range []*host{cloud, pod} {
			if from == pod && at.Addr().IsLoopback() {
				continue // the pod's own
			}
			conn := from.mustDial(at)
			if err := exchangeGreeting(conn); err != nil {
				t.Errorf("%s from %s: %v", at, from.Name, err)
			}
		}
	}
	cloud.mustEcho(edge.at(servicePort))

	// Addresses of the server come and go.
	laterAt := netip.AddrPortFrom(later, servicePort)
	if err := cloud.AddAddr("lo", netip.PrefixFrom(later, 32)); err != nil {
		t.Fatal(err)
	}
	server.waitTarget(later, "refused")
	cloud.serveAt(laterAt, echo)
	begun := server.metrics()["edge_tunnel_connections_begun_total"]
	cloud.mustEcho(laterAt)
	pod.mustEcho(laterAt)
	if now := server.metrics()["edge_tunnel_connections_begun_total"]; now != begun {
		t.Errorf("%v connections to the server's own address were tunneled", now-begun)
	}
	if err := cloud.DelAddr("lo", netip.PrefixFrom(later, 32)); err != nil {
		t.Fatal(err)
	}
	server.waitTarget(later, "online")
}

// An agent and a server on one node, with that node's address in the agent's certificate: direct from the node itself, through the tunnel from another,
// and no connection that comes back to where it was.
func TestAgentBesideServer(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	both, other := w.cloud("cloud-1"), w.cloud("cloud-2")
	pod, otherPod := both.pod("pod-1"), other.pod("pod-2")
	w.issueAgent("node-1", both.addrs()...)
	ports := []string{"--tunneled-ports", fmt.Sprint(servicePort)}
	server, otherServer := both.startServer(ports...), other.startServer(ports...)
	both.cert = "node-1"
	agent := both.startAgent([]*host{both, other})
	server.waitTarget(both.V4, "refused")
	server.waitTarget(both.V6, "refused")
	otherServer.waitTarget(both.V4, "online")
	otherServer.waitTarget(both.V6, "online")
	both.serveAt(both.at6(servicePort), echo)
	both.serveAt(netip.MustParseAddrPort("127.0.0.1:10250"), echo) // a kubelet's, say
	addr := both.serve(servicePort, echo)

	for _, from := range []*host{both, pod} {
		from.mustEcho(addr)
		from.mustEcho(both.at6(servicePort))
	}
	both.mustEcho(netip.MustParseAddrPort("127.0.0.1:10250"))
	if m := server.metrics(); m["edge_tunnel_streams_opened_total"] != 0 || m.bpf("offline") != 0 {
		t.Errorf("from the node itself %v connections were tunneled, %v refused", m["edge_tunnel_streams_opened_total"], m.bpf("offline"))
	}

	for _, from := range []*host{other, otherPod} {
		for _, to := range []netip.AddrPort{addr, both.at6(servicePort), both.at(10250)} {
			conn := from.mustDial(to)
			if err := exchange(conn, "ping"); err != nil {
				t.Fatalf("%s from %s: %v", to, from.Name, err)
			}
			conn.Close()
			if r := agent.record(conn.LocalAddr()); r.Dst != to {
				t.Errorf("record %+v", r)
			}
		}
	}
	otherServer.waitIdle()
	agent.waitIdle()
	m, a := otherServer.metrics(), agent.metrics()
	if m["edge_tunnel_streams_opened_total"] != 6 || a["edge_tunnel_agent_streams_opened_total"] != 6 {
		t.Errorf("%v streams for 6 connections, the agent has seen %v", m["edge_tunnel_streams_opened_total"], a["edge_tunnel_agent_streams_opened_total"])
	}
	if n := server.metrics()["edge_tunnel_streams_opened_total"]; n != 0 {
		t.Errorf("%v connections came back", n)
	}
}
