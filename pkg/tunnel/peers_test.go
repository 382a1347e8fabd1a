// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"slices"
	"testing"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

// forwardEcho stands for what joins a peer's stream with one to an agent.
func forwardEcho(_ context.Context, peer string, s *Stream, h wire.Header) {
	_ = wire.WriteReply(s, wire.Reply{Message: peer + " wants " + h.Node})
	_, _ = io.Copy(s, s)
}

func startPeerServer(t *testing.T, ca *pki, id string) *testServer {
	t.Helper()
	return startServer(t, ca, id, func(c *ServerConfig) {
		c.TLS.NextProtos = []string{wire.ALPNAgent, wire.ALPNPeer}
		c.Forward = forwardEcho
	})
}

func startPeers(t *testing.T, ca *pki, name string, addrs ...string) *Peers {
	t.Helper()
	p := newPeers(t, ca, name, addrs...)
	runPeers(t, p)
	return p
}

func newPeers(t *testing.T, ca *pki, name string, addrs ...string) *Peers {
	t.Helper()
	config := ca.client(t, name, time.Hour)
	config.NextProtos = []string{wire.ALPNPeer}
	p := NewPeers(PeersConfig{TLS: func(string) *tls.Config { return config }, Software: "test"})
	if err := p.Set(addrs); err != nil {
		t.Fatal(err)
	}
	return p
}

func runPeers(t *testing.T, p *Peers) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func liveAre(p *Peers, want ...string) func() bool {
	return func() bool { return slices.Equal(p.Live(), want) }
}

// A server opens streams in the connection that it dialed, and asks in it for nodes.
func TestPeers(t *testing.T) {
	ca := newPKI(t)
	s := startPeerServer(t, ca, "cloud-1")
	startAgent(t, ca, "edge-1", []string{s.addr}, nil)
	p := startPeers(t, ca, "cloud-2", s.addr)
	eventually(t, "peer is up", liveAre(p, "cloud-1"))
	eventually(t, "agent is up", func() bool { return s.Stats().Active == 1 })
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()

	st, err := p.Open(ctx, "cloud-1")
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	if err := wire.WriteHeader(st, wire.Header{Kind: wire.KindConnect, Dst: mustAddrPort("10.0.0.1:80"), Node: "edge-1"}); err != nil {
		t.Fatal(err)
	}
	if r, err := wire.ReadReply(st); err != nil || r.Status != wire.StatusOK || r.Message != "cloud-2 wants edge-1" {
		t.Errorf("%+v, %v", r, err)
	}
	sent := bytes.Repeat([]byte("hop "), 100_000)
	go func() {
		_, _ = st.Write(sent)
		_ = st.CloseWrite()
	}()
	if got, err := io.ReadAll(st); err != nil || !bytes.Equal(got, sent) {
		t.Errorf("of %d bytes came back %d, %v", len(sent), len(got), err)
	}

	// More than one message, and more than a window, of names.
	asked := []string{"edge-1", "edge-2"}
	for i := range 20_000 {
		asked = append(asked, fmt.Sprintf("a-node-that-is-not-here-%d", i))
	}
	if owned, err := p.Ask(ctx, "cloud-1", asked); err != nil || !slices.Equal(owned, []string{"edge-1"}) {
		t.Errorf("%q, %v", owned, err)
	}
	if owned, err := p.Ask(ctx, "cloud-1", nil); err != nil || len(owned) != 0 {
		t.Errorf("%q, %v", owned, err)
	}
	if _, err := p.Ask(ctx, "cloud-9", asked); err != ErrNoPeer {
		t.Errorf("asked nobody: %v", err)
	}
	past, cancel2 := context.WithCancel(ctx)
	cancel2()
	if _, err := p.Ask(past, "cloud-1", asked); !errors.Is(err, context.Canceled) {
		t.Errorf("asked too late: %v", err)
	}
	s.stopAccepting()
	if owned, err := p.Ask(ctx, "cloud-1", []string{"edge-1"}); err != nil || len(owned) != 0 {
		t.Errorf("of a server that has drained: %q, %v", owned, err)
	}
	if st := s.Stats(); st.Peers != 1 || st.Questions < 400 || st.Active != 1 {
		t.Errorf("%+v", st)
	}
	s.stop()
	eventually(t, "peer is gone", liveAre(p))
	if _, err := p.Open(ctx, "cloud-1"); err != ErrNoPeer {
		t.Errorf("opened a stream to nobody: %v", err)
	}
}

// Addresses come and go while it runs. Of two addresses of one server one is used, and its own is not.
func TestPeersAreSet(t *testing.T) {
	ca := newPKI(t)
	one, two := startPeerServer(t, ca, "cloud-1"), startPeerServer(t, ca, "cloud-2")
	p := startPeers(t, ca, "cloud-1", one.addr)
	eventually(t, "dialed itself", func() bool { return one.Stats().Refused["already_connected"] > 0 })
	set := func(addrs ...string) {
		t.Helper()
		if err := p.Set(addrs); err != nil {
			t.Fatal(err)
		}
	}
	set(one.addr, two.addr)
	eventually(t, "the second is up", liveAre(p, "cloud-2"))
	twice := "localhost" + two.addr[len("127.0.0.1"):]
	set(one.addr, two.addr, twice)
	eventually(t, "dialed twice", func() bool { return two.Stats().Refused["already_connected"] > 0 })
	if st := two.Stats(); st.Peers != 1 || st.Evictions != 0 {
		t.Errorf("%+v", st)
	}
	if n := len(p.Tunnels()); n != 3 {
		t.Errorf("%d are listed", n)
	}
	p.Renew()
	eventually(t, "logged in again", func() bool { return two.Stats().Logins > 1 && len(p.Live()) == 1 })
	set()
	eventually(t, "none is left", func() bool { return len(p.Live()) == 0 && two.Stats().Peers == 0 })
	if p.Set(make([]string, MaxPeers+1)) == nil || p.Set([]string{"nonsense"}) == nil {
		t.Error("a bad list was taken")
	}
}

// A server that comes back is dialed as soon as it has dialed itself, not when the pause is over that has grown meanwhile.
func TestPeerThatIsBack(t *testing.T) {
	ca := newPKI(t)
	back := startPeerServer(t, ca, "cloud-1")
	back.auth.deny("cloud-2", true)
	p := newPeers(t, ca, "cloud-2", back.addr)
	for _, a := range p.agents() {
		a.time.retry = pause{first: 1000 * time.Hour, limit: 1000 * time.Hour}
	}
	runPeers(t, p)
	eventually(t, "refused", func() bool { return p.Tunnels()[0].State == "waiting" })
	back.auth.deny("cloud-2", false)
	s := startServer(t, ca, "cloud-2", func(c *ServerConfig) {
		c.TLS.NextProtos, c.Forward, c.OnPeer = []string{wire.ALPNPeer}, forwardEcho, p.Arrived
	})
	startPeers(t, ca, "cloud-1", s.addr)
	eventually(t, "peer is up", liveAre(p, "cloud-1"))
	p.Arrived("cloud-1")
	if n := back.Stats().Logins; n != 1 {
		t.Errorf("logged in %d times", n)
	}
}

// What is dropped when certificates change includes peers; and one that says it is another is not believed.
func TestPeersAreJudged(t *testing.T) {
	ca := newPKI(t)
	s := startPeerServer(t, ca, "cloud-1")
	p := startPeers(t, ca, "cloud-2", s.addr)
	eventually(t, "peer is up", liveAre(p, "cloud-1"))
	s.auth.deny("cloud-2", true)
	if n := s.Recheck(); n != 1 {
		t.Errorf("%d were dropped", n)
	}
	eventually(t, "peer is gone", liveAre(p))

	liar := startServer(t, ca, "cloud-3", func(c *ServerConfig) {
		c.ID, c.Forward = "cloud-4", forwardEcho
		c.TLS.NextProtos = []string{wire.ALPNPeer}
	})
	if err := p.Set([]string{liar.addr}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "refused", func() bool { return reasonOf(p.Tunnels()[0].LastError, "") == "bad_name" })
}

// What may not come on a peer's connection is answered, and hurts nobody else; and an agent is asked nothing.
func TestPeerStreamsThatAreWrong(t *testing.T) {
	ca := newPKI(t)
	s := startPeerServer(t, ca, "cloud-1")
	startAgent(t, ca, "edge-1", []string{s.addr}, nil)
	p := startPeers(t, ca, "cloud-2", s.addr)
	eventually(t, "both are up", func() bool { return len(p.Live()) == 1 && s.Stats().Active == 1 })
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	byPeer := func() (*Stream, error) { return p.Open(ctx, "cloud-1") }
	byAgent := func() (*Stream, error) { return s.Open(ctx, "edge-1") }
	connect := wire.Header{Kind: wire.KindConnect, Dst: mustAddrPort("10.0.0.1:80")}
	header := func(h wire.Header) []byte {
		b, err := h.AppendBinary(nil)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	query := header(wire.Header{Kind: wire.KindQuery})
	for _, c := range []struct {
		name string
		open func() (*Stream, error)
		say  []byte
		want error // nil: bad_request
	}{
		{"no node", byPeer, header(connect), nil},
		{"a notice", byPeer, header(wire.Header{Kind: wire.KindNotice}), nil},
		{"no header", byPeer, []byte("GET / HTTP/1.1\r\n\r\n"), nil},
		{"a question of an agent", byAgent, query, nil},
		{"a question that is none", byPeer, append(slices.Clone(query), 6, 0, 0, 1, 0), &ResetError{}},
	} {
		st, err := c.open()
		if err != nil {
			t.Fatal(err)
		}
		_, _ = st.Write(c.say)
		r, err := wire.ReadReply(st)
		var reset *ResetError
		if c.want == nil && (err != nil || r.Status != wire.StatusBadRequest) || c.want != nil && !errors.As(err, &reset) {
			t.Errorf("%s: %+v, %v", c.name, r, err)
		}
		_ = st.Reset()
	}
	if owned, err := p.Ask(ctx, "cloud-1", []string{"edge-1"}); err != nil || len(owned) != 1 {
		t.Errorf("afterwards: %q, %v", owned, err)
	}

}
