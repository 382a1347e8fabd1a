// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/edge-tunnel/edge-tunnel/pkg/redirect"
)

// listenersFake plays the kernel's Listen and intercept's Add and Remove, and notes what was done.
type listenersFake struct {
	steps  []string
	open   map[netip.AddrPort]bool
	served map[netip.AddrPort]bool
	listen func(netip.AddrPort) error // nil: works
	add    func(netip.AddrPort) error
}

type fakeListener struct {
	net.Listener
	addr netip.AddrPort
	of   *listenersFake
}

func (l *fakeListener) Close() error {
	delete(l.of.open, l.addr)
	return nil
}

func newRedirects() (*redirects, *listenersFake) {
	f := &listenersFake{open: map[netip.AddrPort]bool{}, served: map[netip.AddrPort]bool{}}
	return &redirects{
		first: 20000,
		listen: func(_ context.Context, addr netip.AddrPort) (net.Listener, error) {
			if f.listen != nil {
				if err := f.listen(addr); err != nil {
					return nil, err
				}
			}
			if f.open[addr] {
				return nil, fmt.Errorf("%s is open already", addr)
			}
			f.open[addr] = true
			return &fakeListener{addr: addr, of: f}, nil
		},
		add: func(ln net.Listener) error {
			addr := ln.(*fakeListener).addr
			if f.add != nil {
				if err := f.add(addr); err != nil {
					ln.Close()
					return err
				}
			}
			f.served[addr] = true
			f.steps = append(f.steps, "+"+addr.String())
			return nil
		},
		remove: func(ln net.Listener) {
			addr := ln.(*fakeListener).addr
			if f.served[addr] {
				f.steps = append(f.steps, "-"+addr.String())
				delete(f.served, addr)
				ln.Close()
			}
		},
	}, f
}

// want compares what is served, and that nothing else is open, with all ports of these addresses.
func (f *listenersFake) want(t *testing.T, addrs ...netip.Addr) {
	t.Helper()
	var want []netip.AddrPort
	for _, a := range addrs {
		for i := range uint16(redirect.Ports) {
			want = append(want, netip.AddrPortFrom(a, 20000+i))
		}
	}
	slices.SortFunc(want, netip.AddrPort.Compare)
	for name, got := range map[string]map[netip.AddrPort]bool{"open": f.open, "served": f.served} {
		var list []netip.AddrPort
		for addr := range got {
			list = append(list, addr)
		}
		slices.SortFunc(list, netip.AddrPort.Compare)
		if !slices.Equal(list, want) {
			t.Errorf("%s: %v, want %v", name, list, want)
		}
	}
}

var (
	addrA = netip.MustParseAddr("10.0.0.1")
	addrB = netip.MustParseAddr("10.0.0.2")
	addrC = netip.MustParseAddr("fd00::3")
)

func TestRedirectsCoverAndRetain(t *testing.T) {
	r, f := newRedirects()
	must(t, r.cover(t.Context(), []netip.Addr{addrA, {}, addrC}))
	f.want(t, addrA, addrC)
	must(t, r.cover(t.Context(), []netip.Addr{addrA, addrB})) // what is open stays
	f.want(t, addrA, addrB, addrC)
	if !r.has(addrB) || r.has(netip.Addr{}) {
		t.Error("has is wrong")
	}
	r.retain([]netip.Addr{addrB, {}})
	f.want(t, addrB)
	if r.has(addrA) {
		t.Error("has an address that is gone")
	}
	must(t, r.cover(t.Context(), []netip.Addr{addrA}))
	f.want(t, addrA, addrB)
	r.retain(nil)
	f.want(t)
}

func TestRedirectsAllPortsOrNone(t *testing.T) {
	for _, port := range []uint16{20000, 20005, 20007} {
		for _, step := range []string{"listen", "add"} {
			r, f := newRedirects()
			fails := func(addr netip.AddrPort) error {
				if addr == netip.AddrPortFrom(addrA, port) {
					return errors.New("no")
				}
				return nil
			}
			if step == "listen" {
				f.listen = fails
			} else {
				f.add = fails
			}
			if err := r.cover(t.Context(), []netip.Addr{addrA, addrB}); err == nil || err.Error() != "no" {
				t.Errorf("%s %d: %v", step, port, err)
			}
			f.want(t, addrB) // the others are served all the same
			if r.has(addrA) || !r.has(addrB) {
				t.Errorf("%s %d: has is wrong", step, port)
			}
			f.listen, f.add = nil, nil
			must(t, r.cover(t.Context(), []netip.Addr{addrA, addrB}))
			f.want(t, addrA, addrB)
		}
	}
}

func TestRedirectsJoinErrors(t *testing.T) {
	r, f := newRedirects()
	f.listen = func(addr netip.AddrPort) error { return fmt.Errorf("no %s", addr.Addr()) }
	err := r.cover(t.Context(), []netip.Addr{addrA, addrB})
	if err == nil || !strings.Contains(err.Error(), "no 10.0.0.1") || !strings.Contains(err.Error(), "no 10.0.0.2") {
		t.Errorf("%v", err)
	}
	f.want(t)
}
