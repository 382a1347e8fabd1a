// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/yamux"
)

// Stream is one intercepted connection in a tunnel, a net.Conn with CloseWrite and Reset. Whoever got it from
// Server.Open, or as the argument of Agent's Handle, closes it (an agent closes it when Handle returns).
//
// Read returns io.EOF only after the FIN of the far end and all data before it; everything else that ends a stream is
// a *ResetError, also the death of the tunnel.
type Stream struct {
	link  *link
	id    uint32
	mux   *yamux.Stream // set, with link.mu, before the stream is handed out
	done  chan struct{} // closed when the stream was reset, by whomever
	more  chan struct{} // there is more credit
	recut chan struct{} // a waiting Write looks again at deadline and state

	writing       sync.Mutex // one Write at a time; their frames must not mix
	ending        atomic.Bool
	closeOnce     sync.Once
	readDeadline  atomic.Pointer[time.Time]
	writeDeadline atomic.Pointer[time.Time]

	// The rest needs link.mu.
	err       error // why done is closed
	closed    bool  // Close or Reset was called
	acked     bool  // of a stream we opened: the far end has it
	finSeen   bool
	finSent   bool
	disguised bool // reset by the far end, but yamux was told of an end of data, or of nothing

	credit int64 // bytes we may send

	received, consumed, granted, promised uint64 // see credit.go
	ungranted                             uint32 // granted but not sent yet
	window                                int
	epoch                                 time.Time
	epochConsumed                         uint64
	quietAt, shrunkAt                     uint64 // see link.idleStreams
}

func newStream(l *link, id uint32) *Stream {
	return &Stream{
		link: l, id: id,
		done:     make(chan struct{}),
		more:     make(chan struct{}, 1),
		recut:    make(chan struct{}, 1),
		credit:   initialWindow,
		granted:  initialWindow,
		promised: initialWindow,
		window:   initialWindow,
		epoch:    time.Now(),
	}
}

// Read reads what has arrived. It works after CloseWrite.
func (s *Stream) Read(p []byte) (int, error) {
	if t := s.readDeadline.Load(); t != nil && !time.Now().Before(*t) {
		return 0, s.or(os.ErrDeadlineExceeded)
	}
	if len(p) == 0 {
		return 0, nil
	}
	n, err := s.mux.Read(p)
	if n > 0 {
		s.link.consume(s, n)
		return n, nil
	}
	return 0, s.readError(err)
}

// readError tells the end of the stream from its many other ends, which yamux cannot: it returns io.EOF for all
// streams of a session that died.
func (s *Stream) readError(err error) error {
	s.link.mu.Lock()
	defer s.link.mu.Unlock()
	switch {
	case s.closed:
		return net.ErrClosed
	case err == io.EOF && s.finSeen && s.consumed == s.received && (s.err == nil || s.link.err != nil):
		return io.EOF
	case s.err != nil:
		return s.err
	case errors.Is(err, yamux.ErrTimeout):
		return os.ErrDeadlineExceeded
	}
	return &ResetError{Tunnel: s.link.err}
}

// or returns net.ErrClosed or the reset if the stream has ended, else err.
func (s *Stream) or(err error) error {
	s.link.mu.Lock()
	defer s.link.mu.Unlock()
	switch {
	case s.closed:
		return net.ErrClosed
	case s.err != nil:
		return s.err
	}
	return err
}

// Write returns when the last byte was handed to the tunnel's writer.
func (s *Stream) Write(p []byte) (int, error) {
	s.writing.Lock()
	defer s.writing.Unlock()
	var w waiter
	defer w.stop()
	sent := 0
	for sent < len(p) {
		n, err := s.writeFrame(p[sent:], &w)
		sent += n
		if err != nil {
			return sent, err
		}
	}
	return sent, nil
}

// writeFrame sends one data frame. Credit comes first and the token second, so that a stream whose far end does not read
// holds no token.
func (s *Stream) writeFrame(p []byte, w *waiter) (int, error) {
	for {
		if s.ending.Load() {
			return 0, s.or(syscall.EPIPE)
		}
		timeout, err := w.until(s.writeDeadline.Load())
		if err != nil {
			return 0, s.or(err)
		}
		n, err := s.reserve(min(len(p), maxSend))
		if err != nil {
			return 0, err
		}
		if n == 0 {
			select {
			case <-s.more:
			case <-s.recut:
			case <-timeout:
			case <-s.done:
			}
			continue
		}
		select {
		case s.link.tokens <- struct{}{}:
		case <-s.recut:
			s.unreserve(n)
			continue
		case <-timeout:
			s.unreserve(n)
			continue
		case <-s.done:
			return 0, s.or(net.ErrClosed)
		}
		if _, err := s.mux.Write(p[:n]); err != nil {
			// The frame was not queued, or the session is dead and tokens are worth nothing.
			s.link.releaseToken()
			if errors.Is(err, yamux.ErrConnectionWriteTimeout) {
				s.link.fail(&Error{reason: "link_lost", text: "tunnel is stuck", cause: err})
			}
			if errors.Is(err, yamux.ErrStreamClosed) {
				return 0, s.or(syscall.EPIPE)
			}
			return 0, s.or(&ResetError{})
		}
		return n, nil
	}
}

// reserve takes up to n bytes of credit.
func (s *Stream) reserve(n int) (int, error) {
	s.link.mu.Lock()
	defer s.link.mu.Unlock()
	switch {
	case s.closed:
		return 0, net.ErrClosed
	case s.err != nil:
		return 0, s.err
	}
	n = int(min(int64(n), s.credit))
	s.credit -= int64(n)
	return n, nil
}

func (s *Stream) unreserve(n int) {
	s.link.mu.Lock()
	s.credit += int64(n)
	s.link.mu.Unlock()
}

// CloseWrite sends a FIN after what was written. The other direction stays open, for as long as it takes.
func (s *Stream) CloseWrite() error {
	s.ending.Store(true)
	notify(s.recut) // a Write that waits gives up
	s.writing.Lock()
	defer s.writing.Unlock()
	if err := s.or(nil); err != nil {
		return err
	}
	return s.mux.Close()
}

// Close ends the stream in both directions, like closing a TCP socket: what was written still arrives, followed by a
// FIN; the far end is reset if it does not send its own FIN within 5 seconds. It never blocks on the far end. After
// both FINs, or a reset, it only frees.
func (s *Stream) Close() error {
	s.release(func() {
		_ = s.CloseWrite()
		s.link.linger(s)
	})
	return nil
}

// Reset drops the stream at once, with what is still queued. The far end sees a reset.
func (s *Stream) Reset() error {
	s.release(func() {})
	s.link.resetStream(s, net.ErrClosed)
	return nil
}

func (s *Stream) release(end func()) {
	s.closeOnce.Do(func() {
		end()
		s.link.total.streamsClosed.Add(1)
		s.link.mu.Lock()
		s.closed = true
		s.link.mu.Unlock()
		notify(s.recut)
		_ = s.mux.SetReadDeadline(time.Unix(1, 0)) // a Read that waits gives up
	})
}

// linger frees s now if it has ended, else when the far end's FIN arrives or the time for it is over.
func (l *link) linger(s *Stream) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.streams[s.id] != s {
		l.resetLocked(s, net.ErrClosed)
		return
	}
	if l.err == nil && l.timer != nil {
		l.lingering = append(l.lingering, lingering{s, time.Now().Add(lingerTime)})
		if len(l.lingering) == 1 {
			l.timer.Reset(0)
		}
	}
}

// lost reports whether the stream was reset, or its tunnel ended before both of its directions had.
func (s *Stream) lost() bool {
	select {
	case <-s.done:
		return true
	default:
		return false
	}
}

// LocalAddr is this end of the tunnel's connection.
func (s *Stream) LocalAddr() net.Addr { return s.link.raw.LocalAddr() }

// RemoteAddr is the far end of the tunnel's connection.
func (s *Stream) RemoteAddr() net.Addr { return s.link.raw.RemoteAddr() }

// SetDeadline sets both deadlines.
func (s *Stream) SetDeadline(t time.Time) error {
	_ = s.SetReadDeadline(t)
	return s.SetWriteDeadline(t)
}

// SetReadDeadline makes reads fail with os.ErrDeadlineExceeded from t on; the zero time means never.
func (s *Stream) SetReadDeadline(t time.Time) error {
	s.readDeadline.Store(timePointer(t))
	if err := s.or(nil); errors.Is(err, net.ErrClosed) {
		return err // keep what release set
	}
	return s.mux.SetReadDeadline(t)
}

// SetWriteDeadline makes writes fail with os.ErrDeadlineExceeded from t on; the zero time means never.
func (s *Stream) SetWriteDeadline(t time.Time) error {
	s.writeDeadline.Store(timePointer(t))
	notify(s.recut)
	return nil
}

func timePointer(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

// waiter is the timer of one Write, made when first needed.
type waiter struct {
	timer *time.Timer
	at    time.Time
}

// until returns a channel that fires at *t, or nil for never.
func (w *waiter) until(t *time.Time) (<-chan time.Time, error) {
	if t == nil {
		return nil, nil
	}
	d := time.Until(*t)
	if d <= 0 {
		return nil, os.ErrDeadlineExceeded
	}
	switch {
	case w.timer == nil:
		w.timer = time.NewTimer(d)
	case !w.at.Equal(*t):
		w.timer.Reset(d)
	}
	w.at = *t
	return w.timer.C, nil
}

func (w *waiter) stop() {
	if w.timer != nil {
		w.timer.Stop()
	}
}
