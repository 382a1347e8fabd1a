// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	mrand "math/rand/v2"
	"net"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

// AgentConfig is what an Agent needs.
type AgentConfig struct {
	// Servers are HOST:PORT, IPv6 addresses in brackets. With several, one tunnel goes to each. One is taken to be a load
	// balancer: up to Tunnels connections to distinct servers behind it.
	Servers []string
	Tunnels int // default 2

	// Ways says that all of Servers lead to the same servers, the best way first: up to Tunnels connections to distinct servers, each by the
	// first way that leads in, and no pause before all have been tried. There may be none at first; see SetServers.
	Ways bool

	// TLS returns the configuration for a dial to one of Servers, with the present certificate. An empty ServerName becomes
	// the host.
	TLS func(server string) *tls.Config

	// Verify, if set, judges a server's connection again when Renew is called.
	Verify func(tls.ConnectionState) error

	// Handle serves one stream. It runs in a goroutine of its own, and the stream is closed when it returns; ctx ends with Run's,
	// and with the tunnel unless both directions had ended before: what has arrived can still be read then. Run waits for it.
	Handle func(ctx context.Context, s *Stream, h wire.Header)

	Instance [16]byte // default random; not to be kept across restarts
	Software string   // name and version for people

	Wake    <-chan struct{}                                                      // the network has changed
	Control func(network, address string, c syscall.RawConn) error               // of the dialer
	Dial    func(ctx context.Context, network, address string) (net.Conn, error) // instead of a net.Dialer

	MaxStreams int // over all tunnels, default 8192
	MaxWindow  int // bytes on the way to us per stream, default 8 MiB
	Budget     int // bytes per tunnel, by which its windows may exceed 256 KiB each, default 16 MiB
	Log        *slog.Logger
}

// Validate reports everything that is wrong with the configuration.
func (c AgentConfig) Validate() error {
	var errs []error
	if len(c.Servers) > 0 || !c.Ways {
		errs = append(errs, checkServers(c.Servers))
	}
	if c.TLS == nil || c.Handle == nil {
		errs = append(errs, errors.New("TLS and Handle must be set"))
	}
	if c.Tunnels < 0 || c.Tunnels > 16 {
		errs = append(errs, errors.New("tunnels must be between 1 and 16"))
	}
	if c.MaxStreams < 0 || c.Budget < 0 || c.MaxWindow < 0 || c.MaxWindow > 0 && c.MaxWindow < initialWindow || c.MaxWindow > 256<<20 {
		errs = append(errs, errors.New("limits must not be negative, and a window must be between 256 KiB and 256 MiB"))
	}
	return errors.Join(errs...)
}

func checkServers(servers []string) error {
	var errs []error
	if len(servers) == 0 {
		errs = append(errs, errors.New("no server to connect to"))
	}
	for i, s := range servers {
		host, port, err := net.SplitHostPort(s)
		n, perr := strconv.ParseUint(port, 10, 16)
		if err != nil || host == "" || perr != nil || n == 0 {
			errs = append(errs, fmt.Errorf("server %q is not HOST:PORT", s))
		}
		if slices.Contains(servers[:i], s) {
			errs = append(errs, fmt.Errorf("server %q is given twice", s))
		}
	}
	return errors.Join(errs...)
}

// timing is what tests make faster.
type timing struct {
	retry, duplicate pause         // after failures; after finding a server that we have a tunnel to
	settled          time.Duration // a tunnel that lived so long has proven that things work
	probe            time.Duration // for an answer on every tunnel after the network has changed
	wakeEvery        time.Duration // wakes closer together are one
	header           time.Duration // for the header of a stream
	dial, login      time.Duration
	way              time.Duration // for a dial while there are other ways to be tried
	move             time.Duration // within which agents leave a way that is none any more
}

func defaultTiming() timing {
	return timing{
		// Ten seconds: 10,000 agents of a server that is down then dial 2,000 times a second, which costs little, and after a
		// restart no node is away for half a minute.
		retry: pause{first: time.Second, limit: 10 * time.Second},
		// Each look for a further server costs the one that is found again a handshake, and 10,000 agents of one server look for ever.
		// Where there are two, every look that finds the same one makes a second half as likely.
		duplicate: pause{first: 30 * time.Second, limit: 20 * time.Minute, growth: 4},
		settled:   30 * time.Second,
		probe:     3 * time.Second,
		wakeEvery: time.Second,
		header:    10 * time.Second,
		dial:      10 * time.Second,
		login:     20 * time.Second, // the server may be under a flood
		way:       4 * time.Second,  // time for the first packet to be sent three times
		move:      30 * time.Second,
	}
}

// Agent keeps tunnels to servers.
type Agent struct {
	cfg   AgentConfig
	time  timing
	total counters
	peer  bool // it is a server that dials another one, and opens the streams

	wakes, renewals, ups broadcast
	handlers             atomic.Int64
	running              atomic.Bool

	dials, failures, overloaded atomic.Uint64

	mu      sync.Mutex
	slots   []*slot
	tunnels map[*agentTunnel]struct{}
	ways    []string // Config.Servers, or what SetServers said
}

// slot is the place of one tunnel. Its keeper, one goroutine, fills it for as long as the agent runs:
//
//	dialing ──> connected ──┬─ tunnel died ──> waiting ──> dialing
//	   └─ failed ─> waiting │
//	                        └─ drain notice, or certificate near its end: dialing, while the old tunnel goes on; it is
//	                           retired when the new one is up, or at once if another slot has a tunnel
//
// Behind one address a slot that found no further server goes on looking, in growing pauses, while another slot has a tunnel. With several
// ways it begins with the next one each time.
type slot struct {
	server string // the keeper alone writes it, with Agent.mu
	index  uint16
	first  int // of the ways to try; the keeper's

	state   string // needs Agent.mu, as the rest
	lastErr error
	retryAt time.Time
}

// agentTunnel is the agent's side of one tunnel.
type agentTunnel struct {
	sess     *session
	slot     *slot
	server   string // where it was dialed
	serverID string
	servers  int // live ones, as the server said
	state    tls.ConnectionState
	notAfter time.Time     // the earlier end of both certificates
	drain    chan struct{} // closed by a drain notice
	once     sync.Once
	stray    chan struct{} // closed when it came by a way that is none any more
	strays   sync.Once
	retired  bool // needs Agent.mu
}

// NewAgent makes an agent. Nothing runs until Run.
func NewAgent(cfg AgentConfig) (*Agent, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	setDefault(&cfg.Tunnels, 2)
	setDefault(&cfg.MaxStreams, 8192)
	setDefault(&cfg.MaxWindow, 8<<20)
	setDefault(&cfg.Budget, 16<<20)
	if cfg.Instance == ([16]byte{}) {
		_, _ = rand.Read(cfg.Instance[:])
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Dial == nil {
		d := &net.Dialer{Control: cfg.Control}
		d.SetMultipathTCP(false)
		cfg.Dial = d.DialContext
	}
	a := &Agent{cfg: cfg, time: defaultTiming(), tunnels: make(map[*agentTunnel]struct{}), ways: slices.Clone(cfg.Servers)}
	n := len(cfg.Servers)
	if n == 1 || cfg.Ways {
		n = cfg.Tunnels
	}
	for i := range n {
		sl := &slot{index: uint16(i), state: "dialing"}
		if len(cfg.Servers) > 0 {
			sl.server = cfg.Servers[i%len(cfg.Servers)]
		}
		a.slots = append(a.slots, sl)
	}
	return a, nil
}

// SetServers says by which ways servers are reached from now on, of an Agent with Ways. Tunnels that came by another one are made anew
// within half a minute, and end when that has worked.
func (a *Agent) SetServers(servers []string) error {
	if !a.cfg.Ways {
		return errors.New("the servers of this agent are fixed")
	}
	if err := checkServers(servers); err != nil {
		return err
	}
	a.mu.Lock()
	same := slices.Equal(a.ways, servers)
	a.ways = slices.Clone(servers)
	for t := range a.tunnels {
		if !t.retired && !slices.Contains(servers, t.server) {
			t.strays.Do(func() { close(t.stray) })
		}
	}
	a.mu.Unlock()
	if !same {
		a.wakes.send()
	}
	return nil
}

// Run keeps the tunnels until ctx ends, whatever happens to them, and returns when all goroutines have ended. An agent
// runs once.
func (a *Agent) Run(ctx context.Context) error {
	if a.running.Swap(true) {
		return errors.New("agent runs already")
	}
	var wg sync.WaitGroup
	wg.Go(func() { a.listenForWakes(ctx) })
	for _, sl := range a.slots {
		wg.Go(func() { a.keep(ctx, sl, &wg) })
	}
	<-ctx.Done()
	wg.Wait()
	return nil
}

// listenForWakes passes on that the network has changed, not more often than makes sense: netlink tells of one change in many
// messages, and each wake starts dials anew.
func (a *Agent) listenForWakes(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case _, ok := <-a.cfg.Wake:
			if !ok {
				return
			}
		}
		a.mu.Lock()
		for t := range a.tunnels {
			t.sess.link.probe(a.time.probe)
		}
		a.mu.Unlock()
		a.wakes.send()
		rest(ctx, a.time.wakeEvery, nil)
	}
}

// Renew judges the servers of all tunnels again, drops those that are refused now, and logs in again on the others, new
// tunnel first. Call it when certificates, CA bundle or deny file have changed.
func (a *Agent) Renew() {
	a.mu.Lock()
	tunnels := make([]*agentTunnel, 0, len(a.tunnels))
	for t := range a.tunnels {
		tunnels = append(tunnels, t)
	}
	a.mu.Unlock()
	for _, t := range tunnels {
		if a.cfg.Verify == nil {
			break
		}
		if err := a.cfg.Verify(t.state); err != nil {
			t.sess.kill(&Error{reason: reasonOf(err, "unauthorized"), text: "server is no longer trusted", cause: err})
		}
	}
	a.renewals.send()
}

// keep fills one slot until ctx ends. Everything it starts is counted in wg.
func (a *Agent) keep(ctx context.Context, sl *slot, wg *sync.WaitGroup) {
	retry, duplicate := a.time.retry, a.time.duplicate
	var current *agentTunnel
	oneAddress := (len(a.cfg.Servers) == 1 || a.cfg.Ways) && !a.peer
	searching := oneAddress && sl.index > 0 // for a further server; the first slot shows that there is one
	for ctx.Err() == nil {
		if searching {
			a.awaitTunnel(ctx, &duplicate)
		}
		a.awaitWay(ctx, sl)
		wake := a.wakes.next()
		renew := a.renewals.next()
		a.setState(sl, "dialing", nil, 0)
		t, err := a.connectAny(ctx, sl, current, wake)
		if err != nil {
			if current != nil && current.draining() && a.elsewhere(current) {
				a.retire(current, wg)
				current = nil
			}
			if current != nil && !current.sess.link.alive() {
				current = nil
			}
			d, insists := a.pauseAfter(err, &retry, &duplicate, current != nil)
			a.failed(ctx, sl, err, d)
			searching = searching || oneAddress && current == nil && reasonOf(err, "") == wire.LoginAlreadyConnected.String() && a.distinct() > 0
			if insists || searching {
				wake = nil // the server said how long, or nobody waits for it; the network has no say in it
			}
			rest(ctx, d, wake)
			continue
		}
		duplicate.reset()
		searching = false
		a.start(ctx, t, wg)
		if current != nil {
			a.retire(current, wg)
		}
		current = t
		a.setState(sl, "connected", nil, 0)
		again := a.watch(ctx, t, renew)
		if again == nil { // died
			current = nil
			if time.Since(t.sess.since) >= a.time.settled {
				retry.reset()
			}
			d := retry.next()
			a.setState(sl, "waiting", t.sess.link.cause(), d)
			rest(ctx, d, a.wakes.next())
			continue
		}
		if again == errDraining && a.elsewhere(t) {
			a.retire(t, wg)
			current = nil
		}
		if again == errStray {
			rest(ctx, mrand.N(a.time.move), t.sess.link.dead) // nothing is wrong with it yet
		}
		rest(ctx, mrand.N(a.time.retry.first), nil) // many agents got the same notice
	}
}

// awaitWay waits until there is any.
func (a *Agent) awaitWay(ctx context.Context, sl *slot) {
	for a.cfg.Ways && ctx.Err() == nil {
		wake := a.wakes.next()
		if len(a.waysOf(sl)) > 0 {
			return
		}
		a.setState(sl, "dialing", errNoWay, 0)
		select {
		case <-wake:
		case <-ctx.Done():
		}
	}
}

// waysOf returns where a slot may dial, in its order.
func (a *Agent) waysOf(sl *slot) []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.cfg.Ways {
		return []string{sl.server}
	}
	if len(a.ways) == 0 {
		return nil
	}
	first := sl.first % len(a.ways)
	return slices.Concat(a.ways[first:], a.ways[:first])
}

// awaitTunnel lets a slot that looks for a further server wait until there is a tunnel, and some more: with none, it would only dial the
// same server beside the slot that lost it, and in a storm of 10,000 agents that is half of the work for nothing.
func (a *Agent) awaitTunnel(ctx context.Context, search *pause) {
	for waited := false; ctx.Err() == nil; waited = true {
		up := a.ups.next()
		if a.distinct() > 0 {
			if waited {
				rest(ctx, search.next(), nil)
			}
			return
		}
		select {
		case <-up:
		case <-ctx.Done():
		}
	}
}

var (
	errDraining = errors.New("server is draining")
	errRenew    = errors.New("certificate is to be renewed")
	errStray    = errors.New("server is reached in another way now")
	errNoWay    = errors.New("no address of a server is known yet")
)

// watch waits for a reason to log in again. It returns nil if the tunnel died.
func (a *Agent) watch(ctx context.Context, t *agentTunnel, renew <-chan struct{}) error {
	var soon <-chan time.Time
	if !t.notAfter.IsZero() {
		// At half to four fifths of what is left. Should no new certificate be there by then, the next tunnel has the same
		// end and the step is taken again, shorter.
		left := time.Until(t.notAfter)
		timer := time.NewTimer(max(left/2+mrand.N(max(left*3/10, 1)), time.Second))
		defer timer.Stop()
		soon = timer.C
	}
	select {
	case <-t.sess.link.dead:
		return nil
	case <-ctx.Done():
		return nil
	case <-t.drain:
		return errDraining
	case <-t.stray:
		return errStray
	case <-renew:
	case <-soon:
	}
	return errRenew
}

// elsewhere reports whether the node can be reached by a tunnel other than t that nobody is about to end.
func (a *Agent) elsewhere(t *agentTunnel) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	for other := range a.tunnels {
		if other != t && !other.retired && !other.draining() && other.sess.link.alive() {
			return true
		}
	}
	return false
}

func (t *agentTunnel) draining() bool {
	select {
	case <-t.drain:
		return true
	default:
		return false
	}
}

// pauseAfter says how long to wait after a failed connect, and whether the server insists on it.
func (a *Agent) pauseAfter(err error, retry, duplicate *pause, replacing bool) (d time.Duration, insists bool) {
	var le *LoginError
	if !errors.As(err, &le) {
		return retry.next(), false
	}
	// Without any tunnel it is the server that is wrong: it has not noticed yet that another one is dead.
	if le.Status == wire.LoginAlreadyConnected && !replacing && a.distinct() > 0 {
		if le.Servers > 0 && le.Servers <= a.distinct() {
			duplicate.ceiling = duplicate.limit / 2 // no further server to be found, for now
		}
		return duplicate.ceiling/4 + duplicate.next(), false
	}
	d = retry.next()
	if le.RetryAfter > 0 {
		d = max(d, le.RetryAfter+mrand.N(le.RetryAfter/5+1))
	}
	return d, le.Status == wire.LoginDuplicateIdentity
}

// distinct counts the servers that we have a tunnel to.
func (a *Agent) distinct() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	ids := make(map[string]struct{})
	for t := range a.tunnels {
		if !t.retired {
			ids[t.serverID] = struct{}{}
		}
	}
	return len(ids)
}

func (a *Agent) setState(sl *slot, state string, err error, d time.Duration) {
	a.mu.Lock()
	defer a.mu.Unlock()
	sl.state = state
	sl.retryAt = time.Time{}
	if state == "waiting" {
		sl.retryAt = time.Now().Add(d)
	}
	if err != nil || state == "connected" {
		sl.lastErr = err
	}
}

func (a *Agent) failed(ctx context.Context, sl *slot, err error, d time.Duration) {
	if ctx.Err() != nil {
		return
	}
	a.setState(sl, "waiting", err, d)
	level := slog.LevelWarn
	var le *LoginError
	if errors.As(err, &le) && le.Status == wire.LoginAlreadyConnected {
		level = slog.LevelDebug // as it should be with fewer servers than slots
	} else {
		a.failures.Add(1)
	}
	a.cfg.Log.Log(ctx, level, "no tunnel", "server", sl.server, "err", err, "retry_in", d.Round(time.Millisecond))
}

// start runs a new tunnel.
func (a *Agent) start(ctx context.Context, t *agentTunnel, wg *sync.WaitGroup) {
	life := ctx
	ctx, cancel := context.WithCancel(life)
	a.mu.Lock()
	a.tunnels[t] = struct{}{}
	a.mu.Unlock()
	a.ups.send()
	log := t.sess.log
	log.Info("tunnel up", "server_id", t.serverID)
	wg.Go(func() {
		defer cancel()
		defer t.sess.endWith(ctx)()
		end := t.sess.endAt(t.notAfter, errExpired)
		defer end.Stop()
		if a.peer {
			t.sess.run(nil)
		} else {
			t.sess.run(func() { a.acceptStreams(life, ctx, t, wg) })
		}
		a.mu.Lock()
		delete(a.tunnels, t)
		a.mu.Unlock()
		cause := t.sess.link.cause()
		log.Info("tunnel down", "server_id", t.serverID, "reason", reasonOf(cause, "failed"), "err", cause)
	})
}

// retire lets a tunnel finish its streams, and then ends it.
func (a *Agent) retire(t *agentTunnel, wg *sync.WaitGroup) {
	a.mu.Lock()
	was := t.retired
	t.retired = true
	a.mu.Unlock()
	if !was {
		wg.Go(func() { t.sess.retire(errReplaced) })
	}
}

// acceptStreams takes streams at once; whatever is slow about one happens in its own goroutine.
func (a *Agent) acceptStreams(life, ctx context.Context, t *agentTunnel, wg *sync.WaitGroup) {
	for {
		st, err := t.sess.accept()
		if err != nil {
			return
		}
		if a.handlers.Add(1) > int64(a.cfg.MaxStreams) {
			a.handlers.Add(-1)
			a.overloaded.Add(1)
			_ = st.Reset()
			continue
		}
		wg.Go(func() {
			defer a.handlers.Add(-1)
			defer st.Close()
			a.serveStream(life, ctx, t, st)
		})
	}
}

// serveStream reads the header and handles the stream. Life is the agent's, ctx the tunnel's.
func (a *Agent) serveStream(life, ctx context.Context, t *agentTunnel, st *Stream) {
	_ = st.SetReadDeadline(time.Now().Add(a.time.header))
	h, err := wire.ReadHeader(st)
	if err != nil {
		var we *wire.Error
		if errors.As(err, &we) {
			_ = wire.WriteReply(st, wire.Reply{Status: wire.StatusBadRequest, Message: we.Error()})
		} else {
			_ = st.Reset()
		}
		return
	}
	switch h.Kind {
	case wire.KindQuery:
		_ = wire.WriteReply(st, wire.Reply{Status: wire.StatusBadRequest, Message: "not between servers"})
	case wire.KindNotice:
		if n, err := wire.ReadNotice(st); err == nil && n.Kind == wire.NoticeDrain {
			t.sess.log.Info("server is about to stop", "server_id", t.serverID, "closes_in", n.ClosesIn)
			t.once.Do(func() { close(t.drain) })
		}
	default:
		_ = st.SetReadDeadline(time.Time{})
		life, cancel := context.WithCancel(life)
		defer cancel()
		defer context.AfterFunc(ctx, func() {
			if st.lost() {
				cancel()
			}
		})()
		a.cfg.Handle(life, st, h)
	}
}

// AgentInfo describes one slot of an Agent, or a retired tunnel that still has streams.
type AgentInfo struct {
	Server    string // as configured; with several ways, the one that was tried last, or that a tunnel came by
	Index     uint16
	State     string    // dialing, waiting, connected, retired
	LastError error     // why it is not connected, or was not at last
	RetryAt   time.Time // when waiting

	// Of a tunnel.
	ServerID string
	Remote   string
	Since    time.Time
	NotAfter time.Time
	RTT      time.Duration // 0: not measured yet
	BytesIn  uint64        // payload from the server
	BytesOut uint64
	Streams  int
	Draining bool
}

// Tunnels describes all slots, then retired tunnels.
func (a *Agent) Tunnels() []AgentInfo {
	a.mu.Lock()
	defer a.mu.Unlock()
	var infos []AgentInfo
	for _, sl := range a.slots {
		info := AgentInfo{Server: sl.server, Index: sl.index, State: sl.state, LastError: sl.lastErr, RetryAt: sl.retryAt}
		for t := range a.tunnels {
			if t.slot == sl && !t.retired {
				t.describe(&info)
			}
		}
		infos = append(infos, info)
	}
	for t := range a.tunnels {
		if t.retired {
			info := AgentInfo{Index: t.slot.index, State: "retired"}
			t.describe(&info)
			infos = append(infos, info)
		}
	}
	return infos
}

func (t *agentTunnel) describe(i *AgentInfo) {
	l := t.sess.link
	i.Server, i.ServerID, i.Remote, i.Since, i.NotAfter = t.server, t.serverID, l.raw.RemoteAddr().String(), t.sess.since, t.notAfter
	i.RTT, i.BytesIn, i.BytesOut, i.Streams = t.sess.rtt(), l.bytesIn.Load(), l.bytesOut.Load(), l.numStreams()
	i.Draining = t.draining()
}

// AgentStats are plain numbers; those that are not marked "now" only grow.
type AgentStats struct {
	Tunnels       int // now: that take streams
	Retired       int // now
	Handlers      int // now: streams being served
	Dials         uint64
	Failures      uint64 // of dials and logins, without those that found a server we have already
	Overloaded    uint64 // streams reset because of MaxStreams
	StreamsOpened uint64 // by servers
	StreamsClosed uint64
	BytesIn       uint64 // payload from servers
	BytesOut      uint64
}

// Stats returns the present numbers.
func (a *Agent) Stats() AgentStats {
	st := AgentStats{
		Handlers: int(a.handlers.Load()), Dials: a.dials.Load(), Failures: a.failures.Load(),
		Overloaded:    a.overloaded.Load() + a.total.refusedStreams.Load(),
		StreamsClosed: a.total.streamsClosed.Load(), StreamsOpened: a.total.streamsOpened.Load(),
		BytesIn: a.total.bytesIn.Load(), BytesOut: a.total.bytesOut.Load(),
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for t := range a.tunnels {
		st.BytesIn += t.sess.link.bytesIn.Load()
		st.BytesOut += t.sess.link.bytesOut.Load()
		st.Retired += boolInt(t.retired)
		st.Tunnels += boolInt(!t.retired)
	}
	return st
}
