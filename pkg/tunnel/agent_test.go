// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

// balancer is one address in front of several servers, by turns. It can swallow everything, like a cable that was cut.
type balancer struct {
	addr  string
	turn  atomic.Int64
	black atomic.Bool
	ended atomic.Bool

	mu       sync.Mutex
	backends []string
	conns    []net.Conn
}

func startBalancer(t testing.TB, backends ...string) *balancer {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := &balancer{addr: ln.Addr().String(), backends: backends}
	var wg sync.WaitGroup
	forward := func(to, from net.Conn) {
		defer to.Close()
		defer from.Close()
		buf := make([]byte, 32<<10)
		for {
			n, err := from.Read(buf)
			if err != nil {
				return
			}
			for b.black.Load() && !b.ended.Load() {
				time.Sleep(5 * time.Millisecond)
			}
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
		}
	}
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			b.mu.Lock()
			backend := b.backends[int(b.turn.Add(1)-1)%len(b.backends)]
			b.mu.Unlock()
			s, err := net.Dial("tcp", backend)
			if err != nil {
				c.Close()
				continue
			}
			b.mu.Lock()
			b.conns = append(b.conns, c, s)
			b.mu.Unlock()
			wg.Go(func() { forward(c, s) })
			wg.Go(func() { forward(s, c) })
		}
	})
	t.Cleanup(func() {
		ln.Close()
		b.ended.Store(true)
		b.mu.Lock()
		for _, c := range b.conns {
			c.Close()
		}
		b.mu.Unlock()
		wg.Wait()
	})
	return b
}

func TestOneAddressSeveralServers(t *testing.T) {
	ca := newPKI(t)
	two := func(c *ServerConfig) { c.Servers = func() int { return 2 } }
	s1, s2 := startServer(t, ca, "cloud-1", two), startServer(t, ca, "cloud-2", two)
	b := startBalancer(t, s1.addr, s1.addr, s1.addr, s2.addr) // not a fair one
	a := startAgent(t, ca, "edge-1", []string{b.addr}, nil)
	eventually(t, "a tunnel to each", func() bool { return active(s1) == 1 && active(s2) == 1 })
	time.Sleep(300 * time.Millisecond)
	if st := a.Stats(); st.Tunnels != 2 || st.Failures != 0 {
		t.Errorf("%+v", st)
	}
	if ev := s1.Stats().Evictions + s2.Stats().Evictions; ev != 0 {
		t.Errorf("%d evictions", ev)
	}
	for _, s := range []*testServer{s1, s2} {
		if err := roundTrip(s.Server, "edge-1", "x"); err != nil {
			t.Error(err)
		}
	}
}

func TestOneAddressOneServer(t *testing.T) {
	ca := newPKI(t)
	s := startServer(t, ca, "cloud-1", func(c *ServerConfig) { c.Servers = func() int { return 1 } })
	a := startAgent(t, ca, "edge-1", []string{s.addr}, func(c *AgentConfig) { c.Tunnels = 3 })
	eventually(t, "the tunnel is up", func() bool { return active(s) == 1 })
	eventually(t, "the others have looked", func() bool { return s.Stats().Refused["already_connected"] >= 2 })
	before := s.Tunnels()[0].Since
	time.Sleep(time.Second)
	if st := a.Stats(); st.Tunnels != 1 || st.Failures != 0 {
		t.Errorf("%+v", st)
	}
	if n := s.Stats().Refused["already_connected"]; n > 40 {
		t.Errorf("looked %d times", n)
	}
	if info := s.Tunnels(); len(info) != 1 || info[0].Since != before {
		t.Errorf("%+v", info)
	}
}

// A server id that comes back while we still have a tunnel to it: the old one is put to the question.
func TestTwinIsNotKept(t *testing.T) {
	ca := newPKI(t)
	s1, s2 := startServer(t, ca, "same", nil), startServer(t, ca, "same", nil)
	b := startBalancer(t, s1.addr, s2.addr)
	a := startAgent(t, ca, "edge-1", []string{b.addr}, nil)
	eventually(t, "one tunnel", func() bool { return active(s1)+active(s2) >= 1 })
	eventually(t, "both were tried", func() bool { return a.Stats().Dials >= 4 })
	if n := a.Stats().Tunnels; n != 1 {
		t.Errorf("%d tunnels to one server id", n)
	}
}

func TestReconnects(t *testing.T) {
	ca := newPKI(t)
	ln := must(net.Listen("tcp", "127.0.0.1:0"))
	addr := ln.Addr().String()
	ln.Close()
	a := startAgent(t, ca, "edge-1", []string{addr}, func(c *AgentConfig) { c.Tunnels = 1 })
	eventually(t, "it has tried", func() bool { return a.Stats().Failures >= 2 })
	auth := &authorizer{}
	for range 3 {
		srv := must(NewServer(ServerConfig{ID: "cloud-1", TLS: ca.server(t, "cloud-1"), Authorize: auth.authorize}))
		ln := must(net.Listen("tcp", addr))
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error)
		go func() { done <- srv.Serve(ctx, ln) }()
		eventually(t, "it comes back", func() bool { return srv.Stats().Active == 1 })
		if err := roundTrip(srv, "edge-1", "x"); err != nil {
			t.Error(err)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func TestSurvivesBadNames(t *testing.T) {
	ca := newPKI(t)
	var dials atomic.Int64
	s := startServer(t, ca, "cloud-1", nil)
	a := startAgent(t, ca, "edge-1", []string{"server.invalid:10262"}, func(c *AgentConfig) {
		c.Tunnels = 1
		c.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
			if dials.Add(1) < 4 {
				return nil, &net.DNSError{Err: "no such host", Name: address, IsNotFound: true}
			}
			return net.Dial(network, s.addr)
		}
		cfg := ca.client(t, "edge-1", time.Hour)
		cfg.ServerName = "server"
		c.TLS = func(string) *tls.Config { return cfg }
	})
	eventually(t, "the name is found in the end", func() bool { return active(s) == 1 })
	if st := a.Stats(); st.Failures != 3 {
		t.Errorf("%+v", st)
	}
}

func TestWakeRedialsAtOnce(t *testing.T) {
	ca := newPKI(t)
	s := startServer(t, ca, "cloud-1", nil)
	var stuck atomic.Bool
	var dials atomic.Int64
	a := startAgent(t, ca, "edge-1", []string{"192.0.2.1:1"}, func(c *AgentConfig) {
		c.Tunnels = 1
		c.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
			if dials.Add(1) == 1 {
				stuck.Store(true)
				<-ctx.Done() // a dial into nowhere
				return nil, ctx.Err()
			}
			return net.Dial(network, s.addr)
		}
		cfg := ca.client(t, "edge-1", time.Hour)
		c.TLS = func(string) *tls.Config { return cfg }
	})
	eventually(t, "the dial hangs", stuck.Load)
	start := time.Now()
	a.wake <- struct{}{}
	eventually(t, "the tunnel is up", func() bool { return active(s) == 1 })
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("after %v", d)
	}
}

// TestOnlyOneDialsWithoutATunnel counts on nobody looking for a further server before there is a first one.
func TestOnlyOneDialsWithoutATunnel(t *testing.T) {
	ca := newPKI(t)
	s := startServer(t, ca, "cloud-1", nil)
	var down atomic.Bool
	down.Store(true)
	a := startAgent(t, ca, "edge-1", []string{s.addr}, func(c *AgentConfig) {
		c.Tunnels = 3
		c.Dial = func(_ context.Context, network, address string) (net.Conn, error) {
			if down.Load() {
				return nil, syscall.ECONNREFUSED
			}
			return net.Dial(network, address)
		}
	})
	eventually(t, "it tries", func() bool { return a.Stats().Dials >= 5 })
	if infos := a.Tunnels(); infos[0].LastError == nil || infos[1].LastError != nil || infos[2].LastError != nil {
		t.Errorf("%+v", infos)
	}
	down.Store(false)
	eventually(t, "the others look", func() bool { return s.Stats().Refused["already_connected"] >= 2 })
}

// TestNoLongPauseWithoutATunnel is about a server that says "already connected" because it has not noticed yet that the other tunnel is dead.
func TestNoLongPauseWithoutATunnel(t *testing.T) {
	ca := newPKI(t)
	cfg := ca.client(t, "edge-1", time.Hour)
	a := must(NewAgent(AgentConfig{Servers: []string{"localhost:1"}, Handle: echo, TLS: func(string) *tls.Config { return cfg }}))
	retry, duplicate := pause{first: time.Millisecond, limit: time.Millisecond}, pause{first: 1000 * time.Hour, limit: 1000 * time.Hour}
	if d, _ := a.pauseAfter(&LoginError{Status: wire.LoginAlreadyConnected}, &retry, &duplicate, false); d > time.Millisecond {
		t.Errorf("a pause of %v", d)
	}
}

func TestWakeEndsAPause(t *testing.T) {
	ca := newPKI(t)
	ln := must(net.Listen("tcp", "127.0.0.1:0"))
	addr := ln.Addr().String()
	ln.Close()
	wake := make(chan struct{}, 1)
	cfg := ca.client(t, "edge-1", time.Hour)
	a := must(NewAgent(AgentConfig{Servers: []string{addr}, Tunnels: 1, Wake: wake, Handle: echo, TLS: func(string) *tls.Config { return cfg }}))
	a.time.retry = pause{first: 10 * time.Hour, limit: 10 * time.Hour}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- a.Run(ctx) }()
	defer func() { cancel(); <-done }()
	eventually(t, "it waits", func() bool { return a.Tunnels()[0].State == "waiting" })
	if a.Tunnels()[0].LastError == nil {
		t.Error("no error is shown")
	}
	wake <- struct{}{}
	eventually(t, "it has dialed again", func() bool { return a.Stats().Dials == 2 })
}

func TestBlackHoleIsNoticed(t *testing.T) {
	for _, bulk := range []bool{false, true} {
		ca := newPKI(t)
		// So 2 s stand for the 20 s of production.
		s := startServer(t, ca, "cloud-1", func(c *ServerConfig) { c.KeepAlive = time.Second })
		b := startBalancer(t, s.addr)
		lost := make(chan error, 1)
		a := startAgent(t, ca, "edge-1", []string{b.addr}, func(c *AgentConfig) {
			c.Tunnels = 1
			c.Handle = func(_ context.Context, st *Stream, _ wire.Header) {
				if bulk {
					go func() { _, _ = st.Write(make([]byte, 1<<30)) }()
				}
				_, err := io.Copy(io.Discard, st)
				lost <- err
			}
		})
		eventually(t, "the tunnel is up", func() bool { return active(s) == 1 })
		st := must(s.Open(context.Background(), "edge-1"))
		if err := wire.WriteHeader(st, testHeader); err != nil {
			t.Fatal(err)
		}
		time.Sleep(1200 * time.Millisecond) // a busy link is not taken for a dead one
		if active(s) != 1 || a.Stats().Tunnels != 1 {
			t.Fatal("a live link was given up")
		}
		eventually(t, "agent has the stream", func() bool { return a.Stats().Handlers == 1 })
		b.black.Store(true)
		start := time.Now()
		if bulk {
			go func() { _, _ = st.Write(make([]byte, 1<<30)) }()
		}
		_, err := io.Copy(io.Discard, st)
		if !errors.Is(err, syscall.ECONNRESET) || reasonOf(err, "") != "tunnel_lost" {
			t.Errorf("server: %v", err)
		}
		if err := <-lost; !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("agent: %v", err)
		}
		if d := time.Since(start); d > 4*time.Second {
			t.Errorf("noticed after %v", d)
		}
		st.Close()
		b.black.Store(false)
		a.stop()
		s.stop()
	}
}

func TestWakeQuestionsLiveTunnels(t *testing.T) {
	ca := newPKI(t)
	s := startServer(t, ca, "cloud-1", nil)
	b := startBalancer(t, s.addr)
	a := startAgent(t, ca, "edge-1", []string{b.addr}, func(c *AgentConfig) { c.Tunnels = 1 })
	eventually(t, "up", func() bool { return active(s) == 1 && a.Stats().Tunnels == 1 })
	a.wake <- struct{}{}
	time.Sleep(500 * time.Millisecond)
	if a.Stats().Tunnels != 1 || a.Stats().Dials != 1 {
		t.Fatal("a live tunnel was given up")
	}
	b.black.Store(true)
	start := time.Now()
	a.wake <- struct{}{}
	eventually(t, "given up", func() bool { return a.Stats().Tunnels == 0 })
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("after %v", d)
	}
}

func TestDrainMovesAgents(t *testing.T) {
	ca := newPKI(t)
	s1, s2 := startServer(t, ca, "cloud-1", nil), startServer(t, ca, "cloud-2", nil)
	for _, mode := range []string{"several addresses", "one address"} {
		t.Run(mode, func(t *testing.T) {
			if mode == "one address" {
				s1 = startServer(t, ca, "cloud-3", nil)
			}
			servers := []string{s1.addr, s2.addr}
			if mode == "one address" {
				b := startBalancer(t, s1.addr, s2.addr)
				servers = []string{b.addr}
			}
			a := startAgent(t, ca, "edge-1", servers, func(c *AgentConfig) { c.Tunnels = 2 })
			eventually(t, "both are up", func() bool { return active(s1) == 1 && active(s2) == 1 })
			st := must(s1.Open(context.Background(), "edge-1"))
			if err := wire.WriteHeader(st, testHeader); err != nil {
				t.Fatal(err)
			}
			mustWrite(t, st, "before")
			mustRead(t, st, "before")
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			defer cancel()
			if err := s1.Drain(ctx); err != nil {
				t.Fatal(err)
			}
			if _, err := s1.Open(context.Background(), "edge-1"); !errors.Is(err, ErrDraining) {
				t.Error(err)
			}
			if err := roundTrip(s2.Server, "edge-1", "elsewhere"); err != nil {
				t.Error(err)
			}
			// The old stream goes on, and when it has ended so has the old tunnel.
			time.Sleep(1200 * time.Millisecond)
			mustWrite(t, st, "after")
			mustRead(t, st, "after")
			if info := s1.Tunnels(); len(info) != 1 || !info[0].Retired {
				t.Errorf("%+v", info)
			}
			if err := st.CloseWrite(); err != nil {
				t.Error(err)
			}
			if _, err := st.Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("end of the old stream: %v", err)
			}
			st.Close()
			eventually(t, "the old tunnel has ended", func() bool { return len(s1.Tunnels()) == 0 })
			if n := a.Stats().Tunnels; n != 1 {
				t.Errorf("%d tunnels", n)
			}
			a.stop()
			eventually(t, "the agent has gone", func() bool { return active(s2) == 0 })
		})
	}
}

func TestDrainOfTheOnlyServer(t *testing.T) {
	ca := newPKI(t)
	s := startServer(t, ca, "cloud-1", nil)
	startAgent(t, ca, "edge-1", []string{s.addr}, nil)
	eventually(t, "up", func() bool { return active(s) == 1 })
	ctx, cancel := context.WithTimeout(context.Background(), 700*time.Millisecond)
	defer cancel()
	done := make(chan error)
	go func() { done <- s.Drain(ctx) }()
	time.Sleep(300 * time.Millisecond)
	if err := roundTrip(s.Server, "edge-1", "still served"); err != nil {
		t.Error(err)
	}
	if err := <-done; !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	if s.Stats().Refused["draining"] == 0 {
		t.Error("nobody tried to move")
	}
}

// An agent logs in again before its certificate ends, with the certificate of that moment, and new tunnel first.
func TestRenewsInTime(t *testing.T) {
	ca := newPKI(t)
	s := startServer(t, ca, "cloud-1", nil)
	var issued atomic.Int64
	startAgent(t, ca, "edge-1", []string{s.addr}, func(c *AgentConfig) {
		c.Tunnels = 1
		c.TLS = func(string) *tls.Config {
			issued.Add(1)
			return ca.client(t, "edge-1", 4*time.Second)
		}
	})
	eventually(t, "up", func() bool { return active(s) == 1 })
	end := time.Now().Add(7 * time.Second)
	for time.Now().Before(end) {
		if err := roundTrip(s.Server, "edge-1", "x"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
	if n := issued.Load(); n < 3 {
		t.Errorf("%d logins", n)
	}
	if got := s.changed(); !slices.Equal(got, []string{"edge-1 true"}) {
		t.Errorf("%v", got)
	}
	if st := s.Stats(); st.Evictions != 0 {
		t.Errorf("%+v", st)
	}
}

func TestRenewOnDemand(t *testing.T) {
	ca := newPKI(t)
	s := startServer(t, ca, "cloud-1", nil)
	var distrust atomic.Bool
	a := startAgent(t, ca, "edge-1", []string{s.addr}, func(c *AgentConfig) {
		c.Tunnels = 1
		c.Verify = func(tls.ConnectionState) error {
			if distrust.Load() {
				return testRefusal{}
			}
			return nil
		}
	})
	eventually(t, "up", func() bool { return active(s) == 1 })
	eventually(t, "known as up", func() bool { return a.Tunnels()[0].State == "connected" })
	st := must(s.Open(context.Background(), "edge-1"))
	a.Renew()
	eventually(t, "logged in again", func() bool { return s.Stats().Logins == 2 })
	if s.Stats().Retired != 1 {
		t.Error("the old tunnel should finish its stream")
	}
	distrust.Store(true)
	a.Renew()
	mustReset(t, st)
	st.Close()
}

func TestSlowHandlerDelaysNobody(t *testing.T) {
	ca := newPKI(t)
	s := startServer(t, ca, "cloud-1", nil)
	release := make(chan struct{})
	free := sync.OnceFunc(func() { close(release) })
	a := startAgent(t, ca, "edge-1", []string{s.addr}, func(c *AgentConfig) {
		c.Handle = func(ctx context.Context, st *Stream, h wire.Header) {
			if h.Trace == 1 {
				<-release
				return
			}
			echo(ctx, st, h)
		}
		c.MaxStreams = 5
	})
	t.Cleanup(free) // before the agent is stopped, which waits
	eventually(t, "up", func() bool { return active(s) == 1 })
	var slow []*Stream
	for range 4 {
		st := must(s.Open(context.Background(), "edge-1"))
		h := testHeader
		h.Trace = 1
		if err := wire.WriteHeader(st, h); err != nil {
			t.Fatal(err)
		}
		slow = append(slow, st)
	}
	for range 10 {
		if err := roundTrip(s.Server, "edge-1", "quick"); err != nil {
			t.Error(err)
		}
		eventually(t, "its handler has ended", func() bool { return a.Stats().Handlers == 4 })
	}
	// A fifth, and then the bound.
	st := must(s.Open(context.Background(), "edge-1"))
	eventually(t, "it is full", func() bool { return a.Stats().Handlers == 5 })
	over := must(s.Open(context.Background(), "edge-1"))
	mustReset(t, over)
	over.Close()
	if a.Stats().Overloaded != 1 {
		t.Errorf("%+v", a.Stats())
	}
	st.Close()
	free()
	for _, st := range slow {
		if _, err := st.Read(make([]byte, 1)); err != io.EOF {
			t.Error(err)
		}
		st.Close()
	}
}

func TestBadHeaderIsAnswered(t *testing.T) {
	ca := newPKI(t)
	s := startServer(t, ca, "cloud-1", nil)
	startAgent(t, ca, "edge-1", []string{s.addr}, nil)
	eventually(t, "up", func() bool { return active(s) == 1 })
	st := must(s.Open(context.Background(), "edge-1"))
	mustWrite(t, st, "this is no header")
	if r, err := wire.ReadReply(st); err != nil || r.Status != wire.StatusBadRequest {
		t.Errorf("%v, %v", r, err)
	}
	st.Close()
}

// Sessions come and go; nothing stays.
func TestNothingIsLeftOfManySessions(t *testing.T) {
	ca := newPKI(t)
	s := startServer(t, ca, "cloud-1", nil)
	round := func(node string) {
		a := startAgent(t, ca, node, []string{s.addr}, nil)
		// Not just any: a login that the last agent had begun may be answered only now.
		eventually(t, "up", func() bool { return s.reg.pick(node) != nil })
		st := must(s.Open(context.Background(), node))
		if err := roundTrip(s.Server, node, "x"); err != nil {
			t.Error(err)
		}
		a.stop()
		mustReset(t, st)
		st.Close()
		eventually(t, "gone", func() bool { return len(s.Tunnels()) == 0 })
	}
	count := func() (goroutines, files int) {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return runtime.NumGoroutine(), len(entries)
	}
	round("edge-0")
	time.Sleep(50 * time.Millisecond)
	g0, f0 := count()
	for i := range 40 {
		round("edge-" + string(rune('a'+i%26)))
	}
	eventually(t, "as before", func() bool {
		g, f := count()
		return g <= g0 && f <= f0
	})
	st := s.Stats()
	if st.StreamsOpened != st.StreamsClosed || st.StreamsOpened != 82 {
		t.Errorf("%+v", st)
	}
}

func TestAgentConfigIsChecked(t *testing.T) {
	for _, c := range []AgentConfig{
		{},
		{Servers: []string{"host"}},
		{Servers: []string{"::1:5"}},
		{Servers: []string{"h:0"}},
		{Servers: []string{"h:1", "h:1"}},
		{Servers: []string{"h:1"}, Tunnels: 99},
	} {
		if c.Servers != nil {
			c.TLS, c.Handle = func(string) *tls.Config { return nil }, echo
		}
		if _, err := NewAgent(c); err == nil {
			t.Errorf("%+v was accepted", c)
		}
	}
}
