// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// Stream is one intercepted connection in a tunnel, a net.Conn with CloseWrite and Reset. Whoever got it from
// Server.Open, or as the argument of Agent's Handle, closes it (an agent closes it when Handle returns).
//
// Read returns io.EOF only after the FIN of the far end and all data before it; everything else that ends a stream is
// a *ResetError, also the death of the tunnel.
type Stream struct {
	link     *link
	id       uint32
	readable chan struct{} // those who wait in Read, WriteTo or WaitFailed look again
	writable chan struct{} // the same in Write

	reading   sync.Mutex // one Read at a time
	writing   sync.Mutex // one Write at a time; their frames must not mix
	closeOnce sync.Once

	// The rest needs link.mu.
	err     error // why it was reset, by whomever
	closed  bool  // Close or Reset was called
	ending  bool  // CloseWrite was called
	acked   bool  // of a stream we opened: the far end has it
	finSeen bool
	finSent bool

	readBy, writeBy deadline

	pending  []byte // what Write has not queued yet
	later    uint64 // link.takes when WriteLater last wrote; 0: never
	inTurns  bool   // in link.turns or link.fresh
	share    uint64 // see link.fill
	batch    uint64 // of the last frame in link.data, see link.batch
	nextTurn *Stream
	credit   int64 // bytes we may send
	told     bool  // the far end knows that we wait for credit

	in                          inbox
	received, consumed, granted uint64 // see credit.go
	ungranted                   uint32 // granted but not sent yet
	window                      int
	extra                       int    // of the budgets
	blocked                     bool   // the far end waits for credit, and nothing has come since it said so
	widened                     uint64 // received by when the window may grow again
	narrowed                    uint64 // consumed when narrow was last called
}

func newStream(l *link, id uint32) *Stream {
	return &Stream{
		link: l, id: id,
		readable: make(chan struct{}, 1),
		writable: make(chan struct{}, 1),
		credit:   initialWindow,
		granted:  initialWindow,
		window:   initialWindow,
	}
}

// Read reads what has arrived. It works after CloseWrite.
func (s *Stream) Read(p []byte) (int, error) {
	s.reading.Lock()
	defer s.reading.Unlock()
	b, err := s.await()
	if err != nil {
		return 0, err
	}
	n := copy(p, b)
	s.take(n)
	return n, nil
}

// WriteTo reads until the end of data, which is no error, and writes it to w without a buffer of its own.
func (s *Stream) WriteTo(w io.Writer) (written int64, err error) {
	s.reading.Lock()
	defer s.reading.Unlock()
	for {
		b, err := s.await()
		if err == io.EOF {
			return written, nil
		}
		if err != nil {
			return written, err
		}
		n, err := w.Write(b)
		s.take(n)
		written += int64(n)
		if err != nil {
			return written, err
		}
	}
}

// await returns the bytes that are to be read next, when there are any.
func (s *Stream) await() ([]byte, error) {
	l := s.link
	l.mu.Lock()
	defer l.mu.Unlock()
	for {
		b := s.in.front()
		switch {
		case s.closed:
			return nil, s.stop(net.ErrClosed)
		case s.readBy.passed():
			return nil, s.stop(s.or(os.ErrDeadlineExceeded))
		case len(b) > 0:
			return b, nil
		case s.finSeen && !s.resetByPeer():
			return nil, s.stop(io.EOF)
		case s.err != nil:
			return nil, s.stop(s.err)
		}
		l.mu.Unlock()
		<-s.readable
		l.mu.Lock()
	}
}

// resetByPeer tells the reset of a stream from the end of its tunnel, which takes nothing from one that had ended before.
func (s *Stream) resetByPeer() bool {
	e, ok := s.err.(*ResetError)
	return ok && e.Tunnel == nil
}

// stop passes an error on, and lets the next one who waits see it too. Needs link.mu.
func (s *Stream) stop(err error) error {
	notify(s.readable)
	return err
}

// take notes that n bytes of what await returned were read.
func (s *Stream) take(n int) {
	l := s.link
	l.mu.Lock()
	defer l.mu.Unlock()
	if s.closed {
		return // they are gone
	}
	s.in.drop(n)
	l.consume(s, n)
}

// Failed returns the error that the stream died of, nil while it lives or after it ended with FINs.
func (s *Stream) Failed() error {
	s.link.mu.Lock()
	defer s.link.mu.Unlock()
	if s.closed {
		return nil
	}
	return s.err
}

// WaitFailed waits for the error that the stream dies of, whether or not there is something to read. It returns nil when
// the stream was closed by this end, or its read deadline has passed, first.
func (s *Stream) WaitFailed() error {
	l := s.link
	l.mu.Lock()
	defer l.mu.Unlock()
	for {
		switch {
		case s.closed, s.readBy.passed():
			return s.stop(nil)
		case s.err != nil:
			return s.stop(s.err)
		}
		l.mu.Unlock()
		<-s.readable
		l.mu.Lock()
	}
}

// or returns net.ErrClosed or the reset if the stream has ended, else err. Needs link.mu.
func (s *Stream) or(err error) error {
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
	l := s.link
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := s.writeError(); err != nil || len(p) == 0 {
		return 0, err
	}
	s.pending = p
	l.queueTurn(s)
	for len(s.pending) > 0 {
		l.mu.Unlock()
		<-s.writable
		l.mu.Lock()
		if err := s.writeError(); err != nil && len(s.pending) > 0 {
			sent := len(p) - len(s.pending)
			s.pending = nil
			return sent, err
		}
	}
	return len(p), nil
}

// WriteLater is Write for a short message that nobody waits for: it goes with what follows, or alone after a few milliseconds. It does
// not wait for credit, which there has to be.
func (s *Stream) WriteLater(p []byte) error {
	s.writing.Lock()
	defer s.writing.Unlock()
	l := s.link
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := s.writeError(); err != nil {
		return err
	}
	l.queueData(s, p)
	s.later = l.takes
	l.wakeLazily()
	return nil
}

// writeError is why nothing can be written. Needs link.mu.
func (s *Stream) writeError() error {
	switch {
	case s.closed || s.err != nil:
		return s.or(nil)
	case s.ending:
		return syscall.EPIPE
	case s.writeBy.passed():
		return os.ErrDeadlineExceeded
	}
	return nil
}

// CloseWrite sends a FIN after what was written. The other direction stays open, for as long as it takes.
func (s *Stream) CloseWrite() error {
	l := s.link
	l.mu.Lock()
	s.ending = true
	notify(s.writable) // a Write that waits gives up
	l.mu.Unlock()
	s.writing.Lock()
	defer s.writing.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := s.or(nil); err != nil || s.finSent {
		return err
	}
	// After the data of the stream, so not with the control frames.
	q := l.queueOf(s)
	*q = header{typ: typeWindow, flags: flagFIN, id: s.id}.appendTo(*q)
	s.finSent = true
	l.removeIfFinished(s)
	notify(l.wake)
	return nil
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
		l := s.link
		l.total.streamsClosed.Add(1)
		l.mu.Lock()
		defer l.mu.Unlock()
		s.closed = true
		s.in = inbox{}
		s.readBy.set(time.Time{}, l, s.readable)
		s.writeBy.set(time.Time{}, l, s.writable)
	})
}

// wakeAll lets everybody who waits look again.
func (s *Stream) wakeAll() {
	notify(s.readable)
	notify(s.writable)
}

// linger forgets s when the far end's FIN arrives or the time for it is over.
func (l *link) linger(s *Stream) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.streams[s.id] == s && l.err == nil && l.timer != nil {
		l.lingering = append(l.lingering, lingering{s, time.Now().Add(lingerTime)})
		if len(l.lingering) == 1 {
			l.timer.Reset(0)
		}
	}
}

// lost reports whether the stream was reset, or its tunnel ended before both of its directions had.
func (s *Stream) lost() bool {
	s.link.mu.Lock()
	defer s.link.mu.Unlock()
	return s.err != nil
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
func (s *Stream) SetReadDeadline(t time.Time) error { return s.setDeadline(&s.readBy, t, s.readable) }

// SetWriteDeadline makes writes fail with os.ErrDeadlineExceeded from t on; the zero time means never.
func (s *Stream) SetWriteDeadline(t time.Time) error { return s.setDeadline(&s.writeBy, t, s.writable) }

func (s *Stream) setDeadline(d *deadline, t time.Time, wake chan struct{}) error {
	s.link.mu.Lock()
	defer s.link.mu.Unlock()
	if s.closed {
		return net.ErrClosed
	}
	if !d.at.IsZero() || !t.IsZero() {
		d.set(t, s.link, wake)
	}
	return nil
}
