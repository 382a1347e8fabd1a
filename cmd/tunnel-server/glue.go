// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"slices"

	"github.com/edge-tunnel/edge-tunnel/pkg/identity"
	"github.com/edge-tunnel/edge-tunnel/pkg/intercept"
	"github.com/edge-tunnel/edge-tunnel/pkg/redirect"
	"github.com/edge-tunnel/edge-tunnel/pkg/route"
	"github.com/edge-tunnel/edge-tunnel/pkg/tunnel"
	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

// The packages do not know each other. What one wants and another has is put into shape here.

// originOf has the kernel say where a connection was going.
func originOf(kernel *redirect.Kernel) func(*net.TCPConn) (intercept.Origin, error) {
	return func(conn *net.TCPConn) (intercept.Origin, error) {
		o, err := kernel.Origin(conn)
		if errors.Is(err, redirect.ErrNotIntercepted) {
			return intercept.Origin{}, intercept.ErrNotIntercepted
		}
		return intercept.Origin{Dst: o.Dst, PID: o.PID, UID: o.UID, Comm: o.Comm, Cgroup: o.Cgroup, Netns: o.Netns, Host: o.Host}, err
	}
}

// canaryOf tells the guard's own connections by their destinations, which are reserved for them: nobody else's are redirected there.
func canaryOf(rules route.Rules) func(net.Conn, intercept.Origin) bool {
	return func(_ net.Conn, o intercept.Origin) bool {
		return slices.ContainsFunc(rules.Reserved, func(p netip.Prefix) bool { return p.Contains(o.Dst.Addr()) })
	}
}

// openerOf opens streams to a node's agent: in a tunnel of this server if there is one, otherwise, if hop is not nil, by way of another
// server. A second try finds the node's newest tunnel.
func openerOf(tunnels *tunnel.Server, hop *hop) func(context.Context, string, wire.Header, intercept.Stream) (intercept.Stream, error) {
	return func(ctx context.Context, node string, h wire.Header, failed intercept.Stream) (intercept.Stream, error) {
		if f, ok := failed.(*hopStream); ok {
			hop.owners.disown(node, f.peer)
		}
		stream, err := tunnels.Open(ctx, node)
		if hop != nil && (errors.Is(err, tunnel.ErrNoTunnel) || errors.Is(err, tunnel.ErrDraining)) {
			return hop.via(ctx, node, h, err)
		}
		if err != nil {
			return nil, err
		}
		if err := intercept.WriteHeader(ctx, stream, h); err != nil {
			return nil, err
		}
		return stream, nil
	}
}

// authorize takes a node's name and addresses from its certificate, and from nowhere else.
func authorize(ids *identity.Store) func(tls.ConnectionState) (tunnel.Identity, error) {
	return func(state tls.ConnectionState) (tunnel.Identity, error) {
		p, err := ids.Peer(state)
		if err != nil {
			return tunnel.Identity{}, err
		}
		return tunnel.Identity{Name: p.Name, Addrs: p.Addrs, Serial: p.Serial, NotAfter: p.NotAfter}, nil
	}
}

// recheck judges the open tunnels again when certificates, CA bundle or deny file have changed, until ctx ends.
func recheck(ctx context.Context, ids *identity.Store, tunnels *tunnel.Server, hop *hop, log *slog.Logger) {
	for {
		changed := ids.Changed()
		if n := tunnels.Recheck(); n > 0 {
			log.Warn("tunnels are no longer allowed and were dropped", "tunnels", n)
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		}
		if hop != nil {
			hop.peers.Renew()
		}
	}
}
