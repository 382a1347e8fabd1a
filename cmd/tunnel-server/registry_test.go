// SPDX-License-Identifier: Apache-2.0

package main

import (
	"net"
	"net/netip"
	"testing"
)

func TestPeerAddr(t *testing.T) {
	node := []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")}
	for _, c := range []struct {
		listen string
		node   []netip.Addr
		want   string
	}{
		{"[::]:10262", node, "192.0.2.1:10262"},
		{"0.0.0.0:1", node[1:], "[2001:db8::1]:1"},
		{"198.51.100.1:10262", node, "198.51.100.1:10262"},
		{"[::]:10262", nil, ""},
	} {
		if got := peerAddr(net.TCPAddrFromAddrPort(netip.MustParseAddrPort(c.listen)), c.node); got != c.want {
			t.Errorf("%s on %v: %q, want %q", c.listen, c.node, got, c.want)
		}
	}
}
