// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"sync/atomic"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
	"github.com/edge-tunnel/edge-tunnel/pkg/hostnet"
)

// network follows the node's addresses, and tells when it has come (back) to a network.
type network struct {
	watcher hostnet.Watcher
	local   atomic.Pointer[[]netip.Addr] // sorted
	wake    chan struct{}
}

func newNetwork(log *slog.Logger) *network {
	n := &network{wake: make(chan struct{}, 1)}
	n.watcher = hostnet.Watcher{Changed: n.changed, Log: log}
	return n
}

// look reads the addresses once, so that no connection is judged before they are known.
func (n *network) look(ctx context.Context) error {
	state, err := hostnet.Read(ctx)
	if err != nil {
		return cli.WithHint(err, "the agent must be allowed to open netlink sockets (AF_NETLINK)")
	}
	n.local.Store(&state.Local)
	return nil
}

// run follows the network until ctx ends.
func (n *network) run(ctx context.Context) error { return n.watcher.Run(ctx) }

func (n *network) changed(c hostnet.Change) {
	n.local.Store(&c.Local)
	if c.Gained {
		select {
		case n.wake <- struct{}{}:
		default: // one is on its way
		}
	}
}

// has reports whether an address is the node's own now.
func (n *network) has(addr netip.Addr) bool {
	_, found := slices.BinarySearchFunc(*n.local.Load(), addr, netip.Addr.Compare)
	return found
}

// addrs are the node's addresses that can be dialed without being listed, for display.
func (n *network) addrs() []netip.Addr {
	return slices.DeleteFunc(slices.Clone(*n.local.Load()), func(a netip.Addr) bool { return a.IsLoopback() || a.IsLinkLocalUnicast() })
}
