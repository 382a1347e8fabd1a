// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"errors"
	"io"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/hashicorp/yamux"
)

// A tunnel without streams needs no yamux: 16 KiB and two goroutines, for each of 10,000 tunnels. So the end that opens streams has
// a yamux session only from the first stream on, and until there was none for parkAfter. Between, the link reads the connection by
// itself. Stream numbers go on where they were: what a later yamux session counts from 1 is counted on from link.base.
//
//	read alone ── open ──► yamux reads ── no stream for parkAfter ──► read alone
//
// The reader is fetched back from the connection by a kick: a read deadline in the past.
const parkAfter = 20 * time.Second

// errKicked is what a read returns that was interrupted by a kick. Being temporary, it leaves TLS as it was.
var errKicked error = kicked{}

type kicked struct{}

func (kicked) Error() string   { return "interrupted" }
func (kicked) Timeout() bool   { return true }
func (kicked) Temporary() bool { return true }

// muxConn is the link as one yamux session sees it.
type muxConn struct {
	link   *link
	parked atomic.Bool // that session is over, the link goes on
}

// Read is called by yamux, in the goroutine that reads the session. It deals with frames until there is one that yamux must
// see: headers only, as many as fit. yamux learns of a stream that it was opened (SYN), acknowledged (ACK) and that it has
// ended, which it is told as a reset, however the stream did end. Frames for yamux that others queue meanwhile are seen after
// the next frame from the far end, at the latest after a ping: nothing but yamux's memory of a stream waits for it.
func (c *muxConn) Read(p []byte) (int, error) {
	if len(p) < headerLen {
		return 0, io.ErrShortBuffer
	}
	for !c.parked.Load() {
		if n := c.link.show(p); n > 0 {
			return n, nil
		}
		if err := c.link.receive(); err != nil && !errors.Is(err, errKicked) {
			c.link.fail(linkError(err))
			break
		}
	}
	return 0, io.EOF
}

// Write takes frames from yamux.
func (c *muxConn) Write(p []byte) (int, error) { return c.link.takeFrame(p) }

// Close is called by yamux when it gives up the session.
func (c *muxConn) Close() error {
	if !c.parked.Load() {
		c.link.fail(errClosed)
	}
	return nil
}

// startMux makes the yamux session. Needs mu once the session has started.
func (s *session) startMux() error {
	cfg := &yamux.Config{
		AcceptBacklog:       backlog,
		KeepAliveInterval:   time.Hour,     // not zero, says yamux; not used
		MaxStreamWindowSize: initialWindow, // yamux sees no data
		// Writes to the link never block, so this only ever runs out on a machine that stands still.
		ConnectionWriteTimeout: time.Minute,
		// Zero is "never" for both: the first would close the session because of one slow answer, the second
		// would kill half-closed streams. What bounds them instead is the life of the session.
		StreamOpenTimeout:  0,
		StreamCloseTimeout: 0,
		Logger:             slog.NewLogLogger(s.log.Handler(), slog.LevelDebug-1),
	}
	start := yamux.Server
	if s.link.opener {
		start = yamux.Client
	}
	conn := &muxConn{link: s.link}
	mux, err := start(conn, cfg)
	if err != nil {
		return err
	}
	s.mux, s.muxConn = mux, conn
	return nil
}

// readAlone reads the connection without a yamux session, until one is wanted. Needs mu once the session has started.
func (s *session) readAlone() {
	l, done := s.link, make(chan struct{})
	s.wanted.Store(false)
	s.alone = done
	go func() {
		defer close(done)
		l.in.small = true
		for !s.wanted.Load() {
			if err := l.receive(); err != nil && !errors.Is(err, errKicked) {
				s.ends.enter(going)
				l.fail(linkError(err))
				s.ends.leave()
				break
			}
		}
		l.in.small = false
	}()
}

// borrowMux returns the yamux session, and makes it if there is none. It stays until returnMux.
func (s *session) borrowMux() (*yamux.Session, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return nil, s.link.cause()
	}
	if s.mux == nil {
		s.wanted.Store(true)
		s.link.raw.kick()
		<-s.alone
		s.link.raw.unkick()
		if err := s.startMux(); err != nil {
			return nil, err
		}
	}
	s.users++
	return s.mux, nil
}

func (s *session) returnMux() {
	s.mu.Lock()
	s.users--
	s.mu.Unlock()
}

// park ends the yamux session if nobody needs it. The link's timer calls it.
func (s *session) park() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mux == nil || s.ended || s.users > 0 || s.link.numStreams() > 0 {
		return
	}
	s.muxConn.parked.Store(true)
	s.link.raw.kick()
	_ = s.mux.Close() // waits for its reader
	s.link.raw.unkick()
	s.mux, s.muxConn = nil, nil
	s.link.rebase()
	s.readAlone()
}

// end waits for the goroutines that read, after the link is dead.
func (s *session) end() {
	s.mu.Lock()
	s.ended = true
	mux, alone := s.mux, s.alone
	s.mu.Unlock()
	if mux != nil {
		_ = mux.Close()
	}
	if alone != nil {
		<-alone
	}
}
