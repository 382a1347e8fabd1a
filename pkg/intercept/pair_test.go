// SPDX-License-Identifier: Apache-2.0

package intercept_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/deliver"
	"github.com/edge-tunnel/edge-tunnel/pkg/intercept"
	"github.com/edge-tunnel/edge-tunnel/pkg/relay"
	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

// Both ends of the tunnel in one process: intercept here, deliver there, TCP connections in place of streams.

// newPair returns a lab whose streams end in a deliver.Handler that dials the given service.
func newPair(t *testing.T, service net.Listener) (*lab, *deliver.Handler) {
	t.Helper()
	target := service.Addr().(*net.TCPAddr).AddrPort()
	rules, err := deliver.ParseRules(target.String())
	if err != nil {
		t.Fatal(err)
	}
	handler, err := deliver.New(deliver.Config{Policy: deliver.Policy{Allow: rules}})
	if err != nil {
		t.Fatal(err)
	}
	streams := listen(t)
	var handles sync.WaitGroup
	t.Cleanup(func() { // after the server's Close, which is registered later
		handler.Close()
		handles.Wait()
		if s := handler.Stats(); s.Open != 0 {
			t.Errorf("%d streams left at the edge", s.Open)
		}
	})
	l := newLab(t, func(c *intercept.Config) {
		c.Origin = func(*net.TCPConn) (intercept.Origin, error) { return intercept.Origin{Dst: target}, nil }
		c.Lookup = func(netip.Addr) (string, bool) { return "edge-1", true }
		c.Open = func(ctx context.Context, _ string, h wire.Header, _ intercept.Stream) (intercept.Stream, error) {
			near, far := pair(t, streams)
			handles.Go(func() {
				header, err := wire.ReadHeader(far)
				if err != nil {
					far.Close()
					return
				}
				handler.Handle(context.Background(), "cloud-1", relay.TCP(far), header)
			})
			return near, intercept.WriteHeader(ctx, near, h)
		}
	})
	return l, handler
}

func TestPairKeepsEveryByteAndHalfCloses(t *testing.T) {
	service := listen(t)
	l, handler := newPair(t, service)
	var echoes sync.WaitGroup
	defer echoes.Wait()
	defer service.Close()
	echoes.Go(func() {
		for {
			conn, err := service.Accept()
			if err != nil {
				return
			}
			echoes.Go(func() { // answers only after the client's end of data
				defer conn.Close()
				all, err := io.ReadAll(conn)
				if err != nil {
					t.Error(err)
				}
				conn.Write(all)
			})
		}
	})
	const clients = 50
	var wg sync.WaitGroup
	for i := range clients {
		wg.Go(func() {
			payload := make([]byte, rand.IntN(512<<10))
			rand.NewChaCha8([32]byte{byte(i)}).Read(payload)
			conn, err := net.Dial("tcp", l.addr)
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(20 * time.Second))
			_, err = conn.Write(payload)
			err = errors.Join(err, conn.(*net.TCPConn).CloseWrite())
			got, readErr := io.ReadAll(conn)
			if err != nil || readErr != nil || !bytes.Equal(got, payload) {
				t.Errorf("sent %d bytes, %v; got %d, %v", len(payload), err, len(got), readErr)
			}
		})
	}
	wg.Wait()
	eventually(t, "both ends have ended all", func() bool {
		cloud, edge := l.server.Stats(), handler.Stats()
		return cloud.Ended["closed"] == clients && edge.Ended["closed"] == clients &&
			cloud.Sent == edge.Sent && cloud.Received == edge.Received && cloud.Sent == cloud.Received
	})
}

func TestPairCarriesResets(t *testing.T) {
	service := listen(t)
	l, handler := newPair(t, service)
	accept := func() *net.TCPConn {
		conn, err := service.Accept()
		if err != nil {
			t.Fatal(err)
		}
		conn.SetDeadline(time.Now().Add(20 * time.Second))
		t.Cleanup(func() { conn.Close() })
		return conn.(*net.TCPConn)
	}
	client := l.dial()
	far := accept()
	send(t, far, "x")
	expect(t, client, "x")
	reset(client)
	expectReset(t, far)

	client = l.dial()
	far = accept()
	send(t, far, "x")
	expect(t, client, "x")
	reset(far)
	expectReset(t, client)

	service.Close()
	l.dialReset()
	eventually(t, "all ended", func() bool { return l.server.Stats().Open+handler.Stats().Open == 0 })
	cloud, edge := l.server.Stats().Ended, handler.Stats().Ended
	for _, reason := range []string{"client_reset", "remote_reset", "refused"} {
		if cloud[reason] != 1 || edge[reason] != 1 {
			t.Errorf("%s: %d in the cloud, %d at the edge, want 1 each", reason, cloud[reason], edge[reason])
		}
	}
}
