// SPDX-License-Identifier: Apache-2.0

package deliver

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/relay"
	"github.com/edge-tunnel/edge-tunnel/pkg/relay/ledger"
	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

// Handler dials for servers. All methods may be called from any goroutine.
type Handler struct {
	cfg     Config
	book    *ledger.Book[facts]
	relayer relay.Relayer
	dials   chan struct{}   // a place in it for each dial under way
	ctx     context.Context // ends when open connections must be reset
	cancel  context.CancelFunc
}

// facts are what is known about one stream.
type facts struct {
	server string
	header wire.Header
	dialed netip.AddrPort // the zero value until it is connected
}

// New returns a handler. It must be closed.
func New(cfg Config) (*Handler, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg.setDefaults()
	ctx, cancel := context.WithCancel(context.Background())
	return &Handler{
		cfg:    cfg,
		book:   ledger.New[facts](cfg.MaxConns, reasons()...),
		dials:  make(chan struct{}, cfg.MaxDials),
		ctx:    ctx,
		cancel: cancel,
	}, nil
}

// Handle takes one stream, whose header has been read, from its policy check to its record. Server is who opened it,
// for the record. When ctx ends, which says that the stream's tunnel did, or Drain's does, the stream is reset. It
// returns when the stream is closed.
func (h *Handler) Handle(ctx context.Context, server string, stream relay.Conn, header wire.Header) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stopDrain := context.AfterFunc(h.ctx, func() { cancel(errStopping) })
	defer stopDrain()

	entry, ok := h.book.Begin(time.Now())
	if !ok {
		reply := wire.Reply{Status: wire.StatusOverloaded, Message: "the agent has as many connections as it may"}
		if h.book.Closed() {
			reply = wire.Reply{Status: wire.StatusDraining, Message: "the agent is stopping"}
		}
		h.turnDown(ctx, stream, reply)
		return
	}
	f := facts{server: server, header: header}
	entry.Describe(f)
	if h.cfg.Logger.Enabled(ctx, slog.LevelDebug) {
		h.cfg.Logger.Debug("connection opening", "trace", traceID(header.Trace), "server", server, "dst", header.Dst.String())
	}
	reason, detail := h.carry(ctx, &f, entry.Client(stream), entry)
	h.record(f, entry.End(reason), reason, detail)
}

// carry dials and relays one stream, and says why it ended. The stream is closed or reset when it returns.
func (h *Handler) carry(ctx context.Context, f *facts, stream *ledger.Conn, entry *ledger.Entry[facts]) (reason, detail string) {
	plain := stream.Conn // for replies, which are not the service's bytes
	targets, err := h.cfg.Policy.Targets(f.header.Dst)
	if err != nil {
		return h.turnDown(ctx, plain, wire.Reply{Status: wire.StatusNotAllowed, Message: err.Error()})
	}
	select {
	case h.dials <- struct{}{}:
	default:
		return h.turnDown(ctx, plain, wire.Reply{Status: wire.StatusOverloaded, Message: "the agent has as many dials under way as it may"})
	}
	dialCtx, giveUp := context.WithTimeout(ctx, h.cfg.DialTimeout)
	watch := watchStream(plain, giveUp)
	conn, target, err := h.dial(dialCtx, targets)
	lost := watch.stop()
	giveUp()
	<-h.dials
	switch {
	case lost != nil || ctx.Err() != nil:
		if conn != nil {
			relay.TCP(conn).Reset()
		}
		stream.Reset()
		return lostReason(ctx, lost)
	case err != nil:
		return h.turnDown(ctx, plain, wire.Reply{Status: statusOf(err), Message: err.Error()})
	}
	far := relay.TCP(conn)
	if err := h.reply(ctx, plain, wire.Reply{Status: wire.StatusOK}); err != nil {
		far.Reset()
		stream.Reset()
		return lostReason(ctx, err)
	}
	f.dialed = target
	entry.Describe(*f)
	return ended(ctx, h.relayer.Relay(ctx, stream, far))
}

// How long a server may take to take a status, and to close its end after one that is not OK.
const (
	replyTimeout = 10 * time.Second
	lingerFor    = 5 * time.Second
)

// laterWriter is a stream that can let a message wait for company. For an OK nobody waits: the client has been connected for long,
// and what it sends is on its way.
type laterWriter interface{ WriteLater(p []byte) error }

func (h *Handler) reply(ctx context.Context, stream relay.Conn, reply wire.Reply) error {
	if w, ok := stream.(laterWriter); ok && reply.Status == wire.StatusOK {
		b, _ := reply.AppendBinary(make([]byte, 0, 64)) // never fails
		return w.WriteLater(b)
	}
	stop := context.AfterFunc(ctx, func() { stream.Reset() })
	defer stop()
	stream.SetWriteDeadline(time.Now().Add(replyTimeout))
	err := wire.WriteReply(stream, reply)
	stream.SetWriteDeadline(time.Time{})
	return err
}

// turnDown answers with a status that is not OK and ends the stream. A reset right behind the status could overtake it in the
// server's buffers, so the server, which resets the stream when it has read the status, goes first.
func (h *Handler) turnDown(ctx context.Context, stream relay.Conn, reply wire.Reply) (reason, detail string) {
	stop := context.AfterFunc(ctx, func() { stream.Reset() })
	defer stop()
	if err := h.reply(ctx, stream, reply); err == nil && stream.CloseWrite() == nil {
		stream.SetReadDeadline(time.Now().Add(lingerFor))
		_, _ = io.CopyN(io.Discard, stream, 2*wire.MaxRetained)
	}
	stream.Reset()
	return reply.Status.String(), reply.Message
}

// Drain makes Handle answer that the agent is stopping, lets open connections finish until ctx ends, and resets the rest. It
// returns their number, when none is left.
func (h *Handler) Drain(ctx context.Context) (reset int) {
	h.book.Close()
	if h.book.Wait(ctx) != nil {
		reset = h.book.Stats().Open
	}
	h.cancel()
	_ = h.book.Wait(context.Background()) // which never ends
	return reset
}

// Close resets all connections.
func (h *Handler) Close() {
	now, cancel := context.WithCancel(context.Background())
	cancel()
	h.Drain(now)
}

// Stats are the handler's totals.
type Stats struct {
	ledger.Stats
	Dialing int // dials under way
}

// Stats returns the present totals.
func (h *Handler) Stats() Stats { return Stats{Stats: h.book.Stats(), Dialing: len(h.dials)} }

// record writes the access record.
func (h *Handler) record(f facts, r ledger.Result[facts], reason, detail string) {
	if !h.cfg.Logger.Enabled(context.Background(), slog.LevelInfo) {
		return
	}
	attrs := []slog.Attr{
		slog.String("trace", traceID(f.header.Trace)),
		slog.String("server", f.server),
		slog.String("src", text(f.header.Src)),
		slog.String("dst", f.header.Dst.String()),
		slog.String("dialed", text(f.dialed)),
		slog.Int64("sent", r.Sent),
		slog.Int64("received", r.Received),
		slog.Duration("duration", time.Since(r.Since)),
		slog.String("reason", reason),
	}
	if detail != "" {
		attrs = append(attrs, slog.String("detail", detail))
	}
	h.cfg.Logger.LogAttrs(context.Background(), slog.LevelInfo, "connection", attrs...)
}

// Connection is an open stream.
type Connection struct {
	Trace    string         // 16 hex digits, the same in the server's record
	Server   string         // who opened it
	Src      netip.AddrPort // the client, as its server saw it
	Dst      netip.AddrPort
	Dialed   netip.AddrPort // empty until connected
	State    string         // "dialing", then "open"
	Since    time.Time
	Sent     int64 // bytes so far
	Received int64
}

// Connections lists the open streams, oldest first.
func (h *Handler) Connections() []Connection {
	open := h.book.Open()
	list := make([]Connection, len(open))
	for i, r := range open {
		f := r.Facts
		state := "dialing"
		if f.dialed.IsValid() {
			state = "open"
		}
		list[i] = Connection{
			Trace: traceID(f.header.Trace), Server: f.server, Src: f.header.Src, Dst: f.header.Dst, Dialed: f.dialed,
			State: state, Since: r.Since, Sent: r.Sent, Received: r.Received,
		}
	}
	return list
}

func traceID(trace uint64) string { return fmt.Sprintf("%016x", trace) }

// text is the address, or nothing: the zero value's own text is "invalid AddrPort".
func text(ap netip.AddrPort) string {
	if !ap.IsValid() {
		return ""
	}
	return ap.String()
}
