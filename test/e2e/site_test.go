// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"crypto/sha256"
	"io"
	"net/netip"
	"testing"
	"time"
)

// The whole path, from the host and from a pod, over both families, and what is told about it.
func TestConnectionArrives(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	pod := s.cloud.pod("pod-1")
	addr := s.edge.serve(servicePort, echo)
	addr6 := s.edge.serveAt(s.edge.at6(servicePort), greet)

	for _, h := range []*host{s.cloud, pod} {
		for _, to := range []netip.AddrPort{addr, addr6} {
			conn := h.mustDial(to)
			if got := conn.RemoteAddr().String(); got != to.String() {
				t.Errorf("%s: the peer of %s is %s", h.Name, to, got)
			}
			if to == addr6 {
				hello := make([]byte, len(greeting))
				if _, err := io.ReadFull(conn, hello); err != nil || string(hello) != greeting {
					t.Fatalf("%s: greeting %q, %v", h.Name, hello, err)
				}
			}
			if err := exchange(conn, "ping"); err != nil {
				t.Fatal(err)
			}
			if err := conn.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if _, err := conn.Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("%s: after a half-close: %v", h.Name, err)
			}
			r := s.server.record(conn.LocalAddr())
			if r.Dst != to || r.Node != "edge-1" || r.Reason != "closed" || r.Sent != 4 || r.PID != uint32(h.hands.pid) || r.Comm == "" {
				t.Errorf("%s: record %+v", h.Name, r)
			}
			if a := s.agent.record(conn.LocalAddr()); a.Trace != r.Trace || a.Dialed != to.String() || a.Received != r.Received {
				t.Errorf("%s: the agent's record %+v", h.Name, a)
			}
		}
	}
	s.server.waitIdle()
	s.agent.waitIdle()
}

func TestHalfCloseAndBulk(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	const size = 8 << 20
	up := s.edge.serve(servicePort, sink)
	down := s.edge.serve(10250, source(size))

	conn := s.cloud.mustDial(up)
	sum := sha256.New()
	if _, err := io.Copy(io.MultiWriter(conn, sum), io.LimitReader(zeros{}, size)); err != nil {
		t.Fatal(err)
	}
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	_ = conn.SetDeadline(time.Now().Add(patience))
	if got, err := io.ReadAll(conn); err != nil || string(got) != string(sum.Sum(nil)) {
		t.Errorf("the sink has %x, %v, want %x", got, err, sum.Sum(nil))
	}
	conn = s.cloud.mustDial(down)
	_ = conn.SetDeadline(time.Now().Add(patience))
	if n, err := io.Copy(io.Discard, conn); n != size || err != nil {
		t.Errorf("got %d bytes, %v", n, err)
	}
}
