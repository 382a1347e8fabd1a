// SPDX-License-Identifier: Apache-2.0

package route

import "net/netip"

// Rules say which addresses cannot be targets on this host. The zero value has only the unconditional rules:
// never loopback, unspecified (0.0.0.0/8, ::), multicast, link-local, or the broadcast address.
//
// 240.0.0.0/4 may be a target: Linux routes it, some networks number their machines from it, and nothing on this host answers to
// it. 0.0.0.0/8 may not: whatever it is, it is "this host" (RFC 1122), and connect(0.0.0.0) reaches the loopback.
type Rules struct {
	Local    []netip.Addr // addresses of this host's network namespace
	Redirect []netip.Addr // where connections are redirected to: the node addresses of this host
	// Servers: addresses of nodes that run a tunnel-server, except nodes that are marked as reached through a tunnel.
	Servers    []netip.Addr
	Direct     []netip.Addr   // addresses of edge nodes that are reached without a tunnel
	APIServers []netip.Addr   // API server endpoints
	Services   []netip.Prefix // Service ranges
	Reserved   []netip.Prefix // kept for other uses on this host, as the addresses of the canary connects
	CIDRs      []netip.Prefix // if there are any, only what lies in one of them may be a target
}

// Split separates the addresses that cannot be targets from those that the rules allow: allowed has a claim for each of claims.
func (r Rules) Split(claims []Claim) (allowed, refused []Claim) {
	check := r.compile()
	allowed = make([]Claim, len(claims))
	for i, c := range claims {
		allowed[i].Node = c.Node
		var bad []netip.Addr
		for _, a := range c.Addrs {
			if check.reason(a.Unmap()) == 0 {
				allowed[i].Addrs = append(allowed[i].Addrs, a)
			} else {
				bad = append(bad, a)
			}
		}
		if len(bad) > 0 {
			refused = append(refused, Claim{c.Node, bad})
		}
	}
	return allowed, refused
}

// checker is Rules in a form that is quick to ask.
type checker struct {
	addrs    map[netip.Addr]Reason
	services []netip.Prefix
	reserved []netip.Prefix
	cidrs    []netip.Prefix
}

func (r Rules) compile() checker {
	c := checker{
		addrs:    make(map[netip.Addr]Reason),
		services: unmapPrefixes(r.Services),
		reserved: unmapPrefixes(r.Reserved),
		cidrs:    unmapPrefixes(r.CIDRs),
	}
	for _, list := range []struct {
		addrs  []netip.Addr
		reason Reason
	}{
		{r.Local, LocalAddress},
		{r.Redirect, RedirectAddress},
		{r.Servers, ServerAddress},
		{r.Direct, DirectAddress},
		{r.APIServers, APIServer},
	} {
		for _, a := range list.addrs {
			a = a.Unmap().WithZone("")
			if _, ok := c.addrs[a]; !ok {
				c.addrs[a] = list.reason
			}
		}
	}
	return c
}

// reason returns why the unmapped address cannot be a target, or 0. If several rules apply, it is the first in the order of
// the constants, so that a report does not change with unrelated settings.
func (c checker) reason(a netip.Addr) Reason {
	switch {
	case !a.IsValid() || a.Zone() != "":
		return Invalid
	case a.IsLoopback():
		return Loopback
	case a.IsUnspecified() || a.Is4() && a.As4()[0] == 0:
		return Unspecified
	case a.IsMulticast():
		return Multicast
	case a.IsLinkLocalUnicast():
		return LinkLocal
	case a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return Broadcast
	}
	if reason, ok := c.addrs[a]; ok {
		return reason
	}
	switch {
	case contains(c.services, a):
		return ServiceRange
	case contains(c.reserved, a):
		return Reserved
	case len(c.cidrs) > 0 && !contains(c.cidrs, a):
		return OutsideTargetCIDR
	}
	return 0
}

func contains(prefixes []netip.Prefix, a netip.Addr) bool {
	for _, p := range prefixes {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// unmapPrefixes turns ::ffff:10.0.0.0/104 into 10.0.0.0/8: Prefix.Contains keeps the two apart.
func unmapPrefixes(prefixes []netip.Prefix) []netip.Prefix {
	out := make([]netip.Prefix, len(prefixes))
	for i, p := range prefixes {
		if p.Addr().Is4In6() && p.Bits() >= 96 {
			p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
		}
		out[i] = p
	}
	return out
}
