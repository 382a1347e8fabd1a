// SPDX-License-Identifier: Apache-2.0

package main

import (
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strconv"

	"github.com/edge-tunnel/edge-tunnel/pkg/kube"
	"github.com/edge-tunnel/edge-tunnel/pkg/tunnel"
)

// newRegistry has the Leases of a cluster say where the other servers are, beside --peer, and who has which node.
func newRegistry(cluster *cluster, o options, name string, peers *tunnel.Peers, addr func() string, refused func() []kube.Refusal, log *slog.Logger) (*kube.Registry, error) {
	return kube.NewRegistry(kube.RegistryConfig{
		Client: cluster.client, Namespace: o.leases, Server: name, Addr: addr, Refused: refused, Log: log,
		Peers: func(found []string) {
			all := slices.Concat(o.peers, found)
			slices.Sort(all)
			all = slices.Compact(all)
			if len(all) > tunnel.MaxPeers {
				log.Error("more servers than can be peers: nodes that only the others have are offline here", "servers", len(all), "peers", tunnel.MaxPeers)
				all = all[:tunnel.MaxPeers]
			}
			if err := peers.Set(all); err != nil {
				log.Error("cannot dial the other servers", "err", err)
			}
		},
	})
}

// peerAddr is where other servers reach this one: where it listens, or else at the node's first address.
func peerAddr(listen net.Addr, node []netip.Addr) string {
	at, ok := listen.(*net.TCPAddr)
	if !ok {
		return ""
	}
	addr := at.AddrPort().Addr().Unmap()
	if addr.IsUnspecified() {
		if len(node) == 0 {
			return ""
		}
		addr = node[0]
	}
	return net.JoinHostPort(addr.String(), strconv.Itoa(at.Port))
}
