// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

func forKinds(t *testing.T, f func(t *testing.T, wrap func(*net.TCPConn) Conn, watches bool)) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) { t.Parallel(); f(t, k.wrap, k.watches) })
	}
}

func send(t *testing.T, c net.Conn, s string) {
	t.Helper()
	if _, err := io.WriteString(c, s); err != nil {
		t.Fatal(err)
	}
}

func receive(t *testing.T, c net.Conn, want string) {
	t.Helper()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != want {
		t.Fatalf("received %q, %v, want %q", got, err, want)
	}
}

func wantEOF(t *testing.T, c net.Conn) {
	t.Helper()
	if n, err := c.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("read %d, %v, want EOF", n, err)
	}
}

// wantReset reads to the end, which must be a reset and not EOF.
func wantReset(t *testing.T, c net.Conn) {
	t.Helper()
	if _, err := io.Copy(io.Discard, c); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("ended with %v, want a reset", err)
	}
}

func TestHalfClose(t *testing.T) {
	for _, first := range []string{"client", "remote"} {
		t.Run(first+" first", func(t *testing.T) {
			forKinds(t, func(t *testing.T, wrap func(*net.TCPConn) Conn, _ bool) {
				r := start(t, wrap)
				self, other, _ := r.side(t, first)
				send(t, self, "question")
				if err := self.CloseWrite(); err != nil {
					t.Fatal(err)
				}
				receive(t, other, "question")
				wantEOF(t, other)
				// The FIN has come through; only now does the other side begin to speak, in several pieces.
				for i := range 10 {
					send(t, other, fmt.Sprint("answer ", i))
					receive(t, self, fmt.Sprint("answer ", i))
				}
				other.Close()
				wantEOF(t, self)
				if first == "client" {
					r.expect(t, Closed, 8, 80)
				} else {
					r.expect(t, Closed, 80, 8)
				}
			})
		})
	}
}

func TestServerSpeaksFirst(t *testing.T) {
	forKinds(t, func(t *testing.T, wrap func(*net.TCPConn) Conn, _ bool) {
		r := start(t, wrap)
		send(t, r.remote, "220 hello\r\n")
		receive(t, r.client, "220 hello\r\n")
		send(t, r.client, "QUIT\r\n")
		receive(t, r.remote, "QUIT\r\n")
		r.remote.Close()
		wantEOF(t, r.client)
		r.client.Close()
		r.expect(t, Closed, 6, 11)
	})
}

func TestNothingSent(t *testing.T) {
	forKinds(t, func(t *testing.T, wrap func(*net.TCPConn) Conn, _ bool) {
		r := start(t, wrap)
		r.client.Close()
		wantEOF(t, r.remote)
		r.remote.Close()
		r.expect(t, Closed, 0, 0)
	})
}

func TestResetBeforeData(t *testing.T) {
	for _, who := range []string{"client", "remote"} {
		t.Run(who, func(t *testing.T) {
			forKinds(t, func(t *testing.T, wrap func(*net.TCPConn) Conn, _ bool) {
				r := start(t, wrap)
				self, other, reason := r.side(t, who)
				reset(t, self)
				wantReset(t, other)
				if res := r.expect(t, reason, 0, 0); !IsReset(res.Err) {
					t.Errorf("error %v is no reset", res.Err)
				}
			})
		})
	}
}

func TestResetInMidTransfer(t *testing.T) {
	for _, who := range []string{"client", "remote"} {
		t.Run(who, func(t *testing.T) {
			forKinds(t, func(t *testing.T, wrap func(*net.TCPConn) Conn, _ bool) {
				r := start(t, wrap)
				self, other, reason := r.side(t, who)
				go func() { _, _ = io.Copy(self, zeros{}) }() // ends with the reset
				if _, err := io.CopyN(io.Discard, other, 1<<20); err != nil {
					t.Fatal(err)
				}
				reset(t, self)
				wantReset(t, other)
				if res := r.result(t); res.Reason != reason || res.Sent+res.Received < 1<<20 {
					t.Errorf("result %+v, want %s", res, reason)
				}
			})
		})
	}
}

// TestResetOfTheReceiver: it is the write that fails here, or the read of the opposite direction.
func TestResetOfTheReceiver(t *testing.T) {
	for _, who := range []string{"client", "remote"} {
		t.Run(who, func(t *testing.T) {
			forKinds(t, func(t *testing.T, wrap func(*net.TCPConn) Conn, _ bool) {
				r := start(t, wrap)
				self, other, reason := r.side(t, who)
				sender := make(chan error, 1)
				go func() { _, err := io.Copy(other, zeros{}); sender <- err }()
				if _, err := io.CopyN(io.Discard, self, 1<<20); err != nil {
					t.Fatal(err)
				}
				reset(t, self)
				if err := <-sender; !IsReset(err) {
					t.Errorf("sender ended with %v, want a reset", err)
				}
				if res := r.result(t); res.Reason != reason {
					t.Errorf("result %+v, want %s", res, reason)
				}
			})
		})
	}
}

// TestResetAfterOwnHalfClose: the side has sent its FIN, so nobody reads it, and the other is idle, so nobody writes to it.
func TestResetAfterOwnHalfClose(t *testing.T) {
	for _, who := range []string{"client", "remote"} {
		t.Run(who, func(t *testing.T) {
			forKinds(t, func(t *testing.T, wrap func(*net.TCPConn) Conn, watches bool) {
				r := start(t, wrap)
				self, other, reason := r.side(t, who)
				send(t, self, "request")
				if err := self.CloseWrite(); err != nil {
					t.Fatal(err)
				}
				receive(t, other, "request")
				wantEOF(t, other)
				reset(t, self)
				if who == "remote" && !watches {
					// Documented: only a byte that moves tells.
					for len(r.done) == 0 {
						if _, err := other.Write([]byte("x")); err != nil {
							break
						}
						time.Sleep(time.Millisecond)
					}
				} else {
					// A socket in FIN_WAIT2 learns of the reset when it is used; EOF was read above.
					waitFailed(t, other)
				}
				res := r.result(t)
				if res.Reason != reason || res.Err == nil {
					t.Errorf("result %+v, want %s", res, reason)
				}
			})
		})
	}
}

// TestResetAfterOthersHalfClose: the other side's FIN came first, then this side dies.
func TestResetAfterOthersHalfClose(t *testing.T) {
	for _, who := range []string{"client", "remote"} {
		t.Run(who, func(t *testing.T) {
			forKinds(t, func(t *testing.T, wrap func(*net.TCPConn) Conn, _ bool) {
				r := start(t, wrap)
				self, other, reason := r.side(t, who)
				if err := other.CloseWrite(); err != nil {
					t.Fatal(err)
				}
				wantEOF(t, self)
				send(t, self, "half an answer")
				receive(t, other, "half an answer")
				reset(t, self)
				wantReset(t, other)
				if res := r.result(t); res.Reason != reason || res.Sent+res.Received != 14 {
					t.Errorf("result %+v, want %s", res, reason)
				}
			})
		})
	}
}

// TestResetWhileTheOtherIsSlow: the relay is blocked writing to a side that reads nothing, so nobody reads the other.
func TestResetWhileTheOtherIsSlow(t *testing.T) {
	for _, who := range []string{"client", "remote"} {
		t.Run(who, func(t *testing.T) {
			for _, k := range kinds {
				if !k.watches {
					continue
				}
				t.Run(k.name, func(t *testing.T) {
					t.Parallel()
					r := start(t, k.wrap)
					self, other, reason := r.side(t, who)
					fill(t, self)
					reset(t, self)
					r2 := r.result(t) // while other has not read a byte
					if r2.Reason != reason {
						t.Errorf("result %+v, want %s", r2, reason)
					}
					wantReset(t, other)
				})
			}
		})
	}
}

// TestOrderlyEndWhileTheOtherIsSlow: a side that has ended with FINs both ways while its last bytes still wait to be read is
// a closed socket, but no reset.
func TestOrderlyEndWhileTheOtherIsSlow(t *testing.T) {
	forKinds(t, func(t *testing.T, wrap func(*net.TCPConn) Conn, _ bool) {
		r := start(t, wrap)
		if err := r.remote.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		wantEOF(t, r.client)
		n := fill(t, r.client)
		if err := r.client.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		// Take just enough for the client's FIN to come through to the relay's socket.
		var got int64
		for !ended(t, r.client) {
			m, err := io.CopyN(io.Discard, r.remote, 16<<10)
			if got += m; err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Millisecond)
		}
		time.Sleep(stallCheck + stallCheck/2)
		rest, err := io.Copy(io.Discard, r.remote)
		if got+rest != n || err != nil {
			t.Errorf("%d bytes of %d arrived, %v", got+rest, n, err)
		}
		if rest <= BufferSize {
			t.Errorf("only %d bytes were waiting: the relay was not blocked", rest)
		}
		r.expect(t, Closed, n, 0)
	})
}

// ended reports whether the FINs of both ends have been acknowledged.
func ended(t *testing.T, c *net.TCPConn) bool {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var info [4]byte // of TCP_INFO; the first byte is the state
	if err := raw.Control(func(fd uintptr) {
		var v int
		v, err = syscall.GetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_INFO)
		binary.NativeEndian.PutUint32(info[:], uint32(v))
	}); err != nil {
		t.Fatal(err)
	}
	const tcpClose = 7
	return err == nil && info[0] == tcpClose
}

// fill writes to c until nothing has moved for a while and returns how much that was.
func fill(t *testing.T, c *net.TCPConn) (n int64) {
	t.Helper()
	for {
		_ = c.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
		m, err := c.Write(make([]byte, 1<<20))
		n += int64(m)
		if errors.Is(err, os.ErrDeadlineExceeded) && m == 0 {
			return n
		}
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal(err)
		}
	}
}

// waitFailed waits until a socket that has read EOF has been reset.
func waitFailed(t *testing.T, c *net.TCPConn) {
	t.Helper()
	if err := TCP(c).(Watcher).WaitFailed(); !IsReset(err) {
		t.Errorf("ended with %v, want a reset", err)
	}
}

func TestSlowReaderHoldsTheSenderBack(t *testing.T) {
	forKinds(t, func(t *testing.T, wrap func(*net.TCPConn) Conn, _ bool) {
		r := start(t, wrap)
		n := fill(t, r.client) // ends at all only because nothing here queues without bound
		if n > 64<<20 {
			t.Errorf("%d bytes were taken from a sender whose receiver reads nothing", n)
		}
		// The opposite direction is not held up.
		send(t, r.remote, "still here")
		receive(t, r.client, "still here")
		if err := r.client.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if got, err := io.Copy(io.Discard, r.remote); got != n || err != nil {
			t.Errorf("%d bytes of %d arrived, %v", got, n, err)
		}
		r.remote.Close()
		r.expect(t, Closed, n, 10)
	})
}

func TestCancel(t *testing.T) {
	forKinds(t, func(t *testing.T, wrap func(*net.TCPConn) Conn, _ bool) {
		cause := errors.New("draining")
		for _, phase := range []string{"idle", "half-closed", "blocked", "before"} {
			t.Run(phase, func(t *testing.T) {
				r := start(t, wrap)
				switch phase {
				case "idle":
					send(t, r.client, "x")
					receive(t, r.remote, "x")
				case "half-closed":
					_ = r.client.CloseWrite()
					wantEOF(t, r.remote)
				case "blocked":
					fill(t, r.client)
				}
				r.cancel(cause)
				res := r.result(t)
				if res.Reason != Canceled || res.Err != cause {
					t.Errorf("result %+v", res)
				}
				if phase != "half-closed" { // there EOF has been read already
					wantReset(t, r.remote)
				}
				wantReset(t, r.client)
			})
		}
	})
}

func TestBothAreClosed(t *testing.T) {
	for _, how := range []string{"closed", "reset", "canceled"} {
		client, a := tcpPair(t)
		remote, b := tcpPair(t)
		ctx, cancel := context.WithCancel(t.Context())
		switch how {
		case "closed":
			client.Close()
			remote.Close()
		case "reset":
			reset(t, client)
		case "canceled":
			cancel()
		}
		res := new(Relayer).Relay(ctx, TCP(a), TCP(b))
		cancel()
		for _, c := range []*net.TCPConn{a, b} {
			if err := c.SetDeadline(time.Time{}); !errors.Is(err, net.ErrClosed) {
				t.Errorf("%s: %+v: a connection is still open: %v", how, res, err)
			}
			if err := TCP(c).Reset(); err != nil {
				t.Errorf("%s: reset after close: %v", how, err)
			}
		}
	}
}

// A side that the kernel closes, since the process died, is reset: the far end must not take a part for the whole. Close still ends in order.
func TestDeathIsNoEnd(t *testing.T) {
	for _, c := range []struct {
		name  string
		close func(*net.TCPConn, Conn)
		reset bool
	}{
		{"process died", func(c *net.TCPConn, _ Conn) { c.Close() }, true}, // what the kernel does: close without Close
		{"closed", func(_ *net.TCPConn, c Conn) { c.Close() }, false},
	} {
		near, far := tcpPair(t)
		side := TCP(near)
		if _, err := side.Write([]byte("half")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(far, make([]byte, 4)); err != nil {
			t.Fatal(err)
		}
		c.close(near, side)
		_, err := far.Read(make([]byte, 1))
		if IsReset(err) != c.reset || !c.reset && err != io.EOF {
			t.Errorf("%s: the far end reads %v", c.name, err)
		}
	}
}

// TestLeftoverDeadline: the callers use deadlines for the exchange before the relay.
func TestLeftoverDeadline(t *testing.T) {
	client, a := tcpPair(t)
	remote, b := tcpPair(t)
	_ = a.SetDeadline(time.Now().Add(-time.Second))
	_ = b.SetDeadline(time.Now().Add(-time.Second))
	send(t, client, "x")
	client.Close()
	remote.Close()
	if res := new(Relayer).Relay(t.Context(), TCP(a), TCP(b)); res.Reason == ClientError || res.Reason == RemoteError {
		t.Errorf("result %+v", res)
	}
}

func TestOtherErrorsAreNoResets(t *testing.T) {
	broken := errors.New("broken")
	for _, c := range []struct {
		name string
		wrap func(a, b Conn) (Conn, Conn)
		want Reason
	}{
		{"read of a", func(a, b Conn) (Conn, Conn) { return &faulty{Conn: a, read: broken}, b }, ClientError},
		{"read of b", func(a, b Conn) (Conn, Conn) { return a, &faulty{Conn: b, read: broken} }, RemoteError},
		{"write to b", func(a, b Conn) (Conn, Conn) { return a, &faulty{Conn: b, write: broken} }, RemoteError},
		{"end of b", func(a, b Conn) (Conn, Conn) { return a, &faulty{Conn: b, closeWrite: broken} }, RemoteError},
		{"short write to b", func(a, b Conn) (Conn, Conn) { return a, &faulty{Conn: b, short: true} }, RemoteError},
	} {
		t.Run(c.name, func(t *testing.T) {
			client, a := tcpPair(t)
			remote, b := tcpPair(t)
			send(t, client, "xyz")
			if c.name == "end of b" {
				_ = client.CloseWrite()
			}
			ca, cb := c.wrap(TCP(a), TCP(b))
			res := new(Relayer).Relay(t.Context(), ca, cb)
			if res.Reason != c.want || (!errors.Is(res.Err, broken) && !errors.Is(res.Err, io.ErrShortWrite)) {
				t.Errorf("result %+v, want %s", res, c.want)
			}
			if c.name == "short write to b" && res.Sent != 1 {
				t.Errorf("%d bytes counted, want 1", res.Sent)
			}
			wantReset(t, client)
			wantReset(t, remote)
		})
	}
}

type faulty struct {
	Conn
	read, write, closeWrite error
	short                   bool
}

func (f *faulty) Read(b []byte) (int, error) {
	if f.read != nil {
		return 0, f.read
	}
	return f.Conn.Read(b)
}

func (f *faulty) Write(b []byte) (int, error) {
	if f.short {
		return 1, nil
	}
	if f.write != nil {
		return 0, f.write
	}
	return f.Conn.Write(b)
}

func (f *faulty) CloseWrite() error {
	if f.closeWrite != nil {
		return f.closeWrite
	}
	return f.Conn.CloseWrite()
}

func TestIsReset(t *testing.T) {
	for _, err := range []error{syscall.ECONNRESET, syscall.EPIPE, syscall.ENOTCONN, fmt.Errorf("x: %w", &net.OpError{Err: os.NewSyscallError("read", syscall.ECONNRESET)}), streamReset{}} {
		if !IsReset(err) {
			t.Errorf("%v is a reset", err)
		}
	}
	for _, err := range []error{nil, io.EOF, net.ErrClosed, syscall.ETIMEDOUT, os.ErrDeadlineExceeded, context.Canceled} {
		if IsReset(err) {
			t.Errorf("%v is no reset", err)
		}
	}
}

type streamReset struct{}

func (streamReset) Error() string        { return "stream reset" }
func (streamReset) Is(target error) bool { return target == syscall.ECONNRESET }

// TestBulkBothWays sends 64 MiB each way at once, in pieces of uneven size.
func TestBulkBothWays(t *testing.T) {
	forKinds(t, func(t *testing.T, wrap func(*net.TCPConn) Conn, _ bool) {
		const size = 64 << 20
		r := start(t, wrap)
		for _, c := range []*net.TCPConn{r.client, r.remote} {
			_ = c.SetDeadline(time.Now().Add(5 * time.Minute))
		}
		var wg sync.WaitGroup
		transfer := func(from, to *net.TCPConn, seed uint64) {
			sent, got := sha256.New(), sha256.New()
			wg.Go(func() {
				rnd := rand.New(rand.NewPCG(seed, 1))
				block := make([]byte, 1<<20)
				for i := range block {
					block[i] = byte(rnd.Uint32())
				}
				for left := size; left > 0; {
					p := block[:min(left, 1+rnd.IntN(len(block)))]
					if _, err := from.Write(p); err != nil {
						t.Error(err)
						return
					}
					sent.Write(p)
					left -= len(p)
				}
				_ = from.CloseWrite()
			})
			wg.Go(func() {
				if n, err := io.Copy(got, to); n != size || err != nil {
					t.Errorf("%d bytes, %v", n, err)
				}
			})
			t.Cleanup(func() {
				if !bytes.Equal(sent.Sum(nil), got.Sum(nil)) {
					t.Error("the bytes are not the same")
				}
			})
		}
		transfer(r.client, r.remote, 1)
		transfer(r.remote, r.client, 2)
		wg.Wait()
		r.client.Close()
		r.remote.Close()
		r.expect(t, Closed, size, size)
	})
}

// TestIdleHoldsNoBuffer counts the buffers in use with the relay at rest.
func TestIdleHoldsNoBuffer(t *testing.T) {
	for _, k := range kinds[:2] {
		t.Run(k.name, func(t *testing.T) {
			const n = 200
			var relayer Relayer
			ctx, cancel := context.WithCancel(t.Context())
			var wg sync.WaitGroup
			var clients, remotes []*net.TCPConn
			for range n {
				client, a := tcpPair(t)
				remote, b := tcpPair(t)
				clients, remotes = append(clients, client), append(remotes, remote)
				wg.Go(func() { relayer.Relay(ctx, TCP(a), k.wrap(b)) })
			}
			for i := range n {
				send(t, clients[i], "x")
				receive(t, remotes[i], "x")
				send(t, remotes[i], "y")
				receive(t, clients[i], "y")
			}
			var m runtime.MemStats
			runtime.GC()
			runtime.GC() // twice empties the pool
			runtime.ReadMemStats(&m)
			if m.HeapAlloc > n*BufferSize {
				t.Errorf("%d KiB in use for %d idle relays", m.HeapAlloc>>10, n)
			}
			t.Logf("%d KiB of heap, %d KiB of stacks for %d idle relays and their test", m.HeapAlloc>>10, m.StackInuse>>10, n)
			cancel()
			wg.Wait()
		})
	}
}

// TestCanceledAtTheEnd lets the end and the cancellation meet, for the race detector.
func TestCanceledAtTheEnd(t *testing.T) {
	for range 200 {
		r := start(t, TCP)
		var wg sync.WaitGroup
		wg.Go(func() { r.client.Close() })
		wg.Go(func() { r.remote.Close() })
		wg.Go(func() { r.cancel(nil) })
		wg.Wait()
		if res := r.result(t); res.Reason == ClientError || res.Reason == RemoteError {
			t.Fatalf("result %+v", res)
		}
	}
}

// TestStallCheckRuns: without reset nothing happens however often the check runs, and it stops after the write.
func TestStallCheckRuns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := &countingWatcher{}
		dst := &blockingConn{release: make(chan struct{})}
		s := &session{a: src, b: dst}
		s.up, s.down = flow{session: s, src: src, dst: dst}, flow{session: s, src: dst, dst: src}
		s.stall.check = s.check
		for _, asked := range []int32{9, 18} { // not at the first look, which sees that the write is new
			go func() { time.Sleep(10*stallCheck + time.Millisecond); dst.release <- struct{}{} }()
			if _, err := s.up.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			if n := src.asked.Load(); n != asked {
				t.Errorf("asked %d times, want %d", n, asked)
			}
			time.Sleep(time.Hour)
			if n := src.asked.Load(); n != asked || s.stall.armed.Load() {
				t.Errorf("asked %d times after the write, armed: %v", n-asked, s.stall.armed.Load())
			}
		}
		s.stall.stop()
		s.stall.arm()
		if s.stall.armed.Load() {
			t.Error("armed after the end")
		}
	})
}

type countingWatcher struct {
	Conn
	asked atomic.Int32
}

func (c *countingWatcher) Failed() error     { c.asked.Add(1); return nil }
func (c *countingWatcher) WaitFailed() error { return nil }

type blockingConn struct {
	Conn
	release chan struct{}
}

func (c *blockingConn) Write(b []byte) (int, error) { <-c.release; return len(b), nil }

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }
