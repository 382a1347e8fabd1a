// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"net/netip"
	"testing"

	"github.com/vishvananda/netns"
)

func hostport(addr netip.Addr) string { return netip.AddrPortFrom(addr, edgePort).String() }

func TestInterception(t *testing.T) {
	l := newLab(t)
	l.addPod()
	k, s := l.ready()

	type client struct {
		name, network, dial string
		want                netip.Addr
	}
	clients := []client{
		{"IPv4", "tcp4", hostport(edge4), edge4},
		{"IPv6", "tcp6", hostport(edge6), edge6},
	}
	for place, ns := range map[string]netns.NsHandle{"host": l.host, "pod": l.pod} {
		for _, c := range clients {
			t.Run(place+"/"+c.name, func(t *testing.T) {
				before := stats(t, k)
				in(ns, func() {
					conn, err := dialer().Dial(c.network, c.dial)
					if err != nil {
						t.Error(err)
						return
					}
					defer conn.Close()
					if got, err := answer(conn); err != nil || got != c.dial {
						t.Errorf("the server saw %q (%v), want %s", got, err, c.dial)
					}
					if got := conn.RemoteAddr().String(); got != c.dial {
						t.Errorf("getpeername() says %s, want %s", got, c.dial)
					}
				})
				after := stats(t, k)
				redirected := after.RedirectedHost4 + after.RedirectedHost6 - before.RedirectedHost4 - before.RedirectedHost6
				if place == "pod" {
					redirected = after.RedirectedPod4 + after.RedirectedPod6 - before.RedirectedPod4 - before.RedirectedPod6
				}
				if redirected != 1 {
					t.Errorf("%d connections counted as redirected, want 1", redirected)
				}
			})
		}
	}
	if n := s.unknown.Load(); n != 0 {
		t.Errorf("%d connections arrived without an origin", n)
	}
	if r := k.Canary(t.Context()); r.Err() != nil {
		t.Error("canary:", r.Err())
	}
}
