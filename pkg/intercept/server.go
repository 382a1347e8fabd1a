// SPDX-License-Identifier: Apache-2.0

package intercept

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/relay"
	"github.com/edge-tunnel/edge-tunnel/pkg/relay/ledger"
)

// ErrClosed is what Add returns once Drain or Close was called.
var ErrClosed = errors.New("interception is closed")

// Server accepts and relays. All methods may be called from any goroutine.
type Server struct {
	cfg   Config
	book  *ledger.Book[facts]
	nodes *nodes
	pods  *pods

	ctx    context.Context // ends when open connections must be reset
	cancel context.CancelFunc
	wg     sync.WaitGroup // accept loops and connections

	mu        sync.Mutex // guards listeners; held while the first of wg is added
	listeners map[net.Listener]chan struct{}

	relayer relay.Relayer

	acceptErrors, retried atomic.Uint64
}

// New returns a server without listeners. It must be closed.
func New(cfg Config) (*Server, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg.setDefaults()
	ctx, cancel := context.WithCancel(context.Background())
	return &Server{
		cfg:       cfg,
		book:      ledger.New[facts](cfg.MaxConns, reasons()...),
		nodes:     newNodes(cfg.MaxConnsPerNode),
		pods:      newPods(cfg.MaxConnsPerPod, cfg.MaxConnsPerNode),
		ctx:       ctx,
		cancel:    cancel,
		listeners: make(map[net.Listener]chan struct{}),
	}, nil
}

// Add starts to accept on a TCP listener, which the server owns from now on, also when Add fails with ErrClosed.
func (s *Server) Add(ln net.Listener) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.book.Closed() {
		ln.Close()
		return ErrClosed
	}
	ended := make(chan struct{})
	s.listeners[ln] = ended
	s.wg.Go(func() {
		defer close(ended)
		s.accept(ln)
	})
	return nil
}

// Remove closes a listener that was added, and waits for its accept loop. Connections that it accepted stay.
func (s *Server) Remove(ln net.Listener) {
	s.mu.Lock()
	ended, ok := s.listeners[ln]
	delete(s.listeners, ln)
	s.mu.Unlock()
	if ok {
		ln.Close()
		<-ended
	}
}

// Stop closes all listeners and waits for their accept loops. Open connections go on.
func (s *Server) Stop() {
	s.mu.Lock()
	s.book.Close() // before the listeners: what is accepted from here on is reset
	var loops []chan struct{}
	for ln, ended := range s.listeners {
		ln.Close()
		loops = append(loops, ended)
	}
	clear(s.listeners)
	s.mu.Unlock()
	for _, ended := range loops {
		<-ended
	}
}

// Drain stops accepting, lets open connections finish until ctx ends, and resets the rest. It returns the number of those
// that were reset, when all goroutines have ended. Called again it waits for the same end.
func (s *Server) Drain(ctx context.Context) (reset int) {
	s.Stop()
	if s.book.Wait(ctx) != nil {
		reset = s.book.Stats().Open
	}
	s.cancel()
	s.wg.Wait()
	return reset
}

// Close stops accepting and resets all connections.
func (s *Server) Close() {
	now, cancel := context.WithCancel(context.Background())
	cancel()
	s.Drain(now)
}

// Forget drops the totals of a node that is gone, at the latest when its last connection has ended.
func (s *Server) Forget(node string) { s.nodes.forget(node) }

// Stats are the server's totals.
type Stats struct {
	ledger.Stats        // of accepted connections; the overflowed ones were reset at once
	Listeners    int    // accepting now
	AcceptErrors uint64 // failed accepts: out of descriptors or memory
	Retried      uint64 // connections that had a second try
	Nodes        map[string]NodeStats
}

// Stats returns the present totals.
func (s *Server) Stats() Stats {
	s.mu.Lock()
	listeners := len(s.listeners)
	s.mu.Unlock()
	return Stats{
		Stats:        s.book.Stats(),
		Listeners:    listeners,
		AcceptErrors: s.acceptErrors.Load(),
		Retried:      s.retried.Load(),
		Nodes:        s.nodes.stats(),
	}
}

// Pauses after a failed accept.
const (
	minPause = 5 * time.Millisecond
	maxPause = time.Second
)

// accept is the loop of one listener. It ends when the listener is closed, and for no other reason: a process that is
// out of descriptors today must not be deaf tomorrow.
func (s *Server) accept(ln net.Listener) {
	defer ln.Close()
	pause := time.Duration(0)
	for {
		conn, err := ln.Accept()
		if err == nil {
			pause = 0
			s.accepted(conn)
			continue
		}
		if errors.Is(err, net.ErrClosed) {
			return
		}
		s.acceptErrors.Add(1)
		if pause == 0 { // the first of a row
			s.cfg.Logger.Warn("accept failed", "listener", ln.Addr().String(), "error", err)
		}
		pause = min(max(2*pause, minPause), maxPause)
		if !s.sleep(ln, pause) {
			return
		}
	}
}

// sleep waits, and reports false when the listener was removed meanwhile.
func (s *Server) sleep(ln net.Listener, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-s.ctx.Done():
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	_, ok := s.listeners[ln]
	return ok
}

// accepted starts the goroutine of a connection, or resets it.
func (s *Server) accepted(conn net.Conn) {
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		conn.Close()
		s.cfg.Logger.Error("listener is not a TCP listener", "type", fmt.Sprintf("%T", conn))
		return
	}
	entry, ok := s.book.Begin(time.Now())
	if !ok {
		relay.TCP(tcp).Reset()
		return
	}
	s.wg.Go(func() { s.handle(tcp, entry) })
}
