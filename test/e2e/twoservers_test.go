// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"net/netip"
	"syscall"
	"testing"
)

// An agent with two servers: the processes and pods of each cloud node are intercepted there and go through their own tunnel. When one server is
// killed, the other one's connections go on, and new ones work; its own node's are refused until it is back.
func TestTwoServers(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	clouds := []*host{w.cloud("cloud-1"), w.cloud("cloud-2")}
	pods := []*host{clouds[0].pod("pod-1"), clouds[1].pod("pod-2")}
	edge := w.site("home").edge("edge-1")
	to := []netip.AddrPort{edge.serve(10250, echo), edge.serveAt(edge.at6(10250), echo)}
	servers := []*daemon{clouds[0].startServer(), clouds[1].startServer()}
	agent := edge.startAgent(clouds)
	for _, s := range servers {
		s.waitTarget(edge.V4, "online")
		s.waitTarget(edge.V6, "online")
	}
	for i := range clouds {
		for _, addr := range to {
			for _, h := range []*host{clouds[i], pods[i]} {
				conn := h.mustDial(addr)
				if err := exchange(conn, "from "+h.Name); err != nil {
					t.Fatal(err)
				}
				conn.Close()
				if r := servers[i].record(conn.LocalAddr()); r.PID != uint32(h.hands.pid) || r.Dst != addr {
					t.Errorf("%s: record %+v", h.Name, r)
				}
				if r := agent.record(conn.LocalAddr()); r.Server != clouds[i].at(10262).String() {
					t.Errorf("%s: the agent's record %+v", h.Name, r)
				}
			}
		}
		servers[i].waitIdle()
		if n := len(servers[i].records()); n != 4 {
			t.Errorf("%s served %d connections, want its own 4", clouds[i].Name, n)
		}
	}

	lost, kept := clouds[0].mustDial(to[0]), clouds[1].mustDial(to[0])
	if err := errors.Join(exchange(lost, "one"), exchange(kept, "one")); err != nil {
		t.Fatal(err)
	}
	servers[0].Kill()
	agent.waitMetric(`edge_tunnel_agent_tunnels{state="up"}`, 1)
	if err := exchange(kept, "two"); err != nil {
		t.Errorf("the other server's connection: %v", err)
	}
	for _, addr := range to {
		clouds[1].mustEcho(addr)
		pods[1].mustEcho(addr)
		for _, h := range []*host{clouds[0], pods[0]} {
			_, err := h.dial(addr)
			wantErrno(t, err, syscall.ECONNREFUSED)
		}
	}

	servers[0] = clouds[0].startServer()
	servers[0].waitTarget(edge.V4, "online")
	clouds[0].mustEcho(to[0])
	pods[0].mustEcho(to[0])
	if err := exchange(kept, "three"); err != nil {
		t.Errorf("the other server's connection: %v", err)
	}
	kept.Close()
	for _, d := range append(servers, agent) {
		d.waitIdle()
	}
}
