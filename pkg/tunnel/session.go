// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"io"
	"log/slog"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/yamux"
)

// counters are shared by all sessions of a Server or an Agent.
type counters struct {
	streamsOpened, streamsClosed, refusedStreams atomic.Uint64
	bytesIn, bytesOut                            atomic.Uint64 // of sessions that have ended
	windows                                      atomic.Int64  // what all streams' windows have beyond the first, see credit.go
}

// session is one yamux session over one TLS connection. It is made before the login is answered, so that it can be found
// and ended, and runs in the goroutine that calls run.
type session struct {
	link    *link
	log     *slog.Logger
	started chan struct{}
	since   time.Time
	wanted  atomic.Bool // whoever reads alone shall stop
	ends    *turnstile  // for what is done at the end; nil: no need to wait

	mu      sync.Mutex // guards what follows, see park.go
	mux     *yamux.Session
	muxConn *muxConn
	users   int           // of mux, that have no stream yet
	alone   chan struct{} // closed when the latest one who reads alone has ended
	ended   bool
}

func newSession(conn io.ReadWriter, r *raw, opener bool, set settings, total *counters, log *slog.Logger) *session {
	s := &session{
		link:    newLink(conn, r, opener, set, total),
		log:     log,
		started: make(chan struct{}),
		since:   time.Now(),
	}
	if opener {
		s.link.onIdle = s.park
	}
	return s
}

// run starts the session, writes until it is dead, and returns when all its goroutines have ended. accept, if not nil, is
// called as a goroutine of its own once the session has started.
func (s *session) run(accept func()) {
	var wg sync.WaitGroup
	s.link.raw.tune(s.link.deadAfter())
	if s.link.opener {
		s.readAlone()
	} else if err := s.startMux(); err != nil {
		s.link.fail(err)
		return
	}
	close(s.started)
	s.link.startTimer()
	if accept != nil {
		wg.Go(accept)
	}
	s.link.writeLoop()
	s.end()
	wg.Wait()
	s.link.total.bytesIn.Add(s.link.bytesIn.Load())
	s.link.total.bytesOut.Add(s.link.bytesOut.Load())
}

// open opens a stream. It waits, as long as ctx allows, for the login to be answered and for a slot.
func (s *session) open(ctx context.Context) (*Stream, error) {
	l := s.link
	select {
	case <-s.started:
	case <-l.dead:
		return nil, l.cause()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	select {
	case l.opens <- struct{}{}:
	case <-l.dead:
		return nil, l.cause()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if l.numStreams() >= l.set.maxStreams {
		<-l.opens
		return nil, ErrOverloaded
	}
	mux, err := s.borrowMux()
	if err != nil {
		l.fail(err)
		return nil, l.cause()
	}
	defer s.returnMux()
	m, err := mux.OpenStream()
	if err != nil {
		// Nothing but the end of the session is left as a cause, or 2^31 streams.
		l.fail(&Error{reason: "exhausted", text: "cannot open streams", cause: err})
		return nil, l.cause()
	}
	return l.claim(m)
}

// accept returns the next stream the far end opened, or the error that ended the session.
func (s *session) accept() (*Stream, error) {
	l := s.link
	m, err := s.mux.AcceptStream()
	if err != nil {
		l.fail(&Error{reason: "link_lost", text: "tunnel failed", cause: err})
		return nil, l.cause()
	}
	return l.claim(m)
}

// claim finds the stream that yamux knows as m. It may have been reset already; its user will see.
func (l *link) claim(m *yamux.Stream) (*Stream, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	id := l.base + m.StreamID()
	s := l.unclaimed[id]
	if s == nil {
		return nil, l.err // fail has dropped it
	}
	delete(l.unclaimed, id)
	l.total.streamsOpened.Add(1)
	return s, nil
}

// kill ends the session now; all its streams are reset.
func (s *session) kill(err error) { s.link.fail(err) }

// finish ends a session after everything queued has been sent, or two seconds. Streams that are still open are reset.
func (s *session) finish(err error) {
	s.link.closeSoon()
	t := time.NewTimer(2 * time.Second)
	defer t.Stop()
	select {
	case <-t.C:
	case <-s.link.dead:
	}
	s.kill(err)
}

// endWith ends the session when ctx ends, after everything queued has been sent: streams that have just ended count on that. The
// function it returns has to be called when the session is over; it waits.
func (s *session) endWith(ctx context.Context) func() {
	finished := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(finished)
		s.finish(errShutdown)
	})
	return func() {
		if !stop() {
			<-finished
		}
	}
}

// retire asks the far end to open no more streams, waits until the last one has ended, and ends the session. It
// returns early if the session dies.
func (s *session) retire(err error) {
	s.link.leave()
	// The far end may have opened a stream before it learnt.
	grace := time.NewTimer(time.Second)
	defer grace.Stop()
	select {
	case <-grace.C:
	case <-s.link.dead:
		return
	}
	for {
		select {
		case <-s.link.empty:
		case <-s.link.dead:
			return
		}
		if s.link.numStreams() == 0 {
			break
		}
		s.link.rearmEmpty()
	}
	s.finish(err)
}

// ending returns a timer that ends the session at t; stop it when the session is over.
func (s *session) endAt(t time.Time, err error) *time.Timer {
	if t.IsZero() {
		return time.AfterFunc(math.MaxInt64, func() {})
	}
	return time.AfterFunc(time.Until(t), func() { s.kill(err) })
}

// rtt is the last measured round trip; 0: none yet.
func (s *session) rtt() time.Duration {
	s.link.mu.Lock()
	defer s.link.mu.Unlock()
	return s.link.rtt
}
