// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/time/rate"

	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

// Identity is who an agent has proven to be.
type Identity struct {
	Name     string // node name
	Addrs    []netip.Addr
	Serial   string
	NotAfter time.Time // the tunnel ends then; zero: never
}

// Limits bound what connections can cost. Zero values stand for the defaults.
type Limits struct {
	HandshakeTimeout time.Duration // from accept to login, default 10 s
	MaxPending       int           // connections that have not logged in, default 4096
	AcceptRate       float64       // connections a second, default 2000
	MaxStreams       int           // open streams per tunnel, default 4096
	MaxWindow        int           // bytes on the way to us per stream, default 8 MiB, at least 256 KiB
	Budget           int           // bytes per tunnel, by which its windows may exceed 256 KiB each, default 32 MiB
	AllWindows       int           // the same for all tunnels together, default 512 MiB
}

// ServerConfig is what a Server needs.
type ServerConfig struct {
	ID  string      // name of this server, unique among the servers
	TLS *tls.Config // asks for and verifies client certificates; its refusals may have a Reason() string

	// Authorize says who the other end of a verified connection is, and whether it is welcome. It is called at login and by
	// Recheck, with the same state, from several goroutines.
	Authorize func(tls.ConnectionState) (Identity, error)

	// OnLogin, if set, is called before a login is accepted and can refuse it. From several goroutines.
	OnLogin func(Identity) error

	// OnRefused, if set, is told why the login of an agent was refused whose certificate is good. From several goroutines.
	OnRefused func(node, reason string)

	// OnChange, if set, is called when a node gets its first active tunnel or loses its last. Calls are serial and in
	// order for each node; a node that came and went meanwhile may be left out.
	OnChange func(node string, online bool)

	// Forward, if set, serves a stream of another server, whose header names a node: it opens one with Open, which knows tunnels of
	// this server only, and joins the two. It runs in a goroutine of its own, and the stream is closed when it returns; ctx ends with
	// Serve's. Without it other servers are refused.
	Forward func(ctx context.Context, peer string, s *Stream, h wire.Header)

	// OnPeer, if set, is called when another server has logged in. From several goroutines.
	OnPeer func(peer string)

	// Servers, if set, returns the number of live servers, for agents behind one address; 0: not known.
	Servers func() int

	KeepAlive time.Duration // longest time between pings, default and maximum wire.KeepAlive
	Limits    Limits
	Log       *slog.Logger
}

// Validate reports everything that is wrong with the configuration.
func (c ServerConfig) Validate() error {
	var errs []error
	bad := func(cond bool, text string) {
		if cond {
			errs = append(errs, errors.New(text))
		}
	}
	bad(c.ID == "" || len(c.ID) > wire.MaxName, "server ID must have 1 to 253 bytes")
	bad(c.TLS == nil, "TLS configuration is missing")
	bad(c.Authorize == nil, "Authorize is missing")
	bad(c.KeepAlive < 0 || c.KeepAlive > wire.KeepAlive, "keep-alive must be between 0 and 10 s")
	l := c.Limits
	bad(l.HandshakeTimeout < 0 || l.MaxPending < 0 || l.AcceptRate < 0 || l.MaxStreams < 0 || l.Budget < 0 || l.AllWindows < 0, "limits must not be negative")
	bad(l.MaxWindow < 0 || l.MaxWindow > 0 && l.MaxWindow < initialWindow || l.MaxWindow > 256<<20, "window must be between 256 KiB and 256 MiB")
	return errors.Join(errs...)
}

func (c ServerConfig) withDefaults() ServerConfig {
	setDefault(&c.KeepAlive, wire.KeepAlive)
	setDefault(&c.Limits.HandshakeTimeout, 10*time.Second)
	setDefault(&c.Limits.MaxPending, 4096)
	setDefault(&c.Limits.AcceptRate, 2000)
	setDefault(&c.Limits.MaxStreams, 4096)
	setDefault(&c.Limits.MaxWindow, 8<<20)
	setDefault(&c.Limits.Budget, 32<<20)
	setDefault(&c.Limits.AllWindows, 512<<20)
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Servers == nil {
		c.Servers = func() int { return 0 }
	}
	return c
}

func setDefault[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}

// Server takes tunnels from agents and opens streams in them.
type Server struct {
	cfg       ServerConfig
	tls       *tls.Config
	gate      *gate
	turnstile *turnstile
	reg       *registry // of agents
	peers     *registry // of servers that dialed this one
	total     counters  // of agents'
	peer      counters  // of servers'

	serving  atomic.Bool
	draining atomic.Bool // no logins
	drained  atomic.Bool // no streams, no connections

	accepted, logins, probes atomic.Uint64
	questions                atomic.Uint64 // by peers

	mu        sync.Mutex // guards what follows
	refused   map[string]uint64
	listeners []net.Listener // open ones
}

// NewServer makes a server. Nothing runs until Serve.
func NewServer(cfg ServerConfig) (*Server, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg = cfg.withDefaults()
	return &Server{
		cfg: cfg, tls: serverTLS(cfg.TLS),
		gate: &gate{max: cfg.Limits.MaxPending}, turnstile: newTurnstile(), reg: newRegistry(), peers: newRegistry(), refused: make(map[string]uint64),
	}, nil
}

// serverTLS adds to cfg what this protocol needs of TLS, and notes the protocols that clients offer.
func serverTLS(cfg *tls.Config) *tls.Config {
	cfg = tightened(cfg)
	theirs := cfg.GetConfigForClient
	cfg.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		if r, ok := hello.Conn.(*raw); ok {
			r.offered = hello.SupportedProtos
		}
		if theirs == nil {
			return nil, nil
		}
		c, err := theirs(hello)
		if c != nil {
			c = tightened(c)
		}
		return c, err
	}
	return cfg
}

// tightened returns a copy of cfg without what would outlive a revocation, and without the small records that TLS starts with
// to speed up web pages.
func tightened(cfg *tls.Config) *tls.Config {
	cfg = cfg.Clone()
	cfg.MinVersion = max(cfg.MinVersion, tls.VersionTLS13)
	cfg.SessionTicketsDisabled = true
	cfg.ClientSessionCache = nil
	cfg.DynamicRecordSizingDisabled = true
	return cfg
}

// Serve takes connections from the listeners, and closes them, until ctx ends or Drain has; the tunnels live until ctx ends. It returns
// when every goroutine and every tunnel has ended; nil unless a listener failed for good. A Server serves once.
func (s *Server) Serve(ctx context.Context, listeners ...net.Listener) error {
	if s.serving.Swap(true) {
		return errors.New("server serves already")
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var (
		wg       sync.WaitGroup // accept loops and connections
		reporter sync.WaitGroup
		limit    = rate.NewLimiter(rate.Limit(s.cfg.Limits.AcceptRate), max(1, int(s.cfg.Limits.AcceptRate)))
		failed   = make(chan error, len(listeners))
	)
	ended := make(chan struct{})
	reporter.Go(func() { s.report(ended) })
	s.mu.Lock()
	s.listeners = listeners
	s.mu.Unlock()
	if s.drained.Load() { // before it was served
		s.stopAccepting()
	}
	for _, ln := range listeners {
		wg.Go(func() {
			if err := s.acceptLoop(ctx, ln, limit, &wg); err != nil {
				failed <- err
			}
		})
	}
	var err error
	select {
	case <-ctx.Done():
	case err = <-failed:
		cancel()
	}
	s.draining.Store(true)
	s.stopAccepting()
	wg.Wait()
	close(ended)
	reporter.Wait()
	return err
}

// stopAccepting closes the listeners for good.
func (s *Server) stopAccepting() {
	s.drained.Store(true)
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, ln := range s.listeners {
		_ = ln.Close()
	}
	s.listeners = nil
}

func (s *Server) acceptLoop(ctx context.Context, ln net.Listener, limit *rate.Limiter, wg *sync.WaitGroup) error {
	pause := time.Duration(0)
	for {
		if limit.Wait(ctx) != nil {
			return nil
		}
		conn, err := ln.Accept()
		switch {
		case err == nil:
			pause = 0
			s.accepted.Add(1)
			wg.Go(func() { s.handle(ctx, conn) })
			continue
		case ctx.Err() != nil, s.drained.Load():
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("accept: %w", err)
		}
		// Out of descriptors or memory, or a connection that is gone already. None of it is for ever.
		s.refuse("accept_failed")
		if errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) {
			s.gate.relieve()
		}
		pause = min(max(2*pause, 5*time.Millisecond), time.Second)
		s.cfg.Log.Warn("cannot accept a tunnel connection", "err", err)
		rest(ctx, pause, nil)
	}
}

// report calls OnChange, until ended is closed and nothing is left to tell.
func (s *Server) report(ended <-chan struct{}) {
	for done := false; ; {
		for {
			name, online, ok := s.reg.nextChange()
			if !ok {
				break
			}
			if s.cfg.OnChange != nil {
				s.cfg.OnChange(name, online)
			}
		}
		if done {
			return
		}
		select {
		case <-s.reg.change:
		case <-ended:
			done = true
		}
	}
}

// errProbe is a connection that ended before its first byte: a health check, not an attack.
var errProbe = errors.New("closed before the first byte")

// handle owns one connection from accept to its end.
func (s *Server) handle(ctx context.Context, conn net.Conn) {
	c := &stranger{raw: newRaw(conn)}
	defer conn.Close()
	stop := context.AfterFunc(ctx, c.raw.abort)
	defer stop()
	s.gate.enter(c)
	tc, id, err := s.authenticate(c)
	if known := s.gate.leave(c); !known {
		if ctx.Err() == nil {
			s.refuse("dropped")
		}
		return
	}
	var t *serverTunnel
	if err == nil {
		t, err = s.login(c.raw, tc, id)
	}
	switch {
	case errors.Is(err, errProbe):
		s.probes.Add(1)
		return
	case err != nil:
		reason := refusalReason(c.raw, err)
		s.refuse(reason)
		var decided interface{ Reason() string } // and not a connection that broke
		if s.cfg.OnRefused != nil && errors.As(err, &decided) && id.Name != "" && tc.ConnectionState().NegotiatedProtocol == wire.ALPNAgent {
			s.cfg.OnRefused(id.Name, reason)
		}
		s.cfg.Log.Debug("refused a tunnel", "remote", conn.RemoteAddr().String(), "node", id.Name, "reason", reason, "err", err)
		return
	}
	s.logins.Add(1)
	if !stop() {
		t.sess.kill(errShutdown)
	}
	s.runTunnel(ctx, t)
}

// authenticate does the TLS handshake. The certificate decides alone. Who waits for his turn has his time again when it comes: it was we who
// were slow.
func (s *Server) authenticate(c *stranger) (*tls.Conn, Identity, error) {
	// Wait for the first byte, and then for a place, before anything is allocated.
	until := time.Now().Add(s.cfg.Limits.HandshakeTimeout)
	_ = c.raw.SetDeadline(until)
	if err := c.raw.awaitFirst(); err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) {
			return nil, Identity{}, errProbe
		}
		return nil, Identity{}, err
	}
	s.gate.move(c, waiting)
	turn := &turn{at: s.turnstile}
	defer turn.leave()
	turn.enter(beginning)
	if c.raw.aborted.Load() || time.Now().After(until) {
		return nil, Identity{}, os.ErrDeadlineExceeded // there is nothing to compute for
	}
	s.gate.move(c, begun)
	_ = c.raw.SetDeadline(time.Now().Add(s.cfg.Limits.HandshakeTimeout))
	c.raw.turn = turn
	tc := tls.Server(c.raw, s.tls)
	err := tc.Handshake()
	c.raw.turn = nil
	if err != nil {
		return nil, Identity{}, err
	}
	state := tc.ConnectionState()
	if p := state.NegotiatedProtocol; p != wire.ALPNAgent && (p != wire.ALPNPeer || s.cfg.Forward == nil) {
		return nil, Identity{}, &Error{reason: protocolReason(state.NegotiatedProtocol), text: "no protocol in common"}
	}
	id, err := s.cfg.Authorize(state)
	turn.leave()
	if err != nil {
		// Take the login off the connection first, or closing it would be a reset that may overtake the answer.
		if _, e := wire.ReadLogin(tc); e == nil {
			_ = wire.WriteLoginReply(tc, wire.LoginReply{Status: wire.LoginDenied, ServerID: s.cfg.ID})
		}
		return tc, id, err
	}
	return tc, id, nil
}

// protocolReason is the reason for refusing an application protocol.
func protocolReason(offered ...string) string {
	if slices.Contains(offered, wire.ALPNPeer) {
		return "peer_protocol"
	}
	return "no_protocol"
}

// refusalReason is the label of a failed handshake or login.
func refusalReason(r *raw, err error) string {
	var (
		ne     net.Error
		record tls.RecordHeaderError
		verify *tls.CertificateVerificationError
	)
	if reason := reasonOf(err, ""); reason != "" {
		return reason
	}
	switch {
	case errors.As(err, &ne) && ne.Timeout():
		return "timeout"
	case r.offered != nil && !slices.Contains(r.offered, wire.ALPNAgent):
		return protocolReason(r.offered...)
	case errors.As(err, &record):
		return "not_tls"
	case errors.As(err, &verify):
		return "bad_certificate"
	case isAlert(err):
		return "refused_by_client"
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return "aborted"
	}
	return "handshake_failed"
}

// isAlert reports whether the other end has sent a TLS alert. The alert has no exported type of its own.
func isAlert(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "remote error"
}

// login reads the login, decides and answers it.
func (s *Server) login(r *raw, tc *tls.Conn, id Identity) (*serverTunnel, error) {
	reply := wire.LoginReply{ServerID: s.cfg.ID, KeepAlive: s.cfg.KeepAlive, Servers: uint16(min(max(s.cfg.Servers(), 0), 1<<16-1))}
	refuse := func(status wire.LoginStatus, after time.Duration, cause error) (*serverTunnel, error) {
		reply.Status, reply.Version, reply.RetryAfter = status, 0, after
		_ = wire.WriteLoginReply(tc, reply)
		return nil, &Error{reason: status.String(), text: "login refused", cause: cause}
	}
	login, err := wire.ReadLogin(tc)
	if err != nil {
		var we *wire.Error
		if errors.As(err, &we) {
			return refuse(wire.LoginBadRequest, 0, err)
		}
		return nil, err
	}
	peer, reg := tc.ConnectionState().NegotiatedProtocol == wire.ALPNPeer, s.reg
	if peer {
		reg = s.peers
	}
	if !reg.knock(id.Name) {
		return refuse(wire.LoginOverloaded, 5*time.Second, nil)
	}
	version, ok := login.Pick(wire.MinVersion, wire.Version)
	if !ok {
		return refuse(wire.LoginVersionUnsupported, time.Minute, nil)
	}
	if s.draining.Load() {
		return refuse(wire.LoginDraining, time.Second, nil)
	}
	if peer && id.Name == s.cfg.ID {
		return refuse(wire.LoginAlreadyConnected, 0, nil) // one list of peers does for all servers
	}
	if s.cfg.OnLogin != nil && !peer {
		if err := s.cfg.OnLogin(id); err != nil {
			return refuse(wire.LoginDenied, 0, err)
		}
	}
	set := settings{keepAlive: s.cfg.KeepAlive, maxStreams: s.cfg.Limits.MaxStreams, maxWindow: s.cfg.Limits.MaxWindow, budget: s.cfg.Limits.Budget, allWindows: s.cfg.Limits.AllWindows}
	log := s.cfg.Log.With("node", id.Name, "remote", r.RemoteAddr().String())
	t := &serverTunnel{
		sess: newSession(tc, r, !peer, set, s.counters(peer), log), reg: reg, id: id, login: login, state: tc.ConnectionState(), moved: make(chan struct{}),
	}
	t.sess.ends = s.turnstile
	t.sess.link.onGoAway = func() { reg.retire(t) }
	status, after, duplicate := reg.add(t)
	if duplicate {
		log.Warn("several agents use one certificate: duplicate_identity", "serial", id.Serial, "instance", hex.EncodeToString(login.Instance[:]))
	}
	if status != wire.LoginOK {
		return refuse(status, after, nil)
	}
	reply.Status, reply.Version = wire.LoginOK, version
	if err := wire.WriteLoginReply(tc, reply); err != nil {
		t.sess.kill(linkError(err))
		reg.remove(t)
		return nil, err
	}
	_ = r.SetDeadline(time.Time{})
	return t, nil
}

// runTunnel serves a tunnel until it is dead.
func (s *Server) runTunnel(ctx context.Context, t *serverTunnel) {
	defer t.sess.endWith(ctx)()
	end := t.sess.endAt(t.id.NotAfter, errExpired)
	defer end.Stop()
	log := t.sess.log
	log.Info("tunnel up", "instance", hex.EncodeToString(t.login.Instance[:]), "index", t.login.Index, "software", t.login.Software)
	if t.reg == s.peers {
		if s.cfg.OnPeer != nil {
			s.cfg.OnPeer(t.id.Name)
		}
		s.servePeer(ctx, t)
	} else {
		t.sess.run(nil)
	}
	s.turnstile.enter(going)
	defer s.turnstile.leave()
	t.reg.remove(t)
	cause := t.sess.link.cause()
	log.Info("tunnel down", "reason", reasonOf(cause, "failed"), "err", cause, "after", time.Since(t.sess.since).Round(time.Millisecond))
}

// refuse counts a refusal. Reasons come from fixed sets, ours and that of Authorize, but nothing enforces theirs.
func (s *Server) refuse(reason string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.refused[reason]; !ok && len(s.refused) >= 64 {
		reason = "other"
	}
	s.refused[reason]++
}

// Open opens a stream to a node's agent. It waits no longer than ctx allows, and not for a tunnel that is dead. The
// errors are ErrNoTunnel, ErrDraining, ErrOverloaded, or that of ctx; in every case the agent has seen nothing.
func (s *Server) Open(ctx context.Context, node string) (*Stream, error) {
	for range 2 { // a second time if the tunnel was just replaced
		if s.drained.Load() {
			return nil, ErrDraining
		}
		t := s.reg.pick(node)
		if t == nil {
			break
		}
		st, err := t.sess.open(ctx)
		if err == nil || errors.Is(err, ErrOverloaded) || ctx.Err() != nil {
			return st, err
		}
	}
	if s.draining.Load() {
		return nil, ErrDraining
	}
	return nil, ErrNoTunnel
}

// Recheck calls Authorize again for every tunnel and drops those that are refused now. Call it when certificates, CA bundle
// or deny file have changed. It returns how many were dropped.
func (s *Server) Recheck() int {
	dropped := 0
	for _, t := range append(s.reg.all(""), s.peers.all("")...) {
		id, err := s.cfg.Authorize(t.state)
		if err == nil && id.Name != t.id.Name {
			err = &Error{reason: "bad_name", text: "certificate names another node now"}
		}
		if err != nil {
			reason := reasonOf(err, "unauthorized")
			s.refuse(reason)
			t.sess.kill(&Error{reason: reason, text: "no longer authorized", cause: err})
			dropped++
		}
	}
	return dropped
}

// Forget drops the tunnels of a node and what is remembered about it. It may log in again.
func (s *Server) Forget(node string) { s.drop(node, errForgotten) }

// Exclude does the same for a node that is reached without tunnels from now on, which is what its streams say. Authorize has to keep it from
// coming back.
func (s *Server) Exclude(node string) { s.drop(node, errExcluded) }

func (s *Server) drop(node string, why *Error) {
	for _, t := range s.reg.forget(node) {
		t.sess.kill(why)
	}
}

// Drain refuses logins from now on, asks all agents to move to other servers, and waits until they have, or ctx ends: then
// its error is returned. Until then streams can be opened in tunnels that have not moved, afterwards in none, and the
// listeners are closed, so that a successor can have their addresses. Open streams go on, until Serve's context ends.
func (s *Server) Drain(ctx context.Context) error {
	s.draining.Store(true)
	defer s.stopAccepting()
	notice := wire.Notice{Kind: wire.NoticeDrain}
	if end, ok := ctx.Deadline(); ok {
		notice.ClosesIn = min(max(time.Until(end), 0), wire.MaxClosesIn)
	}
	var wg sync.WaitGroup
	for _, t := range s.reg.all("") {
		wg.Go(func() {
			s.sendNotice(ctx, t, notice)
			select {
			case <-t.moved:
			case <-ctx.Done():
			}
		})
	}
	wg.Wait()
	return ctx.Err()
}

func (s *Server) sendNotice(ctx context.Context, t *serverTunnel, n wire.Notice) {
	st, err := t.sess.open(ctx)
	if err != nil {
		return // dead or stuck; moved tells
	}
	defer st.Close()
	if end, ok := ctx.Deadline(); ok {
		_ = st.SetDeadline(end)
	}
	if wire.WriteHeader(st, wire.Header{Kind: wire.KindNotice}) == nil {
		_ = wire.WriteNotice(st, n)
	}
}

// Info describes one tunnel of a Server.
type Info struct {
	Node      string
	Addrs     []netip.Addr
	Serial    string
	NotAfter  time.Time
	Remote    string
	Instance  string // 32 hex digits
	Index     uint16
	Software  string
	Since     time.Time
	RTT       time.Duration // 0: not measured yet
	BytesIn   uint64        // payload from the agent
	BytesOut  uint64        // payload to the agent
	Streams   int
	Retired   bool // finishes its streams, takes no new ones
	Duplicate bool // clones of this node were seen in the last minute
}

// Tunnels describes all tunnels, ordered by node; the active one of a node comes first.
func (s *Server) Tunnels() []Info {
	var infos []Info
	for _, t := range s.reg.all("") {
		l := t.sess.link
		s.reg.mu.Lock()
		retired := t.retired
		s.reg.mu.Unlock()
		infos = append(infos, Info{
			Node: t.id.Name, Addrs: t.id.Addrs, Serial: t.id.Serial, NotAfter: t.id.NotAfter,
			Remote: l.raw.RemoteAddr().String(), Instance: hex.EncodeToString(t.login.Instance[:]), Index: t.login.Index,
			Software: t.login.Software, Since: t.sess.since, RTT: t.sess.rtt(),
			BytesIn: l.bytesIn.Load(), BytesOut: l.bytesOut.Load(), Streams: l.numStreams(),
			Retired: retired, Duplicate: s.reg.isDuplicate(t.id.Name),
		})
	}
	slices.SortStableFunc(infos, func(a, b Info) int {
		if a.Node != b.Node {
			if a.Node < b.Node {
				return -1
			}
			return 1
		}
		return boolInt(a.Retired) - boolInt(b.Retired)
	})
	return infos
}

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

// ServerStats are plain numbers; those that are not marked "now" only grow.
type ServerStats struct {
	Accepted      uint64 // connections
	Pending       int    // now: connections that have not logged in
	Probes        uint64 // connections closed before their first byte
	Logins        uint64
	Refused       map[string]uint64 // by reason
	Active        int               // now: tunnels that take streams
	Retired       int               // now: tunnels that finish theirs
	Evictions     uint64            // by other instances
	Duplicates    uint64            // evictions that were too many
	StreamsOpened uint64
	StreamsClosed uint64 // equal to StreamsOpened when no stream is in use, or one was leaked
	BytesIn       uint64 // payload from agents
	BytesOut      uint64
	Peers         int    // now: servers that are connected to this one
	Questions     uint64 // of them, as lists of names
}

// Stats returns the present numbers.
func (s *Server) Stats() ServerStats {
	st := ServerStats{
		Accepted: s.accepted.Load(), Pending: s.gate.size(), Probes: s.probes.Load(), Logins: s.logins.Load(),
		StreamsClosed: s.total.streamsClosed.Load(), StreamsOpened: s.total.streamsOpened.Load(),
		BytesIn: s.total.bytesIn.Load(), BytesOut: s.total.bytesOut.Load(),
		Peers: len(s.peers.all("")), Questions: s.questions.Load(),
	}
	for _, t := range s.reg.all("") {
		st.BytesIn += t.sess.link.bytesIn.Load()
		st.BytesOut += t.sess.link.bytesOut.Load()
	}
	s.reg.mu.Lock()
	st.Evictions, st.Duplicates = s.reg.evictions, s.reg.duplicates
	for _, n := range s.reg.nodes {
		st.Active += boolInt(n.active != nil)
		st.Retired += len(n.retired)
	}
	s.reg.mu.Unlock()
	s.mu.Lock()
	st.Refused = maps.Clone(s.refused)
	s.mu.Unlock()
	return st
}
