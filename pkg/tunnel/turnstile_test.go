// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

// queued waits until so many wait at a turnstile.
func queued(t *testing.T, ts *turnstile, n int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d wait", n), func() bool {
		ts.mu.Lock()
		defer ts.mu.Unlock()
		return len(ts.waiting[beginning])+len(ts.waiting[going]) == n
	})
}

func TestTurnstileOrder(t *testing.T) {
	ts := &turnstile{free: 1}
	ts.enter(beginning)
	var (
		wg    sync.WaitGroup
		order []string // by those inside
	)
	for i, stage := range []int{beginning, beginning, going, going} {
		wg.Go(func() {
			ts.enter(stage)
			defer ts.leave()
			order = append(order, fmt.Sprint(stage, i))
		})
		queued(t, ts, i+1)
	}
	ts.leave()
	wg.Wait()
	if want := []string{"1 3", "1 2", "0 1", "0 0"}; !slices.Equal(order, want) {
		t.Errorf("order %v, not %v", order, want)
	}
	if ts.free != 1 {
		t.Errorf("%d places are free", ts.free)
	}
}

// TestTurnComesTooLate has a handshake wait for longer than it may, and one be dropped while it waits.
func TestTurnComesTooLate(t *testing.T) {
	ca := newPKI(t)
	s := startServer(t, ca, "cloud-1", func(c *ServerConfig) {
		c.Limits.HandshakeTimeout = 300 * time.Millisecond
		c.TLS.VerifyConnection = func(tls.ConnectionState) error {
			t.Error("it began")
			return nil
		}
	})
	for range s.turnstile.free {
		s.turnstile.enter(beginning)
	}
	cfg := ca.client(t, "edge-1", time.Hour)
	hello := func() {
		c := must(net.Dial("tcp", s.addr))
		t.Cleanup(func() { c.Close() })
		client := tls.Client(c, cfg)
		go func() { _ = client.Handshake() }()
		queued(t, s.turnstile, 1)
	}
	hello()
	time.Sleep(s.cfg.Limits.HandshakeTimeout)
	s.turnstile.leave()
	eventually(t, "it came too late", func() bool { return s.Stats().Refused["timeout"] == 1 && s.Stats().Pending == 0 })
	s.turnstile.enter(beginning)
	hello()
	s.gate.relieve()
	s.turnstile.leave()
	eventually(t, "it was dropped", func() bool { return s.Stats().Refused["dropped"] == 1 })
	eventually(t, "the place is free", func() bool {
		s.turnstile.mu.Lock()
		defer s.turnstile.mu.Unlock()
		return s.turnstile.free == 1
	})
}

// TestStorm has 100 agents log in at once. No more handshakes compute at the same time than there are places, a silent client takes none,
// and a tunnel that is there stays usable.
func TestStorm(t *testing.T) {
	const agents = 100
	ca := newPKI(t)
	var inside, most atomic.Int64
	s := startServer(t, ca, "cloud-1", func(c *ServerConfig) {
		c.TLS.VerifyConnection = func(tls.ConnectionState) error {
			n := inside.Add(1)
			defer inside.Add(-1)
			for was := most.Load(); n > was && !most.CompareAndSwap(was, n); was = most.Load() {
			}
			time.Sleep(time.Millisecond) // so that they meet
			return nil
		}
	})
	places := int64(s.turnstile.free)
	startAgent(t, ca, "stays", []string{s.addr}, func(c *AgentConfig) { c.Tunnels = 1 })
	eventually(t, "the tunnel is up", func() bool { return active(s) == 1 })

	// These are answered and then say nothing.
	for range places {
		c := must(net.Dial("tcp", s.addr))
		defer c.Close()
		half := tls.Client(&mute{Conn: c}, ca.client(t, "mute", time.Hour))
		go func() { _ = half.Handshake() }()
	}
	eventually(t, "they are there", func() bool { return s.Stats().Pending == int(places) })

	for i := range agents {
		startAgent(t, ca, fmt.Sprintf("edge-%d", i), []string{s.addr}, func(c *AgentConfig) { c.Tunnels = 1 })
	}
	for end := time.Now().Add(time.Minute); active(s) < 1+agents; time.Sleep(time.Millisecond) {
		if err := roundTrip(s.Server, "stays", "x"); err != nil || time.Now().After(end) {
			t.Fatalf("%v, %+v", err, s.Stats())
		}
	}
	if got := most.Load(); got > places {
		t.Errorf("%d handshakes at one time, there are %d places", got, places)
	}
	// On a slow machine the silent ones may have run out of time meanwhile.
	if st := s.Stats(); st.Logins != 1+agents || st.Refused["timeout"] > uint64(places) || len(st.Refused) > 1 {
		t.Errorf("%+v", st)
	}
	for i := range agents {
		st, err := s.Open(context.Background(), fmt.Sprintf("edge-%d", i))
		if err != nil {
			t.Fatal(err)
		}
		if err := wire.WriteHeader(st, testHeader); err != nil {
			t.Error(err)
		}
		st.Close()
	}
}

// mute is a connection that sends its first record only.
type mute struct {
	net.Conn
	said bool
}

func (m *mute) Write(p []byte) (int, error) {
	if m.said {
		return len(p), nil
	}
	m.said = true
	return m.Conn.Write(p)
}
