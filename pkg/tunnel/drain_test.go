// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"errors"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

// While the last streams of a drained server finish, its successor has the address, and the agent.
func TestSuccessorHasTheAddress(t *testing.T) {
	ca := newPKI(t)
	old := startServer(t, ca, "cloud-1", nil)
	startAgent(t, ca, "edge-1", []string{old.addr}, nil)
	eventually(t, "up", func() bool { return active(old) == 1 })
	st := must(old.Open(context.Background(), "edge-1"))
	defer st.Close()
	if err := wire.WriteHeader(st, testHeader); err != nil {
		t.Fatal(err)
	}

	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	_ = old.Drain(ctx) // the agent has nowhere to move to
	ln, err := net.Listen("tcp", old.addr)
	if err != nil {
		t.Fatal(err)
	}
	successor := must(NewServer(ServerConfig{ID: "cloud-1", TLS: ca.server(t, "cloud-1"), Authorize: old.auth.authorize}))
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := successor.Serve(ctx, ln); err != nil {
			t.Error(err)
		}
	})
	defer func() {
		stop()
		wg.Wait()
	}()
	eventually(t, "the agent has come", func() bool { return successor.Stats().Active == 1 })
	if err := roundTrip(successor, "edge-1", "new"); err != nil {
		t.Error(err)
	}
	mustWrite(t, st, "old")
	mustRead(t, st, "old")
	if _, err := old.Open(context.Background(), "edge-1"); !errors.Is(err, ErrDraining) {
		t.Error(err)
	}
}

// Serve after Drain lets go of the listener and ends with its context, as ever.
func TestDrainBeforeServe(t *testing.T) {
	ca := newPKI(t)
	var a authorizer
	s := must(NewServer(ServerConfig{ID: "cloud-1", TLS: ca.server(t, "cloud-1"), Authorize: a.authorize}))
	if err := s.Drain(context.Background()); err != nil {
		t.Fatal(err)
	}
	ln := must(net.Listen("tcp", "127.0.0.1:0"))
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, ln) }()
	eventually(t, "closed", func() bool {
		conn, err := net.Dial("tcp", ln.Addr().String())
		if err == nil {
			conn.Close()
		}
		return err != nil
	})
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
