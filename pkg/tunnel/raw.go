// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"errors"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	// notSentLowat bounds, in bytes, what waits in the kernel behind what is in flight. Whatever waits there cannot be
	// overtaken: at 10 Mbit/s these are 50 ms for a keystroke.
	notSentLowat = 64 << 10

	tcpUserTimeout  = 18
	tcpNotSentLowat = 25
)

// raw is a connection as it is below TLS. It knows when bytes last arrived, whichever they were: answers to pings queue behind
// bulk data, so that counting only those would declare a busy link dead.
type raw struct {
	net.Conn
	start      time.Time
	heard      atomic.Int64 // when bytes last arrived, as a time since start
	first      [1]byte      // read ahead by awaitFirst
	held       bool
	writeLimit time.Duration // each write makes progress within it, or fails; 0: no limit
	offered    []string      // application protocols in the client hello
	turn       *turn         // of a handshake of our server, until it has ended
	aborted    atomic.Bool
	kicked     atomic.Bool // the read deadline is a kick, see park.go

	mu     sync.Mutex // what is written; TLS itself writes alerts, from the goroutine that reads
	corked bool
	out    []byte // records that wait for uncork
}

// corkSize is how much waits at most: two full records. More fits into no packet that the kernel passes on whole, and comes
// in bursts that congestion controls with pacing (BBR) take apart again with timers.
const corkSize = 32 << 10

func newRaw(c net.Conn) *raw {
	return &raw{Conn: c, start: time.Now()}
}

// tune sets the options of a TCP connection; other connections have none. Failure is not fatal: the options speed things
// up, and our own timers do not depend on them.
func (r *raw) tune(deadAfter time.Duration) {
	r.writeLimit = deadAfter
	sc, ok := r.Conn.(syscall.Conn)
	if !ok {
		return
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return
	}
	_ = rc.Control(func(fd uintptr) {
		_ = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpNotSentLowat, notSentLowat)
		_ = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpUserTimeout, int(deadAfter.Milliseconds()))
	})
}

// awaitFirst waits for the first byte, which the next Read returns. Until then a connection costs little.
func (r *raw) awaitFirst() error {
	n, err := r.Conn.Read(r.first[:])
	r.held = n == 1
	if r.held {
		return nil
	}
	return err
}

func (r *raw) Read(p []byte) (int, error) {
	if r.held && len(p) > 0 {
		r.held = false
		p[0] = r.first[0]
		return 1, nil
	}
	if r.turn != nil {
		r.turn.leave()
	}
	n, err := r.Conn.Read(p)
	if n > 0 {
		r.heard.Store(int64(time.Since(r.start)))
	}
	if err != nil && errors.Is(err, os.ErrDeadlineExceeded) && r.kicked.Load() {
		r.unkick()
		err = errKicked
	}
	if r.turn != nil && err == nil {
		r.turn.enter(going)
	}
	return n, err
}

// kick interrupts a read, or the next one.
func (r *raw) kick() {
	r.kicked.Store(true)
	_ = r.Conn.SetReadDeadline(time.Unix(1, 0))
}

// unkick takes back a kick. Nobody reads, or the reader itself does so.
func (r *raw) unkick() {
	if r.kicked.Swap(false) {
		_ = r.Conn.SetReadDeadline(time.Time{})
	}
}

// Write is called once for each TLS record. Between cork and uncork it gathers several for one system call.
func (r *raw) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.corked {
		return r.write(p)
	}
	r.out = append(r.out, p...)
	if len(r.out) >= corkSize {
		if err := r.flush(); err != nil {
			return 0, err
		}
	}
	return len(p), nil
}

// cork begins to gather.
func (r *raw) cork() {
	r.mu.Lock()
	r.corked = true
	r.mu.Unlock()
}

// uncork writes what was gathered, and later writes at once.
func (r *raw) uncork() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.corked = false
	return r.flush()
}

// trim lets go of the memory.
func (r *raw) trim() {
	r.mu.Lock()
	r.out = nil
	r.mu.Unlock()
}

// flush writes what was gathered. Needs mu.
func (r *raw) flush() error {
	if len(r.out) == 0 {
		return nil
	}
	_, err := r.write(r.out)
	r.out = r.out[:0]
	return err
}

// write sets the limit for each piece, so it is one for progress, not for a whole batch.
func (r *raw) write(p []byte) (int, error) {
	if r.writeLimit > 0 {
		if err := r.Conn.SetWriteDeadline(time.Now().Add(r.writeLimit)); err != nil {
			return 0, err
		}
	}
	return r.Conn.Write(p)
}

// silence is how long nothing has arrived.
func (r *raw) silence() time.Duration {
	return time.Since(r.start) - time.Duration(r.heard.Load())
}

// abort closes the connection with a reset, so that nothing of it stays in the kernel.
func (r *raw) abort() {
	r.aborted.Store(true)
	if t, ok := r.Conn.(*net.TCPConn); ok {
		_ = t.SetLinger(0)
	}
	_ = r.Conn.Close()
}

// closeWrite sends a FIN below TLS, if the connection can.
func (r *raw) closeWrite() bool {
	t, ok := r.Conn.(interface{ CloseWrite() error })
	return ok && t.CloseWrite() == nil
}
