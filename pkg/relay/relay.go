// SPDX-License-Identifier: Apache-2.0

// Package relay joins two connections until both are done, and tells how it went. It is the same at both ends of a
// tunnel: a is the client's side, b the remote side; one of them is a TCP connection, the other a stream.
//
// Each direction ends on its own:
//
//   - FIN read from one side becomes CloseWrite on the other, after the last byte; the opposite direction goes on for
//     as long as the two peers like. There is no timeout on a half-closed connection.
//   - A reset of one side, or any other error, becomes a Reset of the other, never a FIN: a peer must not take half
//     a transfer for a whole one.
//
// A relay reads a side only when the other has taken what came before, so a slow peer slows the other down and nothing
// is queued here. What nobody reads cannot tell of a reset, so a side that is not being read (its FIN has come, or
// the other side is slow) is watched for one: see Watcher.
//
// A Conn that has a buffer of its own should be an io.WriterTo: then it is not read into a buffer that an idle relay would
// hold. (What TCP returns takes one only when there is something to read.)
//
// Relay owns both connections from the call on and has closed them when it returns; the goroutine it starts has
// ended by then. While a relay is idle it costs its two goroutines and no buffer.
package relay

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Conn is one side of a relay. All its methods may be called while others are blocked, and Close and Reset make
// those return.
//
// A Read or Write that fails because the peer reset the connection must return an error for which IsReset holds.
type Conn interface {
	net.Conn

	// CloseWrite ends the sending direction: the peer reads EOF after the last byte. Reading goes on.
	CloseWrite() error

	// Reset closes the connection at once so that the peer sees a reset. It does not block. After Close or Reset it
	// does nothing.
	Reset() error
}

// Watcher is a Conn that notices its peer's reset without being read or written. A Conn that is none is relayed as
// well, but a reset of it goes unnoticed until the next byte moves.
type Watcher interface {
	// Failed returns the error that a connection died of, and nil while it lives or after it ended with FINs. It does
	// not block.
	Failed() error

	// WaitFailed blocks until Failed returns an error, and returns it; nil when this end closed the connection, or
	// its read deadline passed, first. It is not called while a Read is under way.
	WaitFailed() error
}

// IsReset reports whether err says that the peer reset the connection: ECONNRESET, EPIPE and ENOTCONN, the last two for
// a write or a shutdown after a reset that was already reported. Connections that are not sockets make their error
// match syscall.ECONNRESET with an Is method.
func IsReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ENOTCONN)
}

// Reason says why a relay ended, in snake_case.
type Reason string

// Reasons. The side named is the one that failed first, as seen from here.
const (
	Closed      Reason = "closed"       // both directions ended with FIN
	ClientReset Reason = "client_reset" // a's peer reset it
	RemoteReset Reason = "remote_reset" // b's peer reset it
	ClientError Reason = "client_error" // a failed otherwise, see Result.Err
	RemoteError Reason = "remote_error" // b failed otherwise, see Result.Err
	Canceled    Reason = "canceled"     // the context ended
)

// Result is the outcome of one relay.
type Result struct {
	Sent     int64 // bytes of a that b's Write took
	Received int64 // bytes of b that a's Write took
	Reason   Reason
	Err      error // what Reason stands for; nil when Closed
}

// BufferSize is how much is read at once.
const BufferSize = 64 << 10

// Relayer relays connections and keeps the buffers that they share. The zero value is ready; it must not be copied.
type Relayer struct {
	buffers sync.Pool // of *buffer
}

type buffer [BufferSize]byte

func (r *Relayer) get() *buffer {
	if b, ok := r.buffers.Get().(*buffer); ok {
		return b
	}
	return new(buffer)
}

func (r *Relayer) put(b *buffer) { r.buffers.Put(b) }

// Relay copies both ways until both directions have ended, one side has failed, or ctx is done; in the latter two cases
// both sides are reset. Deadlines that the connections may have are removed.
func (r *Relayer) Relay(ctx context.Context, a, b Conn) Result {
	_ = a.SetDeadline(time.Time{}) // an error here is a dead connection, which the first Read reports
	_ = b.SetDeadline(time.Time{})

	s := &session{a: a, b: b}
	s.running.Store(2)
	s.up = flow{session: s, relayer: r, src: a, dst: b, srcSide: client, dstSide: remote}
	s.down = flow{session: s, relayer: r, src: b, dst: a, srcSide: remote, dstSide: client}
	s.stall.check = s.check

	canceled := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(canceled)
		s.fail(Canceled, context.Cause(ctx))
	})
	var wg sync.WaitGroup
	wg.Go(s.down.run)
	s.up.run()
	wg.Wait()
	s.stall.stop()
	if !stop() {
		<-canceled
	}

	res := Result{Sent: s.up.written, Received: s.down.written, Reason: Closed}
	if s.reason != "" {
		res.Reason, res.Err = s.reason, s.err
	}
	return res
}

// session is what the two directions of one relay share.
//
//	running 2 ──EOF──► 1 ──EOF──► 0: closed
//	   └──── fail ─────┴─► reset
type session struct {
	a, b     Conn
	up, down flow
	stall    stall
	running  atomic.Int32 // directions that have not seen their FIN

	once   sync.Once // whoever ends the session, in whichever way
	reason Reason    // written within once, read after all goroutines ended; "" means closed
	err    error
}

// finish is called by each direction that has passed on its FIN.
func (s *session) finish() (last bool) {
	if s.running.Add(-1) > 0 {
		return false
	}
	s.once.Do(func() {
		_ = s.a.Close()
		_ = s.b.Close()
	})
	return true
}

// fail resets both sides. Only the first call counts: what others see later are the consequences.
func (s *session) fail(reason Reason, err error) {
	s.once.Do(func() {
		s.reason, s.err = reason, err
		_ = s.a.Reset()
		_ = s.b.Reset()
	})
}

// check looks for a Write that blocks. Nobody reads its source meanwhile; without this a client that resets would hold its
// stream for as long as the far end does not read.
func (s *session) check() (idle bool) {
	idle = true
	for _, f := range [...]*flow{&s.up, &s.down} {
		stalled, none := f.stalled()
		idle = idle && none
		if src, ok := f.src.(Watcher); ok && stalled {
			if err := src.Failed(); err != nil {
				s.fail(f.srcSide.reason(err), err)
			}
		}
	}
	return idle
}

// side is one of the two, for the naming of failures.
type side bool

const (
	client side = false
	remote side = true
)

func (s side) reason(err error) Reason {
	reset := IsReset(err)
	switch {
	case s == client && reset:
		return ClientReset
	case s == client:
		return ClientError
	case reset:
		return RemoteReset
	}
	return RemoteError
}
