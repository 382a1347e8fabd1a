// SPDX-License-Identifier: Apache-2.0

package deliver

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// Policy says what may be dialed. The zero value allows nothing.
//
//   - Never: unspecified, multicast, link-local (cloud metadata services live there) and broadcast addresses.
//   - The node's own addresses, on any port but ClosedPorts.
//   - On Loopback's ports, whatever the destination: loopback of its family instead, because that is where such services listen.
//     This covers a node that the cloud knows by an address of its NAT gateway. If loopback refuses and the
//     destination is the node's own, the destination is dialed after all.
//   - What Allow lists. A rule opens loopback only if it is about loopback, and a closed port only if it is about one
//     address: "0.0.0.0/0:*" opens neither.
type Policy struct {
	Own         func(netip.Addr) bool  // whether the node has this address now; nil: it has none
	Loopback    func(port uint16) bool // whether it is one of these ports now; nil: there are none
	Allow       []Rule
	ClosedPorts []uint16 // the agent's own
}

// Why a destination is not allowed.
var (
	errNever    = errors.New("addresses of this kind are never dialed")
	errClosed   = errors.New("port is the agent's own, and not listed")
	errLoopback = errors.New("loopback port is not listed")
	errForeign  = errors.New("address is not the node's own, and not listed")
)

// DeniedError says why a destination may not be dialed.
type DeniedError struct {
	Dst netip.AddrPort
	err error
}

func (e *DeniedError) Error() string { return fmt.Sprintf("%v not allowed: %v", e.Dst, e.err) }

// Reason is the label for metrics and records.
func (e *DeniedError) Reason() string { return "not_allowed" }

// Targets returns what to dial for a destination, in order: the next one only if the one before refused. The error is a
// *DeniedError.
func (p Policy) Targets(dst netip.AddrPort) ([]netip.AddrPort, error) {
	addr, port := dst.Addr().Unmap(), dst.Port()
	dst = netip.AddrPortFrom(addr, port)
	own := p.Own != nil && p.Own(addr)
	proxied := p.Loopback != nil && p.Loopback(port)
	switch {
	case !addr.IsValid() || port == 0 || never(addr):
		return nil, &DeniedError{dst, errNever}
	case addr.IsLoopback():
		if proxied || p.listed(dst, isLoopback) {
			return []netip.AddrPort{dst}, nil
		}
		return nil, &DeniedError{dst, errLoopback}
	case own && proxied:
		return []netip.AddrPort{loopback(dst), dst}, nil
	case own && slices.Contains(p.ClosedPorts, port) && !p.listed(dst, netip.Prefix.IsSingleIP):
		return nil, &DeniedError{dst, errClosed}
	case own, p.listed(dst, anyPrefix):
		return []netip.AddrPort{dst}, nil
	case proxied:
		return []netip.AddrPort{loopback(dst)}, nil
	}
	return nil, &DeniedError{dst, errForeign}
}

// listed reports whether a rule whose prefix is good enough covers dst.
func (p Policy) listed(dst netip.AddrPort, enough func(netip.Prefix) bool) bool {
	return slices.ContainsFunc(p.Allow, func(r Rule) bool { return enough(r.Prefix) && r.covers(dst) })
}

func anyPrefix(netip.Prefix) bool { return true }

// isLoopback holds for no prefix that also has other addresses: masked, those do not begin with a loopback address.
func isLoopback(p netip.Prefix) bool { return p.Masked().Addr().IsLoopback() }

func never(addr netip.Addr) bool {
	return addr.IsUnspecified() || addr.IsMulticast() || addr.IsLinkLocalUnicast() || addr.Zone() != "" ||
		addr == netip.AddrFrom4([4]byte{255, 255, 255, 255})
}

// loopback is dst's port on the loopback address of its family.
func loopback(dst netip.AddrPort) netip.AddrPort {
	if dst.Addr().Is4() {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), dst.Port())
	}
	return netip.AddrPortFrom(netip.IPv6Loopback(), dst.Port())
}
