// SPDX-License-Identifier: Apache-2.0

package hostnet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"github.com/vishvananda/netlink"
)

// dumpTries: a dump that the kernel calls inconsistent, because something changed meanwhile, is asked for again this often.
const dumpTries = 10

// From linux/if_addr.h; package syscall has not all of them.
const (
	ifaTemporary  = 0x01 // IPv6; the same bit is ifaSecondary for IPv4
	ifaSecondary  = 0x01
	ifaOptimistic = 0x04
	ifaDADFailed  = 0x08
	ifaDeprecated = 0x20
	ifaTentative  = 0x40
	ifaPermanent  = 0x80
)

// Read returns the present state of the calling thread's network namespace.
func Read(ctx context.Context) (State, error) {
	h, err := openHandle()
	if err != nil {
		return State{}, err
	}
	defer h.Close()
	f, err := readFacts(ctx, h)
	if err != nil {
		return State{}, err
	}
	return f.state(), nil
}

func openHandle() (*netlink.Handle, error) {
	h, err := netlink.NewHandle(syscall.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink socket: %w", err)
	}
	return h, nil
}

func readFacts(ctx context.Context, h *netlink.Handle) (facts, error) {
	f := facts{links: make(map[int]link)}
	err := dump(ctx, "links", func() error {
		clear(f.links)
		links, err := h.LinkList()
		for _, l := range links {
			a := l.Attrs()
			up := a.RawFlags&syscall.IFF_UP != 0
			f.links[a.Index] = link{
				index:    a.Index,
				up:       up,
				running:  up && a.RawFlags&syscall.IFF_RUNNING != 0,
				loopback: a.RawFlags&syscall.IFF_LOOPBACK != 0,
			}
		}
		return err
	})
	if err != nil {
		return f, err
	}
	err = dump(ctx, "addresses", func() error {
		f.addrs = f.addrs[:0]
		addrs, err := h.AddrList(nil, netlink.FAMILY_ALL)
		for _, a := range addrs {
			if made, ok := makeAddress(a); ok {
				f.addrs = append(f.addrs, made)
			}
		}
		return err
	})
	if err != nil {
		return f, err
	}
	err = dump(ctx, "routes", func() error {
		f.routes = f.routes[:0]
		for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			filter := &netlink.Route{Table: syscall.RT_TABLE_MAIN}
			err := h.RouteListFilteredIter(family, filter, netlink.RT_FILTER_TABLE, func(r netlink.Route) bool {
				if made, ok := makeRoute(r, family); ok {
					f.routes = append(f.routes, made)
				}
				return ctx.Err() == nil
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
	return f, err
}

// dump runs list until the kernel says that nothing changed under it.
func dump(ctx context.Context, what string, list func() error) error {
	var err error
	for range dumpTries {
		if err := ctx.Err(); err != nil {
			return err
		}
		err = list()
		if !errors.Is(err, netlink.ErrDumpInterrupted) && !errors.Is(err, syscall.EINTR) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("list %s: %w", what, err)
	}
	return ctx.Err()
}

func makeAddress(a netlink.Addr) (address, bool) {
	if a.IPNet == nil {
		return address{}, false
	}
	ip, ok := unmapped(a.IP)
	if !ok {
		return address{}, false
	}
	bits, _ := a.Mask.Size()
	made := address{
		addr:       ip,
		subnet:     netip.PrefixFrom(ip, bits),
		link:       a.LinkIndex,
		global:     a.Scope < syscall.RT_SCOPE_LINK,
		unusable:   a.Flags&ifaDADFailed != 0 || a.Flags&ifaTentative != 0 && a.Flags&ifaOptimistic == 0,
		deprecated: a.Flags&ifaDeprecated != 0,
		permanent:  a.Flags&ifaPermanent != 0,
	}
	if ip.Is4() {
		made.secondary = a.Flags&ifaSecondary != 0
	} else {
		made.temporary = a.Flags&ifaTemporary != 0
	}
	return made, true
}

func makeRoute(r netlink.Route, family int) (route, bool) {
	if r.Type != syscall.RTN_UNICAST {
		return route{}, false // blackhole, unreachable, …
	}
	dst := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	if family == netlink.FAMILY_V6 {
		dst = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	if r.Dst != nil {
		ip, ok := unmapped(r.Dst.IP) // the library gives the default route of IPv4 16 bytes
		if !ok {
			return route{}, false
		}
		bits, _ := r.Dst.Mask.Size()
		dst = netip.PrefixFrom(ip, bits)
	}
	made := route{dst: dst, metric: r.Priority}
	made.src, _ = unmapped(r.Src)
	if len(r.MultiPath) == 0 {
		made.nexthop = []nexthop{{r.LinkIndex, gateway(r.Gw, r.Via)}}
	}
	for _, n := range r.MultiPath {
		made.nexthop = append(made.nexthop, nexthop{n.LinkIndex, gateway(n.Gw, n.Via)})
	}
	return made, true
}

// gateway returns the next hop's address, which may be of the other family (RTA_VIA), or none.
func gateway(gw net.IP, via netlink.Destination) netip.Addr {
	if v, ok := via.(*netlink.Via); ok && gw == nil {
		gw = v.Addr
	}
	ip, _ := unmapped(gw)
	return ip
}

func unmapped(ip net.IP) (netip.Addr, bool) {
	a, ok := netip.AddrFromSlice(ip)
	return a.Unmap(), ok
}
