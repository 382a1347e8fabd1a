// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/edge-tunnel/edge-tunnel/pkg/identity"
	"github.com/edge-tunnel/edge-tunnel/pkg/intercept"
	"github.com/edge-tunnel/edge-tunnel/pkg/tunnel"
	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

// hopServer is what of a server has to do with others: no kernel, no interception.
type hopServer struct {
	*hop
	addr string
	open func(context.Context, string, wire.Header, intercept.Stream) (intercept.Stream, error)
}

func startHop(t *testing.T, p pki, name string, to ...*hopServer) *hopServer {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	ids, err := identity.Open(p.files(name), identity.Options{Role: identity.RoleServer, Log: log})
	must(t, err)
	peers := peersOf(ids, "test", nil, log)
	s := &hopServer{hop: newHop(peers, newOwners(peers, func() []string { return []string{"edge-1"} }, func(string, bool) {}), log)}
	var addrs []string
	for _, peer := range to {
		addrs = append(addrs, peer.addr)
	}
	must(t, s.peers.Set(addrs))
	s.tunnels, err = tunnel.NewServer(tunnel.ServerConfig{
		ID: name, Authorize: authorize(ids), OnChange: s.owners.changed, Forward: s.forward,
		TLS: ids.ServerTLS(map[string]identity.Role{wire.ALPNAgent: identity.RoleAgent, wire.ALPNPeer: identity.RoleServer}),
	})
	must(t, err)
	s.open = openerOf(s.tunnels, s.hop)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	s.addr = ln.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	var group errgroup.Group
	group.Go(func() error { return s.tunnels.Serve(ctx, ln) })
	group.Go(func() error { return s.peers.Run(ctx) })
	group.Go(func() error { return s.owners.run(ctx) })
	t.Cleanup(func() {
		cancel()
		must(t, group.Wait())
	})
	for deadline := time.Now().Add(10 * time.Second); len(s.peers.Live()) < len(to); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s has the peers %q", name, s.peers.Live())
		}
	}
	return s
}

// startEcho connects edge-1 to a server, and tells which headers arrive.
func startEcho(t *testing.T, p pki, to *hopServer) <-chan wire.Header {
	t.Helper()
	ids, err := identity.Open(p.files("edge-1"), identity.Options{Role: identity.RoleAgent})
	must(t, err)
	headers := make(chan wire.Header, 16)
	agent, err := tunnel.NewAgent(tunnel.AgentConfig{
		Servers: []string{to.addr}, Tunnels: 1,
		TLS: func(string) *tls.Config { return ids.ClientTLS("127.0.0.1", wire.ALPNAgent) },
		Handle: func(_ context.Context, s *tunnel.Stream, h wire.Header) {
			headers <- h
			_ = wire.WriteReply(s, wire.Reply{})
			_, _ = io.Copy(s, s)
		},
	})
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- agent.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		must(t, <-done)
	})
	for deadline := time.Now().Add(10 * time.Second); to.tunnels.Stats().Active == 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the agent does not log in")
		}
	}
	return headers
}

// A peer forwards to its own tunnels only, though it knows who else has one; and what it refuses is tried once more, elsewhere.
func TestHopIsOneHop(t *testing.T) {
	p := newPKI(t)
	ca, err := identity.OpenCA(p.dir, identity.CAOptions{})
	must(t, err)
	for _, name := range []string{"cloud-2", "cloud-3"} {
		_, err := ca.IssueServer(name, []string{"127.0.0.1"})
		must(t, err)
	}
	owner := startHop(t, p, "cloud-3")
	middle := startHop(t, p, "cloud-2", owner)
	headers := startEcho(t, p, owner)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	header := wire.Header{Kind: wire.KindConnect, Trace: 7, Dst: netip.AddrPortFrom(edge4, 10250)}
	echo := func(s intercept.Stream) {
		t.Helper()
		if r, err := wire.ReadReply(s); err != nil || r.Status != wire.StatusOK {
			t.Fatalf("%+v, %v", r, err)
		}
		if h := <-headers; h != header {
			t.Errorf("the agent got %+v, want %+v", h, header)
		}
		if _, err := io.WriteString(s, "there and back"); err != nil {
			t.Fatal(err)
		}
		must(t, s.CloseWrite())
		if got, err := io.ReadAll(s); err != nil || string(got) != "there and back" {
			t.Errorf("%q, %v", got, err)
		}
		must(t, s.Close())
	}

	// The record may be older than the tunnel; then the first find is wrong for a second.
	var stream intercept.Stream
	for {
		if stream, err = middle.open(ctx, "edge-1", header, nil); err == nil {
			break
		}
		if !errors.Is(err, tunnel.ErrNoTunnel) {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
	echo(stream)

	// Only by way of the server in the middle there is none.
	first := startHop(t, p, "cloud-1", middle)
	if _, err := first.open(ctx, "edge-1", header, nil); !errors.Is(err, tunnel.ErrNoTunnel) {
		t.Errorf("by two hops: %v", err)
	}
	forwarded := owner.book.Stats().Begun
	direct, err := first.peers.Open(ctx, "cloud-2")
	must(t, err)
	named := header
	named.Node = "edge-1"
	must(t, wire.WriteHeader(direct, named))
	if r, err := wire.ReadReply(direct); err != nil || r.Status != wire.StatusNotOwner {
		t.Errorf("asked to forward twice: %+v, %v", r, err)
	}
	_ = direct.Reset()
	if n := middle.drain(ctx); n != 0 || middle.book.Stats().Ended["not_owner"] != 1 {
		t.Errorf("%d streams are left, ended are %v", n, middle.book.Stats().Ended)
	}
	if n := owner.book.Stats().Begun; n != forwarded {
		t.Errorf("%d streams were forwarded twice", n-forwarded)
	}

	// Now the owner is known, too, and the one in the middle is what was wrong.
	must(t, first.peers.Set([]string{middle.addr, owner.addr}))
	for len(first.peers.Live()) < 2 {
		time.Sleep(5 * time.Millisecond)
	}
	first.owners.mu.Lock()
	first.owners.entry("edge-1").peer = "cloud-2"
	first.owners.mu.Unlock()
	stream, err = first.open(ctx, "edge-1", header, &hopStream{direct, "cloud-2"})
	must(t, err)
	echo(stream)
	if h, ok := stream.(*hopStream); !ok || h.peer != "cloud-3" {
		t.Errorf("the second try went by %+v", stream)
	}
}

func TestStatusOf(t *testing.T) {
	for err, want := range map[error]wire.Status{
		tunnel.ErrNoTunnel: wire.StatusNotOwner, tunnel.ErrDraining: wire.StatusDraining, tunnel.ErrOverloaded: wire.StatusOverloaded,
		context.DeadlineExceeded: wire.StatusNoTunnel,
	} {
		if got := statusOf(err); got != want {
			t.Errorf("%v is told as %v, want %v", err, got, want)
		}
	}
}
