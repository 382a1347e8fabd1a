// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"sync"
	"syscall"

	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

// MaxPeers bounds the list of a Peers.
const MaxPeers = 64

// ErrNoPeer says that there is no connection to a server.
var ErrNoPeer error = &Error{reason: "no_tunnel", text: "no connection to this server"}

// PeersConfig is what a Peers needs; the fields are those of AgentConfig.
type PeersConfig struct {
	TLS      func(server string) *tls.Config
	Verify   func(tls.ConnectionState) error
	Software string
	Control  func(network, address string, c syscall.RawConn) error
	Log      *slog.Logger
}

// Peers keeps one connection to each of the other servers, and opens streams in them. It dials as an agent does, one Agent for
// each address, with the same pauses, renewals and pings; only the streams go the other way. Servers are told apart by the names that
// they prove: of two addresses of one server, one is in use, and the server's own address is in use never.
type Peers struct {
	cfg      PeersConfig
	instance [16]byte
	running  sync.WaitGroup

	mu     sync.Mutex // guards what follows
	ctx    context.Context
	nextID uint16
	dialed map[string]*dialedPeer // by address
}

type dialedPeer struct {
	agent *Agent
	stop  context.CancelFunc
}

// NewPeers makes one without any peer.
func NewPeers(cfg PeersConfig) *Peers {
	p := &Peers{cfg: cfg, dialed: make(map[string]*dialedPeer)}
	_, _ = rand.Read(p.instance[:])
	return p
}

// Run keeps the connections until ctx ends, and returns when all goroutines have ended.
func (p *Peers) Run(ctx context.Context) error {
	p.mu.Lock()
	if p.ctx != nil {
		p.mu.Unlock()
		return errors.New("peers run already")
	}
	p.ctx = ctx
	for _, d := range p.dialed {
		p.start(d)
	}
	p.mu.Unlock()
	<-ctx.Done()
	p.mu.Lock()   // no Set is starting anything
	p.mu.Unlock() //nolint:staticcheck // see above
	p.running.Wait()
	return nil
}

// Set says where the peers are: HOST:PORT each. Connections to addresses that stay are left alone; the others' streams are reset.
func (p *Peers) Set(addrs []string) error {
	if len(addrs) > MaxPeers {
		return fmt.Errorf("%d peers are more than %d", len(addrs), MaxPeers)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	added := make(map[string]*dialedPeer)
	for _, addr := range addrs {
		if p.dialed[addr] != nil {
			continue
		}
		a, err := NewAgent(AgentConfig{
			Servers: []string{addr}, Tunnels: 1, TLS: p.cfg.TLS, Verify: p.cfg.Verify, Control: p.cfg.Control, Software: p.cfg.Software,
			Instance: p.instance, Log: p.cfg.Log, MaxStreams: 4096,
			Handle: func(_ context.Context, s *Stream, _ wire.Header) { _ = s.Reset() }, // is not called: the far end opens none
		})
		if err != nil {
			return err
		}
		// With one instance and an index each, a server finds out that two addresses are its own.
		p.nextID++
		a.peer, a.slots[0].index = true, p.nextID
		added[addr] = &dialedPeer{agent: a, stop: func() {}}
	}
	for addr, d := range p.dialed {
		if !slices.Contains(addrs, addr) {
			d.stop()
			delete(p.dialed, addr)
		}
	}
	for addr, d := range added {
		p.dialed[addr] = d
		if p.ctx != nil {
			p.start(d)
		}
	}
	return nil
}

// start runs an agent. Needs mu.
func (p *Peers) start(d *dialedPeer) {
	if p.ctx.Err() != nil {
		return
	}
	ctx, stop := context.WithCancel(p.ctx)
	d.stop = stop
	p.running.Go(func() {
		defer stop()
		_ = d.agent.Run(ctx) // an error is that it runs already
	})
}

func (p *Peers) agents() []*Agent {
	p.mu.Lock()
	defer p.mu.Unlock()
	list := make([]*Agent, 0, len(p.dialed))
	for _, d := range p.dialed {
		list = append(list, d.agent)
	}
	return list
}

// Renew judges the peers again, and logs in again; see Agent.Renew.
func (p *Peers) Renew() {
	for _, a := range p.agents() {
		a.Renew()
	}
}

// Arrived notes that a server is there, because it has logged in here: if there is no connection to it, all that wait to dial dial now.
func (p *Peers) Arrived(server string) {
	if p.live()[server] != nil {
		return
	}
	for _, a := range p.agents() {
		a.wakes.send()
	}
}

// live returns the connections that take streams, by the names of the servers.
func (p *Peers) live() map[string]*session {
	found := make(map[string]*session)
	for _, a := range p.agents() {
		a.mu.Lock()
		for t := range a.tunnels {
			if !t.retired && t.sess.link.alive() {
				found[t.serverID] = t.sess
			}
		}
		a.mu.Unlock()
	}
	return found
}

// Live returns the names of the servers that can be asked.
func (p *Peers) Live() []string {
	live := p.live()
	names := make([]string, 0, len(live))
	for name := range live {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// Open opens a stream to a server. When it fails, the server has seen nothing.
func (p *Peers) Open(ctx context.Context, server string) (*Stream, error) {
	sess := p.live()[server]
	if sess == nil {
		return nil, ErrNoPeer
	}
	st, err := sess.open(ctx)
	if err != nil && !errors.Is(err, ErrOverloaded) && ctx.Err() == nil {
		return nil, ErrNoPeer
	}
	return st, err
}

// Ask asks a server which of these nodes it has a tunnel of.
func (p *Peers) Ask(ctx context.Context, server string, nodes []string) ([]string, error) {
	st, err := p.Open(ctx, server)
	if err != nil {
		return nil, err
	}
	defer st.Reset()
	stop := context.AfterFunc(ctx, func() { _ = st.Reset() })
	defer stop()

	lists := wire.SplitNames(nodes)
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { // beside the answers, or both ends could wait for each other
		err := wire.WriteHeader(st, wire.Header{Kind: wire.KindQuery})
		for _, list := range lists {
			if err == nil {
				err = wire.WriteNames(st, list)
			}
		}
		if err == nil {
			err = st.CloseWrite()
		}
		if err != nil {
			_ = st.Reset()
		}
	})
	var owned []string
	for range lists {
		answer, err := wire.ReadNames(st)
		if err != nil {
			_ = st.Reset()
			return nil, contextError(ctx, err)
		}
		owned = append(owned, answer...)
	}
	if _, err := st.Read(make([]byte, 1)); err != io.EOF {
		_ = st.Reset()
		return nil, contextError(ctx, errors.New("the server answered more than it was asked"))
	}
	return owned, nil
}

// Tunnels describes the connections, in the order of their addresses.
func (p *Peers) Tunnels() []AgentInfo {
	var infos []AgentInfo
	for _, a := range p.agents() {
		infos = append(infos, a.Tunnels()...)
	}
	slices.SortStableFunc(infos, func(a, b AgentInfo) int {
		switch {
		case a.Server < b.Server:
			return -1
		case a.Server > b.Server:
			return 1
		}
		return 0
	})
	return infos
}
