// SPDX-License-Identifier: Apache-2.0

package intercept

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/relay"
	"github.com/edge-tunnel/edge-tunnel/pkg/relay/ledger"
	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

// facts are what is known about one connection. They are written once, and anew by its opening.
type facts struct {
	origin      Origin
	trace       uint64
	src         netip.AddrPort
	node        string
	established bool
	retried     bool
}

// handle takes one accepted connection from its origin to its record.
func (s *Server) handle(tcp *net.TCPConn, entry *ledger.Entry[facts]) {
	client := relay.TCP(tcp)
	origin, err := s.cfg.Origin(tcp)
	if err != nil {
		reason := ReasonOriginFailed
		if errors.Is(err, ErrNotIntercepted) {
			reason = ReasonNotIntercepted
		}
		client.Reset()
		entry.End(reason)
		// At debug only: strangers must not be able to fill the log.
		s.cfg.Logger.Debug("connection without a destination", "src", tcp.RemoteAddr().String(), "reason", reason, "error", err)
		return
	}
	if s.cfg.Canary != nil && s.cfg.Canary(tcp, origin) {
		client.Close()
		entry.End(ReasonCanary)
		return
	}
	c := &facts{origin: origin, trace: rand.Uint64(), src: unmapped(tcp.RemoteAddr())}
	reason, detail := s.carry(c, client, entry)
	result := entry.End(reason)
	if reason == ReasonPodFull {
		// At debug only: nor must a pod.
		s.cfg.Logger.Debug("connection of a pod that has too many", "src", c.src.String(), "comm", origin.Comm, "dst", origin.Dst.String(), "node", c.node)
		return
	}
	if c.node != "" && reason != ReasonNodeFull {
		s.nodes.end(c.node, result.Sent, result.Received)
	}
	s.record(c, result, reason, detail)
}

// carry relays one connection and says why it ended. The client is closed or reset when it returns.
func (s *Server) carry(c *facts, client relay.Conn, entry *ledger.Entry[facts]) (reason, detail string) {
	began := time.Now()
	node, ok := s.cfg.Lookup(c.origin.Dst.Addr())
	if !ok {
		client.Reset()
		return ReasonNoRoute, ""
	}
	c.node = node
	if !s.pods.begin(c.origin, node) {
		client.Reset()
		return ReasonPodFull, ""
	}
	defer s.pods.end(c.origin, node)
	if !s.nodes.begin(node) {
		client.Reset()
		return ReasonNodeFull, ""
	}
	entry.Describe(*c)
	if s.cfg.Logger.Enabled(s.ctx, slog.LevelDebug) {
		s.cfg.Logger.Debug("connection opening", "trace", traceID(c.trace), "comm", c.origin.Comm, "dst", c.origin.Dst.String(), "node", node)
	}
	o := &opening{s: s, entry: entry, facts: c, began: began, done: make(chan struct{}), header: wire.Header{
		Kind: wire.KindConnect, Trace: c.trace, Dst: c.origin.Dst, Src: c.src,
	}}
	if fail := o.first(); fail != nil {
		client.Reset()
		return fail.reason, fail.detail
	}
	result := s.relayer.Relay(s.ctx, client, entry.Remote(o))
	if fail, ok := result.Err.(*failure); ok {
		return fail.reason, fail.detail
	}
	return ledger.Ended(result)
}

// record writes the access record.
func (s *Server) record(c *facts, r ledger.Result[facts], reason, detail string) {
	if !s.cfg.Logger.Enabled(context.Background(), slog.LevelInfo) {
		return
	}
	attrs := []slog.Attr{
		slog.String("trace", traceID(c.trace)),
		slog.Uint64("pid", uint64(c.origin.PID)),
		slog.String("comm", c.origin.Comm),
		slog.Uint64("uid", uint64(c.origin.UID)),
		slog.Uint64("cgroup", c.origin.Cgroup),
		slog.Uint64("netns", c.origin.Netns),
		slog.String("src", c.src.String()),
		slog.String("dst", c.origin.Dst.String()),
		slog.String("node", c.node),
		slog.Int64("sent", r.Sent),
		slog.Int64("received", r.Received),
		slog.Duration("duration", time.Since(r.Since)),
		slog.String("reason", reason),
	}
	if c.retried {
		attrs = append(attrs, slog.Bool("retried", true))
	}
	if detail != "" {
		attrs = append(attrs, slog.String("detail", detail))
	}
	s.cfg.Logger.LogAttrs(context.Background(), slog.LevelInfo, "connection", attrs...)
}

// Connection is an open connection.
type Connection struct {
	Trace    string // 16 hex digits, the same in the agent's record
	PID      uint32
	Comm     string
	UID      uint32
	Cgroup   uint64
	Netns    uint64
	Src      netip.AddrPort
	Dst      netip.AddrPort
	Node     string
	State    string // "opening" until the agent has dialed, then "open"
	Since    time.Time
	Sent     int64 // bytes so far
	Received int64
}

// Connections lists the open connections, oldest first.
func (s *Server) Connections() []Connection {
	open := s.book.Open()
	list := make([]Connection, len(open))
	for i, r := range open {
		c := r.Facts
		state := "opening"
		if c.established {
			state = "open"
		}
		list[i] = Connection{
			Trace: traceID(c.trace), PID: c.origin.PID, Comm: c.origin.Comm, UID: c.origin.UID,
			Cgroup: c.origin.Cgroup, Netns: c.origin.Netns, Src: c.src, Dst: c.origin.Dst, Node: c.node,
			State: state, Since: r.Since, Sent: r.Sent, Received: r.Received,
		}
	}
	return list
}

func traceID(trace uint64) string { return fmt.Sprintf("%016x", trace) }

func unmapped(addr net.Addr) netip.AddrPort {
	tcp, ok := addr.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ap := tcp.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
}
