// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"

	"github.com/edge-tunnel/edge-tunnel/pkg/redirect"
)

// redirects are the listeners that the kernel redirects connections to: [redirect.Ports] of them on each loopback address and
// on each node address, never on the wildcard. One goroutine at a time may use it.
type redirects struct {
	listen func(context.Context, netip.AddrPort) (net.Listener, error)
	add    func(net.Listener) error // starts to accept; owns the listener
	remove func(net.Listener)       // stops, and closes it
	first  uint16                   // port

	open map[netip.Addr][]net.Listener
}

// cover makes listeners on those of the addresses that have none. An address gets all its ports or none of them; the
// errors of several addresses are joined, and the others are served all the same.
func (r *redirects) cover(ctx context.Context, addrs []netip.Addr) error {
	var errs []error
	for _, addr := range addrs {
		if _, ok := r.open[addr]; ok || !addr.IsValid() {
			continue
		}
		lns, err := r.listenAll(ctx, addr)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if r.open == nil {
			r.open = make(map[netip.Addr][]net.Listener)
		}
		r.open[addr] = lns
	}
	return errors.Join(errs...)
}

func (r *redirects) listenAll(ctx context.Context, addr netip.Addr) ([]net.Listener, error) {
	var lns []net.Listener
	for i := range uint16(redirect.Ports) {
		ln, err := r.listen(ctx, netip.AddrPortFrom(addr, r.first+i))
		if err != nil {
			for _, open := range lns {
				open.Close()
			}
			return nil, err
		}
		lns = append(lns, ln)
	}
	for _, ln := range lns {
		if err := r.add(ln); err != nil {
			for _, all := range lns {
				r.remove(all)
				all.Close()
			}
			return nil, err
		}
	}
	return lns, nil
}

// retain closes the listeners of all other addresses. The kernel must not send anything there any more.
func (r *redirects) retain(addrs []netip.Addr) {
	for addr, lns := range r.open {
		if slices.Contains(addrs, addr) {
			continue
		}
		for _, ln := range lns {
			r.remove(ln)
		}
		delete(r.open, addr)
	}
}

// has reports whether connections can be redirected to the address.
func (r *redirects) has(addr netip.Addr) bool {
	_, ok := r.open[addr]
	return ok
}
