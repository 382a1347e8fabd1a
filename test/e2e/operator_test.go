// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"

	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
)

// What an operator sees and does while connections are open.
func TestOperator(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	pod := s.cloud.pod("pod-1")
	addr := s.edge.serve(servicePort, echo)
	conns := []struct {
		from *host
		sent string
	}{{s.cloud, "from the host"}, {pod, "from the pod, a little more"}}
	for _, c := range conns {
		conn := c.from.mustDial(addr)
		if err := exchange(conn, c.sent); err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}

	// The same connections at both ends.
	var atServer, atAgent admin.ConnectionList
	s.json(&atServer, s.cloud, "connections")
	s.json(&atAgent, s.edge, "connections", "--control", s.agent.control)
	if len(atServer.Connections) != len(conns) || len(atAgent.Connections) != len(conns) {
		t.Fatalf("%d connections at the server, %d at the agent", len(atServer.Connections), len(atAgent.Connections))
	}
	for i, c := range conns {
		got, far := atServer.Connections[i], atAgent.Connections[i]
		n := int64(len(c.sent))
		if got.PID != uint32(c.from.hands.pid) || got.Destination != addr.String() || got.Node != "edge-1" || got.SentBytes != n || got.ReceivedBytes != n || got.Comm == "" {
			t.Errorf("at the server: %+v", got)
		}
		if far.Trace != got.Trace || far.Dialed != addr.String() || far.Source != got.Source || far.SentBytes != n {
			t.Errorf("at the agent: %+v, at the server %+v", far, got)
		}
	}
	out := s.table(s.cloud, "connections")
	for _, c := range conns {
		if process := fmt.Sprintf("[%d]", c.from.hands.pid); !strings.Contains(out, process) {
			t.Errorf("no %s in\n%s", process, out)
		}
	}

	var tunnels admin.TunnelList
	s.json(&tunnels, s.cloud, "tunnels")
	if len(tunnels.Tunnels) != 1 || tunnels.Tunnels[0].Node != "edge-1" || tunnels.Tunnels[0].Streams != len(conns) || tunnels.Tunnels[0].State != "up" {
		t.Errorf("tunnels %+v", tunnels)
	}
	var targets admin.TargetList
	s.json(&targets, s.cloud, "targets")
	if targets.Source != "daemon" || len(targets.Targets) != 2 || targets.Targets[0].State != "online" {
		t.Errorf("targets %+v", targets)
	}
	var status admin.Status
	s.json(&status, s.cloud, "status")
	if !status.Ready || status.Connections != len(conns) || status.Server == nil || len(status.Server.Hooks) == 0 {
		t.Errorf("status %+v", status)
	}
	for _, command := range []string{"status", "tunnels", "connections"} {
		s.table(s.edge, command, "--control", s.agent.control)
	}

	// A node that still is there comes back, but what it had is gone.
	if out, err := s.cloud.ctl("forget", "edge-l"); err == nil || !strings.Contains(out, "did you mean edge-1?") {
		t.Errorf("forget of an unknown node: %v\n%s", err, out)
	}
	open := s.cloud.mustDial(addr)
	if err := exchange(open, "ping"); err != nil {
		t.Fatal(err)
	}
	if out := s.table(s.cloud, "forget", "edge-1"); !strings.Contains(out, "2 addresses") {
		t.Errorf("forget says %q", out)
	}
	waitReset(t, open, patience)
	s.server.waitTarget(s.edge.V4, "online")
	s.cloud.mustEcho(addr)

	// One that is gone does not, and its address is like any other then.
	decoy := s.cloud.newDecoy(addr)
	s.agent.Kill()
	s.server.waitTarget(s.edge.V4, "offline")
	_, err := s.cloud.dial(addr)
	wantErrno(t, err, syscall.EHOSTUNREACH)
	s.table(s.cloud, "forget", "edge-1")
	decoy.wantDecoy(s.cloud, true, dialOptions{})
	decoy.wantDecoy(pod, true, dialOptions{})
	s.server.stop()
	s.server = s.cloud.startServer("--tunneled-ports", fmt.Sprint(servicePort)) // what is forgotten stays so
	if target, err := s.server.target(s.edge.V4); err != nil || target.State != "" {
		t.Errorf("after a restart: target %+v, %v", target, err)
	}
	decoy.wantDecoy(s.cloud, true, dialOptions{})
}

// json decodes what tunnelctl says on a node.
func (s *oneSite) json(to any, at *host, args ...string) {
	s.t.Helper()
	out := s.table(at, append(args, "-o", "json")...)
	if err := json.Unmarshal([]byte(out), to); err != nil {
		s.t.Fatalf("tunnelctl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// table is what tunnelctl says on a node; it must succeed.
func (s *oneSite) table(at *host, args ...string) string {
	s.t.Helper()
	out, err := at.ctl(args...)
	if err != nil {
		s.t.Fatalf("tunnelctl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// A target or a port that is intercepted no longer is so for new connections only.
func TestRemovalLeavesOpenConnections(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	cloud := w.cloud("cloud-1")
	pod := cloud.pod("pod-1")
	edge := w.site("home").edge("edge-1")
	second := netip.MustParseAddr("10.98.7.7")
	if err := edge.AddAddr("eth0", netip.PrefixFrom(second, 32)); err != nil {
		t.Fatal(err)
	}
	w.issueAgent("edge-1", edge.V4, second)
	server := cloud.startServer("--tunneled-ports", "9100,9101", "--drain-timeout", "60s")
	agent := edge.startAgent([]*host{cloud})
	server.waitTarget(second, "online")
	at := edge.serveAt(netip.AddrPortFrom(second, servicePort), echo)
	port := edge.serve(9101, echo)
	stays := edge.serve(servicePort, echo)
	decoy := cloud.newDecoy(at)
	hosts := []*host{cloud, pod}
	var open []net.Conn
	for _, from := range hosts {
		for _, to := range []netip.AddrPort{at, port, stays} {
			open = append(open, from.mustDial(to))
		}
	}
	check := func(when string) {
		t.Helper()
		for _, conn := range open {
			if err := exchange(conn, when); err != nil {
				t.Errorf("%s, %s to %s: %v", when, conn.LocalAddr(), conn.RemoteAddr(), err)
			}
		}
	}
	check("before")

	w.issueAgent("edge-1", edge.V4)
	agent.reload()
	server.waitTarget(second, "")
	for _, from := range hosts {
		decoy.wantDecoy(from, true, dialOptions{})
		from.mustEcho(stays)
		from.mustEcho(port)
	}
	check("after the target's removal")

	// A port goes with a restart; the predecessor stays for its open connections.
	successor := cloud.launchServer("--tunneled-ports", "9100")
	successor.waitLog("Waiting for another tunnel-server")
	if err := server.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	server.waitLog(`"msg":"stopping"`) // until then it is the one that says it is ready
	successor.waitReady()
	successor.waitTarget(edge.V4, "online")
	before := successor.metrics()
	for _, from := range hosts {
		if _, _, err := from.dialWith(port, dialOptions{}); err == nil {
			t.Errorf("%s still reaches port %d", from.Name, port.Port())
		}
		from.mustEcho(stays)
	}
	if m := successor.metrics(); m.bpf("missed") < before.bpf("missed")+2 || m.bpf("offline") != before.bpf("offline") {
		t.Errorf("%v connects were left alone, %v refused", m.bpf("missed")-before.bpf("missed"), m.bpf("offline")-before.bpf("offline"))
	}
	check("after the port's removal")
}
