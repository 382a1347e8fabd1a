// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

// authorizer knows the common name, and whom to refuse.
type authorizer struct {
	mu     sync.Mutex
	denied map[string]bool
}

type testRefusal struct{}

func (testRefusal) Error() string  { return "denied by the test" }
func (testRefusal) Reason() string { return "denied" }

func (a *authorizer) authorize(cs tls.ConnectionState) (Identity, error) {
	leaf := cs.PeerCertificates[0]
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.denied[leaf.Subject.CommonName] {
		return Identity{}, testRefusal{}
	}
	return Identity{Name: leaf.Subject.CommonName, Serial: leaf.SerialNumber.String(), NotAfter: leaf.NotAfter}, nil
}

func (a *authorizer) deny(name string, denied bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.denied == nil {
		a.denied = make(map[string]bool)
	}
	a.denied[name] = denied
}

// testServer is a Server that runs, and what it reported.
type testServer struct {
	*Server
	auth authorizer
	addr string
	stop func()

	mu      sync.Mutex
	changes []string
}

func startServer(t testing.TB, ca *pki, id string, mod func(*ServerConfig)) *testServer {
	t.Helper()
	ts := &testServer{}
	cfg := ServerConfig{
		ID: id, TLS: ca.server(t, id), Authorize: ts.auth.authorize,
		OnChange: func(node string, online bool) {
			ts.mu.Lock()
			defer ts.mu.Unlock()
			ts.changes = append(ts.changes, fmt.Sprint(node, " ", online))
		},
	}
	if mod != nil {
		mod(&cfg)
	}
	s, err := NewServer(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ts.Server = s
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ts.addr = ln.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, ln) }()
	ts.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	t.Cleanup(ts.stop)
	return ts
}

func (ts *testServer) changed() []string {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	return slices.Clone(ts.changes)
}

// testAgent is an Agent that runs; it echoes unless told otherwise.
type testAgent struct {
	*Agent
	stop func()
	wake chan struct{}
}

func startAgent(t testing.TB, ca *pki, node string, servers []string, mod func(*AgentConfig)) *testAgent {
	t.Helper()
	ta := &testAgent{wake: make(chan struct{}, 1)}
	clientTLS := ca.client(t, node, time.Hour)
	cfg := AgentConfig{
		Servers: servers, Software: "test", Wake: ta.wake,
		TLS:    func(string) *tls.Config { return clientTLS },
		Handle: echo,
	}
	if mod != nil {
		mod(&cfg)
	}
	a, err := NewAgent(cfg)
	if err != nil {
		t.Fatal(err)
	}
	a.time.retry = pause{first: 20 * time.Millisecond, limit: 200 * time.Millisecond}
	a.time.duplicate = pause{first: 20 * time.Millisecond, limit: 200 * time.Millisecond}
	a.time.wakeEvery = 10 * time.Millisecond
	a.time.way, a.time.move = 200*time.Millisecond, 50*time.Millisecond
	a.time.probe = 300 * time.Millisecond
	ta.Agent = a
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	ta.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(ta.stop)
	return ta
}

func echo(_ context.Context, s *Stream, _ wire.Header) {
	if _, err := io.Copy(struct{ io.Writer }{s}, struct{ io.Reader }{s}); err == nil {
		_ = s.CloseWrite()
	}
}

var testHeader = wire.Header{Kind: wire.KindConnect, Dst: mustAddrPort("192.0.2.1:10250")}

// roundTrip opens a stream, and gets text back from an echo.
func roundTrip(s *Server, node, text string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	st, err := s.Open(ctx, node)
	if err != nil {
		return err
	}
	defer st.Close()
	if err := wire.WriteHeader(st, testHeader); err != nil {
		return err
	}
	if _, err := st.Write([]byte(text)); err != nil {
		return err
	}
	if err := st.CloseWrite(); err != nil {
		return err
	}
	got, err := io.ReadAll(st)
	if err == nil && string(got) != text {
		err = fmt.Errorf("echo was %q", got)
	}
	return err
}

func active(s *testServer) int { return s.Stats().Active }

func TestLoginAndEcho(t *testing.T) {
	ca := newPKI(t)
	s := startServer(t, ca, "cloud-1", nil)
	if _, err := s.Open(context.Background(), "edge-1"); !errors.Is(err, ErrNoTunnel) {
		t.Fatalf("without a tunnel: %v", err)
	}
	a := startAgent(t, ca, "edge-1", []string{s.addr}, nil)
	eventually(t, "the tunnel is up", func() bool { return active(s) == 1 })
	var wg sync.WaitGroup
	for i := range 350 {
		wg.Go(func() {
			if err := roundTrip(s.Server, "edge-1", fmt.Sprint("hello ", i)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	eventually(t, "the round trip was measured", func() bool { return s.Tunnels()[0].RTT > 0 })
	info := s.Tunnels()
	if len(info) != 1 || info[0].Node != "edge-1" || info[0].Software != "test" || info[0].BytesIn == 0 || info[0].Streams != 0 || info[0].Retired {
		t.Errorf("%+v", info)
	}
	eventually(t, "both ends have closed what they opened", func() bool {
		ss, as := s.Stats(), a.Stats()
		return ss.StreamsOpened == 350 && ss.StreamsClosed == 350 && as.StreamsOpened == 350 && as.StreamsClosed == 350
	})
	// Which of the two slots wins is a matter of luck; the other waits for another server.
	if ai := a.Tunnels(); !slices.ContainsFunc(ai, func(i AgentInfo) bool { return i.State == "connected" && i.ServerID == "cloud-1" }) {
		t.Errorf("%+v", ai)
	}
	a.stop()
	eventually(t, "node is offline", func() bool { return active(s) == 0 })
	eventually(t, "changes were reported", func() bool {
		return slices.Equal(s.changed(), []string{"edge-1 true", "edge-1 false"})
	})
	if _, err := s.Open(context.Background(), "edge-1"); !errors.Is(err, ErrNoTunnel) {
		t.Errorf("after the tunnel: %v", err)
	}
}

// login speaks the protocol by hand, up to the reply.
func login(t testing.TB, addr string, cfg *tls.Config, l wire.Login) (*tls.Conn, wire.LoginReply, error) {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		return nil, wire.LoginReply{}, err
	}
	t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	tc := tls.Client(conn, cfg)
	if err := wire.WriteLogin(tc, l); err != nil {
		return nil, wire.LoginReply{}, err
	}
	r, err := wire.ReadLoginReply(tc)
	return tc, r, err
}

func instance(b byte) wire.Login {
	return wire.Login{MinVersion: 1, MaxVersion: 1, Instance: [16]byte{b}}
}

func TestRefusals(t *testing.T) {
	ca, stranger := newPKI(t), newPKI(t)
	told := make(chan string, 100)
	s := startServer(t, ca, "cloud-1", func(c *ServerConfig) {
		c.Limits.HandshakeTimeout = 300 * time.Millisecond
		c.OnRefused = func(node, reason string) { told <- node + " " + reason }
		c.OnLogin = func(id Identity) error {
			if id.Name == "unwelcome" {
				return testRefusal{}
			}
			return nil
		}
		c.TLS.NextProtos = []string{wire.ALPNAgent, wire.ALPNPeer}
		c.TLS.ClientAuth = tls.RequireAndVerifyClientCert
	})
	s.auth.deny("denied-node", true)
	raw := func(b []byte, wait bool) {
		c, err := net.Dial("tcp", s.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_, _ = c.Write(b)
		if wait {
			_, _ = io.Copy(io.Discard, c)
		}
	}
	with := func(node string, mod func(*tls.Config)) func() {
		return func() {
			cfg := ca.client(t, node, time.Hour)
			if mod != nil {
				mod(cfg)
			}
			_, _, _ = login(t, s.addr, cfg, instance(1))
		}
	}
	for _, c := range []struct {
		reason string
		do     func()
	}{
		{"timeout", func() { raw(nil, true) }},
		{"timeout", func() { raw([]byte{22, 3, 1}, true) }},
		{"not_tls", func() { raw([]byte("GET / HTTP/1.1\r\n\r\n"), true) }},
		{"aborted", func() { raw([]byte{22, 3, 1}, false) }},
		{"no_protocol", with("edge-1", func(c *tls.Config) { c.NextProtos = nil })},
		{"no_protocol", with("edge-1", func(c *tls.Config) { c.NextProtos = []string{"h2"} })},
		{"peer_protocol", with("edge-1", func(c *tls.Config) { c.NextProtos = []string{wire.ALPNPeer} })},
		{"bad_certificate", with("edge-1", func(c *tls.Config) { c.Certificates = stranger.client(t, "edge-1", time.Hour).Certificates })},
		{"handshake_failed", with("edge-1", func(c *tls.Config) { c.Certificates = nil })},
		{"refused_by_client", with("edge-1", func(c *tls.Config) { c.RootCAs = stranger.pool })},
		{"denied", with("denied-node", nil)},
		{"denied", with("unwelcome", nil)},
		{"bad_certificate", func() { _, _, _ = login(t, s.addr, ca.client(t, "edge-1", -time.Minute), instance(1)) }},
		{"version_unsupported", func() {
			_, r, err := login(t, s.addr, ca.client(t, "edge-1", time.Hour), wire.Login{MinVersion: 7, MaxVersion: 9})
			if err != nil || r.Status != wire.LoginVersionUnsupported {
				t.Errorf("%v, %v", r.Status, err)
			}
		}},
		{"timeout", func() { // logs in never
			conn := tls.Client(must(net.Dial("tcp", s.addr)), ca.client(t, "edge-1", time.Hour))
			defer conn.Close()
			_ = conn.Handshake()
			_, _ = io.Copy(io.Discard, conn)
		}},
		{"bad_request", func() {
			conn := tls.Client(must(net.Dial("tcp", s.addr)), ca.client(t, "edge-1", time.Hour))
			defer conn.Close()
			_, _ = conn.Write([]byte("not a login at all"))
			if r, err := wire.ReadLoginReply(conn); err != nil || r.Status != wire.LoginBadRequest {
				t.Errorf("%v, %v", r.Status, err)
			}
		}},
	} {
		before := s.Stats().Refused
		c.do()
		eventually(t, c.reason, func() bool { return s.Stats().Refused[c.reason] == before[c.reason]+1 })
		for reason, n := range s.Stats().Refused {
			if reason != c.reason && n != before[reason] {
				t.Errorf("wanted %s, counted %s", c.reason, reason)
			}
		}
	}
	for _, want := range []string{"unwelcome denied", "edge-1 version_unsupported", "edge-1 bad_request"} {
		select {
		case got := <-told:
			if got != want {
				t.Errorf("told %q, want %q", got, want)
			}
		case <-time.After(10 * time.Second):
			t.Errorf("not told: %s", want)
		}
	}
	probes := s.Stats().Probes
	raw(nil, false)
	eventually(t, "a health probe is none of them", func() bool { return s.Stats().Probes == probes+1 })
	if st := s.Stats(); st.Logins != 0 || st.Active != 0 {
		t.Errorf("%+v", st)
	}
	eventually(t, "nothing is pending", func() bool { return s.Stats().Pending == 0 })
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// 10,000 connections that never get anywhere, of three kinds, more than the gate holds, and always new ones: an agent
// gets in.
func TestAgentGetsInThroughAFlood(t *testing.T) {
	ca := newPKI(t)
	s := startServer(t, ca, "cloud-1", func(c *ServerConfig) {
		c.Limits.MaxPending = 512
		c.Limits.HandshakeTimeout = time.Minute
		c.Limits.AcceptRate = 1e6
	})
	const held = 6000
	stop := make(chan struct{})
	var opened atomic.Int64
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			conns := make([]net.Conn, held/4)
			defer func() {
				for _, c := range conns {
					if c != nil {
						c.Close()
					}
				}
			}()
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				c, err := net.Dial("tcp", s.addr)
				if err != nil {
					time.Sleep(time.Millisecond)
					continue
				}
				_ = c.(*net.TCPConn).SetLinger(0)
				switch i % 3 {
				case 1:
					_, _ = c.Write([]byte{22})
				case 2:
					_, _ = c.Write([]byte{22, 3, 1, 1, 0, 1})
				}
				if old := conns[i%len(conns)]; old != nil {
					old.Close()
				}
				conns[i%len(conns)] = c
				opened.Add(1)
			}
		})
	}
	defer wg.Wait()
	defer close(stop)
	eventually(t, "the flood is there", func() bool { return opened.Load() > 2000 })
	startAgent(t, ca, "edge-1", []string{s.addr}, nil)
	eventually(t, "a real agent gets in", func() bool { return active(s) == 1 })
	if err := roundTrip(s.Server, "edge-1", "x"); err != nil {
		t.Error(err)
	}
	end := time.Now().Add(30 * time.Second)
	for opened.Load() < 10_000 && time.Now().Before(end) {
		if n := s.Stats().Pending; n > 512 {
			t.Fatalf("%d pending", n)
		}
		time.Sleep(10 * time.Millisecond)
	}
	st := s.Stats()
	if st.Refused["dropped"] == 0 || opened.Load() < 10_000 {
		t.Errorf("%d opened, %+v", opened.Load(), st)
	}
	if err := roundTrip(s.Server, "edge-1", "x"); err != nil {
		t.Error(err)
	}
}

func TestEvictionAndDuplicateIdentity(t *testing.T) {
	ca := newPKI(t)
	s := startServer(t, ca, "cloud-1", nil)
	cfg := ca.client(t, "edge-1", time.Hour)
	in := func(l wire.Login) (*tls.Conn, wire.LoginReply) {
		t.Helper()
		c, r, err := login(t, s.addr, cfg, l)
		if err != nil {
			t.Fatal(err)
		}
		return c, r
	}
	gone := func(c *tls.Conn) {
		t.Helper()
		if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error("tunnel was not closed")
		}
	}
	a1, r := in(instance(1))
	if r.Status != wire.LoginOK || r.ServerID != "cloud-1" {
		t.Fatalf("%+v", r)
	}
	// Another connection of the same instance.
	other := instance(1)
	other.Index = 1
	if _, r := in(other); r.Status != wire.LoginAlreadyConnected {
		t.Errorf("second index: %v", r.Status)
	}
	// The same one again replaces, without closing the old one.
	a2, r := in(instance(1))
	if r.Status != wire.LoginOK {
		t.Errorf("same index: %v", r.Status)
	}
	if st := s.Stats(); st.Active != 1 || st.Retired != 1 || st.Evictions != 0 {
		t.Errorf("%+v", st)
	}
	// Another instance evicts all of it at once.
	b1, r := in(instance(2))
	if r.Status != wire.LoginOK {
		t.Errorf("other instance: %v", r.Status)
	}
	gone(a1)
	gone(a2)
	if s.Tunnels()[0].Duplicate {
		t.Error("one eviction is no duplicate")
	}
	_, _ = in(instance(1))
	gone(b1)
	c1, _ := in(instance(2)) // the third
	defer c1.Close()
	if st := s.Stats(); st.Evictions != 3 || st.Duplicates != 1 {
		t.Errorf("%+v", st)
	}
	if _, r = in(instance(1)); r.Status != wire.LoginDuplicateIdentity || r.RetryAfter < wire.DuplicateWait {
		t.Errorf("the evicted instance: %+v", r)
	}
	eventually(t, "the duplicate is shown", func() bool { ts := s.Tunnels(); return len(ts) == 1 && ts[0].Duplicate })
	// Nobody else is kept out, and when the other is gone, nobody is.
	s.Forget("edge-1")
	gone(c1)
	eventually(t, "forgotten", func() bool { return active(s) == 0 })
	if _, r = in(instance(1)); r.Status != wire.LoginOK {
		t.Errorf("after the other has gone: %v", r.Status)
	}
	if got := s.changed(); len(got) > 3 || got[0] != "edge-1 true" {
		t.Errorf("%v", got)
	}
}

func TestTwoClonesAreNoStorm(t *testing.T) {
	ca := newPKI(t)
	s := startServer(t, ca, "cloud-1", nil)
	a := startAgent(t, ca, "edge-1", []string{s.addr}, nil)
	b := startAgent(t, ca, "edge-1", []string{s.addr}, nil)
	eventually(t, "the clones are noticed", func() bool { return s.Stats().Duplicates >= 1 })
	eventually(t, "one of them waits", func() bool {
		for _, x := range []*testAgent{a, b} {
			for _, i := range x.Tunnels() {
				if i.State == "waiting" && time.Until(i.RetryAt) > 50*time.Second && reasonOf(i.LastError, "") == "duplicate_identity" {
					return true
				}
			}
		}
		return false
	})
	before := s.Stats()
	time.Sleep(time.Second)
	if after := s.Stats(); after.Evictions > before.Evictions+1 {
		t.Errorf("evictions went on: %d, then %d", before.Evictions, after.Evictions)
	}
	if err := roundTrip(s.Server, "edge-1", "x"); err != nil {
		t.Error(err)
	}
}

func TestLoginRateOfOneCertificate(t *testing.T) {
	ca := newPKI(t)
	s := startServer(t, ca, "cloud-1", nil)
	cfg := ca.client(t, "edge-1", time.Hour)
	for range loginBurst + 5 {
		_, r, err := login(t, s.addr, cfg, instance(1))
		if err != nil {
			t.Fatal(err)
		}
		if r.Status == wire.LoginOverloaded {
			// Others are not concerned.
			if _, r, err := login(t, s.addr, ca.client(t, "edge-2", time.Hour), instance(1)); err != nil || r.Status != wire.LoginOK {
				t.Errorf("%v, %v", r.Status, err)
			}
			return
		}
	}
	t.Error("never overloaded")
}

func TestRecheck(t *testing.T) {
	ca := newPKI(t)
	s := startServer(t, ca, "cloud-1", nil)
	startAgent(t, ca, "edge-1", []string{s.addr}, nil)
	startAgent(t, ca, "edge-2", []string{s.addr}, nil)
	eventually(t, "both are there", func() bool { return active(s) == 2 })
	st, err := s.Open(context.Background(), "edge-1")
	if err != nil {
		t.Fatal(err)
	}
	s.auth.deny("edge-1", true)
	if n := s.Recheck(); n != 1 {
		t.Errorf("dropped %d", n)
	}
	mustReset(t, st)
	st.Close()
	eventually(t, "one is left", func() bool { return active(s) == 1 })
	if err := roundTrip(s.Server, "edge-2", "x"); err != nil {
		t.Error(err)
	}
	if _, err := s.Open(context.Background(), "edge-1"); !errors.Is(err, ErrNoTunnel) {
		t.Error(err)
	}
	s.auth.deny("edge-1", false)
	eventually(t, "it comes back", func() bool { return active(s) == 2 })
}

func TestCertificateEnd(t *testing.T) {
	ca := newPKI(t)
	s := startServer(t, ca, "cloud-1", nil)
	cfg := ca.client(t, "edge-1", 3*time.Second)
	end := cfg.Certificates[0].Leaf.NotAfter
	c, r, err := login(t, s.addr, cfg, instance(1))
	if err != nil || r.Status != wire.LoginOK {
		t.Fatal(r.Status, err)
	}
	// Keep the link alive, so that only the certificate can be the reason.
	go func() {
		for {
			if _, err := c.Write(header{typ: typePing, flags: flagACK}.appendTo(nil)); err != nil {
				return
			}
			time.Sleep(100 * time.Millisecond)
		}
	}()
	if info := s.Tunnels(); len(info) != 1 {
		t.Fatal(info)
	}
	_, _ = io.Copy(io.Discard, c)
	if time.Now().Before(end) {
		t.Error("ended before the certificate")
	}
	eventually(t, "offline", func() bool { return active(s) == 0 })
}

func TestOpenIsBounded(t *testing.T) {
	ca := newPKI(t)
	s := startServer(t, ca, "cloud-1", func(c *ServerConfig) {
		c.Limits.MaxStreams = 600
		c.KeepAlive = time.Second
	})
	// An agent that answers nothing: opens pile up to the bound, then wait for ctx only.
	_, r, err := login(t, s.addr, ca.client(t, "edge-1", time.Hour), instance(1))
	if err != nil || r.Status != wire.LoginOK {
		t.Fatal(r.Status, err)
	}
	var streams []*Stream
	for {
		ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
		st, err := s.Open(ctx, "edge-1")
		cancel()
		if err != nil {
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Fatal(err)
			}
			break
		}
		streams = append(streams, st)
	}
	if len(streams) != maxOpens {
		t.Errorf("%d opened", len(streams))
	}
	// It is dead, too: nothing comes from it. That ends what waits.
	if _, err := s.Open(context.Background(), "edge-1"); !errors.Is(err, ErrNoTunnel) {
		t.Errorf("open on a dying tunnel: %v", err)
	}
	for _, st := range streams {
		mustReset(t, st)
		st.Close()
	}
}

func TestMaxStreams(t *testing.T) {
	ca := newPKI(t)
	s := startServer(t, ca, "cloud-1", func(c *ServerConfig) { c.Limits.MaxStreams = 3 })
	startAgent(t, ca, "edge-1", []string{s.addr}, nil)
	eventually(t, "up", func() bool { return active(s) == 1 })
	var open []*Stream
	for range 3 {
		open = append(open, must(s.Open(context.Background(), "edge-1")))
	}
	if _, err := s.Open(context.Background(), "edge-1"); !errors.Is(err, ErrOverloaded) {
		t.Error(err)
	}
	open[0].Reset()
	open[0] = must(s.Open(context.Background(), "edge-1"))
	for _, st := range open {
		st.Reset()
	}
}

func TestServerEndsAllOfIt(t *testing.T) {
	ca := newPKI(t)
	s := startServer(t, ca, "cloud-1", nil)
	startAgent(t, ca, "edge-1", []string{s.addr}, nil)
	eventually(t, "up", func() bool { return active(s) == 1 })
	idle := must(net.Dial("tcp", s.addr))
	defer idle.Close()
	half := tls.Client(must(net.Dial("tcp", s.addr)), ca.client(t, "edge-2", time.Hour))
	defer half.Close()
	if err := half.Handshake(); err != nil {
		t.Fatal(err)
	}
	st := must(s.Open(context.Background(), "edge-1"))
	start := time.Now()
	s.stop() // checks that Serve returns nil; goleak, that nothing is left
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("took %v", d)
	}
	mustReset(t, st)
	st.Close()
	if _, err := s.Open(context.Background(), "edge-1"); !errors.Is(err, ErrDraining) {
		t.Error(err)
	}
	if err := s.Serve(context.Background()); err == nil {
		t.Error("served twice")
	}
	if got := s.changed(); !slices.Equal(got, []string{"edge-1 true", "edge-1 false"}) {
		t.Errorf("%v", got)
	}
}

func TestServerConfigIsChecked(t *testing.T) {
	_, err := NewServer(ServerConfig{KeepAlive: time.Hour, Limits: Limits{MaxStreams: -1, MaxWindow: 5}})
	for _, want := range []string{"ID", "TLS", "Authorize", "keep-alive", "limits", "window"} {
		if err == nil || !contains(err.Error(), want) {
			t.Errorf("%q is not in %v", want, err)
		}
	}
}

func TestRetiredTunnelsAreBounded(t *testing.T) {
	ca := newPKI(t)
	s := startServer(t, ca, "cloud-1", nil)
	cfg := ca.client(t, "edge-1", time.Hour)
	for range maxRetired + 4 {
		c, r, err := login(t, s.addr, cfg, instance(1))
		if err != nil || r.Status != wire.LoginOK {
			t.Fatal(r.Status, err)
		}
		if _, err := c.Write(header{typ: typeGoAway}.appendTo(nil)); err != nil {
			t.Fatal(err)
		}
		eventually(t, "retired", func() bool { return active(s) == 0 })
	}
	eventually(t, "the oldest have ended", func() bool { return s.Stats().Retired == maxRetired })
}
