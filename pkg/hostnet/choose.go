// SPDX-License-Identifier: Apache-2.0

package hostnet

import (
	"cmp"
	"net/netip"
	"slices"
)

// What the kernel told, reduced to what choices depend on.
type (
	link struct {
		index    int
		up       bool // by its administrator
		running  bool // and with a carrier
		loopback bool
	}
	address struct {
		addr       netip.Addr
		subnet     netip.Prefix
		link       int
		global     bool // scope global or site
		unusable   bool // duplicate detection is under way or has failed
		temporary  bool // IPv6 privacy address
		secondary  bool // IPv4: not the first of its subnet
		deprecated bool
		permanent  bool // has no lifetime
	}
	route struct {
		dst     netip.Prefix // 0.0.0.0/0, ::/0 for the default
		src     netip.Addr   // set by the administrator; usually not valid
		metric  int
		nexthop []nexthop // one or more
	}
	nexthop struct {
		link int
		via  netip.Addr // not valid: on the link itself
	}
	facts struct {
		links  map[int]link
		addrs  []address // in the kernel's order for each link
		routes []route   // main table, unicast
	}
)

// state makes the choices.
func (f facts) state() State {
	var s State
	for _, a := range f.addrs {
		s.Local = append(s.Local, a.addr)
	}
	slices.SortFunc(s.Local, netip.Addr.Compare)
	s.Local = slices.Compact(s.Local)
	s.V4 = f.source(netip.Addr.Is4)
	s.V6 = f.source(netip.Addr.Is6)
	return s
}

// source returns the source address of the default route, or else the first global address of the family.
func (f facts) source(family func(netip.Addr) bool) netip.Addr {
	candidates := f.candidates(family)
	for _, r := range f.defaults(family) {
		for _, c := range candidates {
			if c.addr == r.src {
				return c.addr
			}
		}
		// As the kernel does for IPv4: an address in the gateway's subnet, or else the first of that link.
		out := f.out(r)
		for _, c := range candidates {
			if c.link == out.link && c.subnet.Contains(out.via) {
				return c.addr
			}
		}
		for _, c := range candidates {
			if c.link == out.link {
				return c.addr
			}
		}
	}
	if len(candidates) > 0 {
		return candidates[0].addr
	}
	return netip.Addr{}
}

// candidates returns the addresses that others could reach this host at, best first: on links with a carrier, then others, then
// the loopback. The order depends on the present state only, so that a restart chooses as before.
func (f facts) candidates(family func(netip.Addr) bool) []address {
	var out []address
	for _, a := range f.addrs {
		if family(a.addr) && a.global && !a.unusable && f.links[a.link].up && !a.addr.IsLoopback() && !a.addr.IsLinkLocalUnicast() {
			out = append(out, a)
		}
	}
	slices.SortStableFunc(out, func(a, b address) int {
		la, lb := f.links[a.link], f.links[b.link]
		order := cmp.Or(
			falseFirst(!la.running, !lb.running),
			falseFirst(la.loopback, lb.loopback),
			cmp.Compare(la.index, lb.index),
			falseFirst(a.deprecated, b.deprecated),
			falseFirst(a.temporary, b.temporary),
			falseFirst(a.secondary, b.secondary),
		)
		if order == 0 && a.addr.Is6() {
			// The kernel lists the newest IPv6 address first; one more of them must not move the node.
			order = cmp.Or(falseFirst(!a.permanent, !b.permanent), a.addr.Compare(b.addr))
		}
		return order
	})
	return out
}

// defaults returns the default routes of the family, best first.
func (f facts) defaults(family func(netip.Addr) bool) []route {
	var out []route
	for _, r := range f.routes {
		if r.dst.Bits() == 0 && family(r.dst.Addr()) && f.links[f.out(r).link].up {
			out = append(out, r)
		}
	}
	slices.SortStableFunc(out, func(a, b route) int {
		return cmp.Or(
			falseFirst(!f.links[f.out(a).link].running, !f.links[f.out(b).link].running),
			cmp.Compare(a.metric, b.metric),
		)
	})
	return out
}

// out returns the route's first next hop on a running link, or else its first.
func (f facts) out(r route) nexthop {
	for _, n := range r.nexthop {
		if f.links[n.link].running {
			return n
		}
	}
	return r.nexthop[0]
}

func falseFirst(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}

// way is one thing that could carry a connection off this host: a global address on a running link (dst is not valid), a default
// route or a route by a gateway.
type way struct {
	link int
	dst  netip.Prefix
	addr netip.Addr // own address, or gateway
}

// ways returns all of them. Routes to single hosts on a link are left out: each pod that starts makes one.
func (f facts) ways() map[way]struct{} {
	out := make(map[way]struct{})
	for _, a := range f.addrs {
		if l := f.links[a.link]; l.running && !l.loopback && a.global && !a.unusable {
			out[way{link: a.link, addr: a.addr}] = struct{}{}
		}
	}
	for _, r := range f.routes {
		for _, n := range r.nexthop {
			if l := f.links[n.link]; l.running && !l.loopback && (n.via.IsValid() || r.dst.Bits() == 0) {
				out[way{n.link, r.dst, n.via}] = struct{}{}
			}
		}
	}
	return out
}
