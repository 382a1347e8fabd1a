// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"syscall"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/identity"
	"github.com/edge-tunnel/edge-tunnel/pkg/intercept"
	"github.com/edge-tunnel/edge-tunnel/pkg/kube"
	"github.com/edge-tunnel/edge-tunnel/pkg/relay"
	"github.com/edge-tunnel/edge-tunnel/pkg/relay/ledger"
	"github.com/edge-tunnel/edge-tunnel/pkg/tunnel"
	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

const (
	openTimeout  = 10 * time.Second // for a stream to the agent, on behalf of a peer
	lingerFor    = 5 * time.Second  // a peer may take to reset a stream that was refused
	maxForwarded = 65536            // open streams of all peers
)

// peersOf dials other servers. bypass keeps its sockets from being redirected: a peer's address may be a target.
func peersOf(ids *identity.Store, software string, bypass func(string, string, syscall.RawConn) error, log *slog.Logger) *tunnel.Peers {
	return tunnel.NewPeers(tunnel.PeersConfig{
		TLS: func(server string) *tls.Config {
			host, _, _ := net.SplitHostPort(server) // the flag's parser has made it HOST:PORT
			return ids.ClientTLS(host, wire.ALPNPeer)
		},
		Verify: func(state tls.ConnectionState) error {
			_, err := ids.Peer(state)
			return err
		},
		Software: software, Control: bypass, Log: log.With("to", "peer"),
	})
}

// hop is the way by other servers: there for connections that are intercepted here, and back for those of peers.
type hop struct {
	peers   *tunnel.Peers
	owners  *owners
	tunnels *tunnel.Server // set before it serves
	log     *slog.Logger
	relayer relay.Relayer
	book    *ledger.Book[struct{}] // streams of peers

	registry *kube.Registry // nil without Kubernetes
}

func newHop(peers *tunnel.Peers, owners *owners, log *slog.Logger) *hop {
	reasons := ledger.RelayReasons()
	for _, s := range []wire.Status{wire.StatusNotOwner, wire.StatusNoTunnel, wire.StatusDraining, wire.StatusOverloaded} {
		reasons = append(reasons, s.String())
	}
	return &hop{peers: peers, owners: owners, log: log, book: ledger.New[struct{}](maxForwarded, reasons...)}
}

// changed notes that a node got a tunnel here, or lost it.
func (h *hop) changed(node string, online bool) {
	if h.registry != nil {
		h.registry.Own(node, online)
	}
	h.owners.changed(node, online)
}

// hopStream remembers by which server a stream goes.
type hopStream struct {
	*tunnel.Stream
	peer string
}

// via opens a stream to a node's agent by way of a server that has a tunnel of it. none is the error if there is no such server.
func (h *hop) via(ctx context.Context, node string, header wire.Header, none error) (intercept.Stream, error) {
	for range 2 { // a second time if the server is gone; it has seen nothing
		peer := h.owners.find(ctx, node)
		if peer == "" {
			break
		}
		stream, err := h.peers.Open(ctx, peer)
		if errors.Is(err, tunnel.ErrNoPeer) {
			h.owners.disown(node, peer)
			continue
		}
		if err != nil {
			return nil, err
		}
		header.Node = node
		if err := intercept.WriteHeader(ctx, stream, header); err != nil {
			return nil, err
		}
		return &hopStream{stream, peer}, nil
	}
	return nil, none
}

// forward joins a stream of a peer with one to the agent. It knows tunnels of this server only, so no stream is forwarded twice.
func (h *hop) forward(ctx context.Context, peer string, stream *tunnel.Stream, header wire.Header) {
	began := time.Now()
	entry, ok := h.book.Begin(began)
	if !ok {
		status := wire.StatusOverloaded
		if h.book.Closed() {
			status = wire.StatusDraining
		}
		refuse(ctx, stream, wire.Reply{Status: status, Message: "the server forwards no more streams"})
		return
	}
	reason := string(relay.Canceled)
	defer func() { entry.End(reason) }()
	bound, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	agent, err := h.tunnels.Open(bound, header.Node)
	if err != nil {
		status := statusOf(err)
		reason = status.String()
		refuse(ctx, stream, wire.Reply{Status: status, Message: err.Error()})
		return
	}
	node := header.Node
	header.Node = ""
	if err := intercept.WriteHeader(bound, agent, header); err != nil {
		_ = stream.Reset() // the agent may have got it
		reason = string(relay.RemoteError)
		return
	}
	r := h.relayer.Relay(ctx, stream, agent)
	reason, _ = ledger.Ended(r)
	h.log.Info("forwarded", "trace", fmt.Sprintf("%016x", header.Trace), "peer", peer, "node", node, "dst", header.Dst.String(),
		"sent", r.Sent, "received", r.Received, "duration", time.Since(began), "reason", reason)
}

// drain lets the streams of peers end until ctx does, and says how many have not.
func (h *hop) drain(ctx context.Context) int {
	h.book.Close()
	_ = h.book.Wait(ctx)
	return h.book.Stats().Open
}

// statusOf tells a peer why no stream could be opened. The agent has seen nothing in any case.
func statusOf(err error) wire.Status {
	switch {
	case errors.Is(err, tunnel.ErrNoTunnel):
		return wire.StatusNotOwner
	case errors.Is(err, tunnel.ErrDraining):
		return wire.StatusDraining
	case errors.Is(err, tunnel.ErrOverloaded):
		return wire.StatusOverloaded
	}
	return wire.StatusNoTunnel
}

// refuse answers with a status and ends the stream. The peer resets it when it has read the status: a reset sent from here could
// overtake that.
func refuse(ctx context.Context, stream *tunnel.Stream, reply wire.Reply) {
	stop := context.AfterFunc(ctx, func() { _ = stream.Reset() })
	defer stop()
	_ = stream.SetDeadline(time.Now().Add(lingerFor))
	if wire.WriteReply(stream, reply) == nil && stream.CloseWrite() == nil {
		_, _ = io.CopyN(io.Discard, stream, 2*wire.MaxRetained)
	}
	_ = stream.Reset()
}
