// SPDX-License-Identifier: Apache-2.0

package hostnet

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"testing"
	"time"
)

func TestReadNothing(t *testing.T) {
	enter(t)
	s := read(t)
	if len(s.Local) != 0 || s.V4.IsValid() || s.V6.IsValid() {
		t.Errorf("an empty namespace has %+v", s)
	}

	ip(t, "link set lo up")
	s = read(t)
	want := []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("::1")}
	if !slices.Equal(s.Local, want) || s.V4.IsValid() || s.V6.IsValid() {
		t.Errorf("only a loopback, but %+v", s)
	}

	sysctl(t, "ipv6/conf/all/disable_ipv6", "1")
	if s = read(t); !slices.Equal(s.Local, want[:1]) {
		t.Errorf("IPv6 is disabled, but %+v", s)
	}
}

func TestReadCanceled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Read(ctx); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// Each case starts from the same host: two links, two addresses each, no default route, and a virtual address on the loopback.
func TestReadSource(t *testing.T) {
	const host = `
link set lo up
link add eth0 type veth peer name eth0p
link add eth1 type veth peer name eth1p
link set eth0 up
link set eth1 up
link set eth0p up
link set eth1p up
addr add 203.0.113.9/32 dev lo
addr add 2001:db8:f::9/128 dev lo nodad
addr add 169.254.3.3/16 dev eth0
addr add 10.0.0.1/24 dev eth0
addr add 10.0.0.2/24 dev eth0
addr add 10.5.0.1/24 dev eth0
addr add 10.1.0.1/24 dev eth1
addr add 2001:db8:1::5/64 dev eth0 nodad
addr add 2001:db8:1::3/64 dev eth0 nodad
addr add 2001:db8:2::1/64 dev eth1 nodad
`
	for _, test := range []struct {
		name, commands, v4, v6 string
	}{
		{"no default route: first global address", "", "10.0.0.1", "2001:db8:1::3"},
		{"default route", "route add default via 10.1.0.254\nroute add default via 2001:db8:2::ff", "10.1.0.1", "2001:db8:2::1"},
		{"one family each", "route add default via 10.1.0.254", "10.1.0.1", "2001:db8:1::3"},
		{"with a source address", "route add default via 10.0.0.254 src 10.1.0.1", "10.1.0.1", "2001:db8:1::3"},
		{"with the address of the loopback as source", "route add default via 10.1.0.254 src 203.0.113.9\nroute add default via 2001:db8:2::ff src 2001:db8:f::9", "203.0.113.9", "2001:db8:f::9"},
		{"gateway in another subnet of the link", "route add default via 10.5.0.254", "10.5.0.1", "2001:db8:1::3"},
		{"the lower metric", "route add default via 10.1.0.254 metric 200\nroute add default via 10.5.0.254 metric 100", "10.5.0.1", "2001:db8:1::3"},
		{"no gateway", "route add default dev eth1", "10.1.0.1", "2001:db8:1::3"},
		{"several next hops", "route add default nexthop via 10.1.0.254 nexthop via 10.0.0.254", "10.1.0.1", "2001:db8:1::3"},
		{"gateway of the other family", "route add 0.0.0.0/0 via inet6 2001:db8:2::ff", "10.1.0.1", "2001:db8:1::3"},
		{"unreachable", "route add unreachable default metric 1\nroute add default via 10.1.0.254 metric 5", "10.1.0.1", "2001:db8:1::3"},
		{"another table", "route add default via 10.1.0.254 table 77", "10.0.0.1", "2001:db8:1::3"},
		{"no carrier", "link set eth0p down", "10.1.0.1", "2001:db8:2::1"},
		{"no carrier on any", "link set eth0p down\nlink set eth1p down\naddr flush dev lo scope global\nroute add default via 10.1.0.254", "10.1.0.1", "2001:db8:1::3"},
		{"link down", "link set eth0 down", "10.1.0.1", "2001:db8:2::1"},
		{"links without address, loopback as the last resort", "addr flush dev eth0\naddr flush dev eth1", "203.0.113.9", "2001:db8:f::9"},
		{"deprecated, first by number", "addr change 2001:db8:1::3/64 dev eth0 nodad preferred_lft 0 valid_lft 1000", "10.0.0.1", "2001:db8:1::5"},
		{"new, with a lifetime, first by number", "addr add 2001:db8:1::1/64 dev eth0 nodad preferred_lft 500 valid_lft 1000", "10.0.0.1", "2001:db8:1::3"},
		{"default route over a link without addresses", "link add eth2 type veth peer name eth2p\nlink set eth2 up\nlink set eth2p up\nroute add default dev eth2", "10.0.0.1", "2001:db8:1::3"},
	} {
		t.Run(test.name, func(t *testing.T) {
			enter(t)
			ip(t, host+test.commands+"\n")
			v4, v6 := netip.MustParseAddr(test.v4), netip.MustParseAddr(test.v6)
			s := read(t)
			// The kernel learns of a carrier a moment after it has come or gone.
			for deadline := time.Now().Add(5 * time.Second); (s.V4 != v4 || s.V6 != v6) && time.Now().Before(deadline); s = read(t) {
				time.Sleep(time.Millisecond)
			}
			if s.V4 != v4 || s.V6 != v6 {
				t.Errorf("%s, %s; want %s, %s", s.V4, s.V6, test.v4, test.v6)
			}
			if !slices.IsSortedFunc(s.Local, netip.Addr.Compare) || !has(s.Local, "127.0.0.1") || !has(s.Local, test.v4) || !has(s.Local, test.v6) {
				t.Errorf("local %v", s.Local)
			}
		})
	}

	t.Run("all addresses are local", func(t *testing.T) {
		enter(t)
		ip(t, host+"link set eth0 down\naddr add 10.9.0.1 peer 10.9.0.2/32 dev eth1\n")
		s := read(t)
		for _, a := range []string{"127.0.0.1", "::1", "203.0.113.9", "2001:db8:f::9", "169.254.3.3", "10.0.0.1", "10.0.0.2", "10.5.0.1", "10.1.0.1", "10.9.0.1", "2001:db8:2::1"} {
			if !has(s.Local, a) {
				t.Errorf("%s is missing in %v", a, s.Local)
			}
		}
		if has(s.Local, "10.9.0.2") {
			t.Error("the other end of a point-to-point link is not local")
		}
	})
}
