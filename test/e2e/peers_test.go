// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"crypto/tls"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/relay"
	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

// Two servers that are peers of each other, and an agent with a tunnel to one of them: the other cloud node reaches the edge by that one.
// What ends, ends as it does on the direct way. When the agent moves, so does the way; without any tunnel both nodes are refused.
func TestPeerHop(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	clouds := []*host{w.cloud("cloud-1"), w.cloud("cloud-2")}
	pods := []*host{clouds[0].pod("pod-1"), clouds[1].pod("pod-2")}
	edge := w.site("home").edge("edge-1")
	accepted := make(chan *net.TCPConn)
	over := make(chan struct{})
	echoAt, heldAt := edge.serve(10250, echo), edge.serveAt(edge.at6(servicePort), func(conn *net.TCPConn) {
		select {
		case accepted <- conn:
			<-over
		case <-over:
		}
	})
	t.Cleanup(func() { close(over) })
	for _, h := range clouds {
		h.flags = []string{"--tunneled-ports", "9100", "--peer", clouds[0].V4.String() + "," + clouds[1].V4.String()}
	}
	servers := []*daemon{clouds[0].startServer(), clouds[1].startServer()}
	state := func(want string, list ...*daemon) {
		t.Helper()
		for _, d := range list {
			d.waitTarget(edge.V4, want)
			d.waitTarget(edge.V6, want)
		}
	}

	// Both get to know the node, and lose it.
	agent := edge.startAgent(clouds)
	state("online", servers...)
	for _, d := range servers {
		d.waitMetric("edge_tunnel_peers", 1)
		d.waitMetric("edge_tunnel_peer_nodes", 0)
	}
	clouds[1].mustEcho(echoAt)
	agent.stop()
	state("offline", servers...)
	for _, h := range append(clouds, pods...) {
		_, err := h.dial(echoAt)
		wantErrno(t, err, syscall.EHOSTUNREACH)
	}

	// The second one reaches it by the first one.
	agent = edge.startAgent(clouds[:1])
	began := time.Now()
	state("online", servers...)
	t.Logf("online by way of a peer after %v", time.Since(began))
	servers[1].waitMetric("edge_tunnel_peer_nodes", 1)
	for _, h := range append(clouds, pods...) {
		h.mustEcho(echoAt)
	}
	conn := clouds[1].mustDial(echoAt)
	if err := exchange(conn, "by the peer"); err != nil {
		t.Fatal(err)
	}
	conn.Close()
	r := servers[1].record(conn.LocalAddr())
	if a := agent.record(conn.LocalAddr()); a.Trace != r.Trace || a.Server != clouds[0].at(10262).String() {
		t.Errorf("the agent's record %+v, the server's %+v", a, r)
	}
	servers[0].waitMetric("edge_tunnel_peer_streams_total", 3)
	servers[1].waitMetric("edge_tunnel_peer_streams_total", 0)

	both := func() (client, service *net.TCPConn) {
		t.Helper()
		client = clouds[1].mustDial(heldAt)
		select {
		case service = <-accepted:
		case <-time.After(patience):
			t.Fatal("the connection does not arrive at the service")
		}
		for _, c := range []*net.TCPConn{client, service} {
			if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
				t.Fatal(err)
			}
		}
		return client, service
	}
	client, service := both()
	passEnd(t, client, service)
	passBulk(t, service, client)
	client, service = both()
	passEnd(t, service, client)
	passBulk(t, client, service)
	for _, back := range []bool{false, true} {
		client, service = both()
		pass(t, client, service, "there")
		pass(t, service, client, "and back")
		if back {
			client, service = service, client
		}
		if err := relay.TCP(client).Reset(); err != nil {
			t.Fatal(err)
		}
		waitReset(t, service, patience)
	}
	servers[0].waitMetric("edge_tunnel_peer_streams", 0)

	// The owner is killed. Its connections are reset, and so are those that came by it; the node is refused until the agent is elsewhere.
	lost, _ := both()
	servers[0].Kill()
	waitReset(t, lost, patience)
	state("offline", servers[1])
	_, err := clouds[1].dial(echoAt)
	wantErrno(t, err, syscall.EHOSTUNREACH)
	agent.stop()
	agent = edge.startAgent(clouds[1:])
	state("online", servers[1])
	servers[0] = clouds[0].startServer()
	state("online", servers...)
	for _, h := range append(clouds, pods...) {
		h.mustEcho(echoAt)
	}
	servers[1].waitMetric("edge_tunnel_peer_streams_total", 2)
	for _, d := range append(servers, agent) {
		d.waitIdle()
	}

	// What the operator sees of it.
	if out, err := clouds[0].ctl("status"); err != nil || !strings.Contains(out, "cloud-2") {
		t.Errorf("status: %v: %s", err, out)
	}
	if out, err := clouds[0].ctl("tunnels"); err != nil || !strings.Contains(out, "(peer)") {
		t.Errorf("tunnels: %v: %s", err, out)
	}
}

// Who dials must be what the protocol says: an agent's certificate is no server's, and the reverse.
func TestPeerProtocolAsksForAServer(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	cloud := w.cloud("cloud-1")
	edge := w.site("home").edge("edge-1")
	w.issueServer("cloud-9", netip.MustParseAddr("192.0.2.9"))
	server := cloud.startServer("--peer", "192.0.2.9")
	login := func(cert, protocol string) error {
		cfg := w.agentTLS(cert)
		cfg.NextProtos = []string{protocol}
		conn := tls.Client(edge.mustDial(cloud.at(wire.Port)), cfg)
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(patience))
		if err := wire.WriteLogin(conn, wire.Login{MinVersion: 1, MaxVersion: 1}); err != nil {
			return err
		}
		_, err := wire.ReadLoginReply(conn)
		return err
	}
	const refused = `edge_tunnel_logins_refused_total{reason="wrong_role"}`
	for i, c := range []struct{ cert, protocol string }{{"edge-1", wire.ALPNPeer}, {"cloud-9", wire.ALPNAgent}} {
		if err := login(c.cert, c.protocol); err == nil {
			t.Errorf("%s was let in by %s", c.cert, c.protocol)
		}
		server.waitMetric(refused, float64(i+1))
	}
	if err := login("cloud-9", wire.ALPNPeer); err != nil {
		t.Errorf("a server is not let in: %v", err)
	}
}
