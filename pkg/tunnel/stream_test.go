// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// The shape that relays need.
var _ interface {
	net.Conn
	CloseWrite() error
	Reset() error
} = (*Stream)(nil)

func mustRead(t *testing.T, s *Stream, want string) {
	t.Helper()
	b := make([]byte, len(want))
	if _, err := io.ReadFull(s, b); err != nil || string(b) != want {
		t.Fatalf("read %q, %v; want %q", b, err, want)
	}
}

func mustWrite(t *testing.T, s *Stream, text string) {
	t.Helper()
	if _, err := s.Write([]byte(text)); err != nil {
		t.Fatal(err)
	}
}

// mustReset checks that both directions of s fail with a reset, reads after what had arrived.
func mustReset(t *testing.T, s *Stream) {
	t.Helper()
	_, err := io.Copy(io.Discard, s)
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("read: %v, want a reset", err)
	}
	var re *ResetError
	if !errors.As(err, &re) {
		t.Fatalf("read: %T, want *ResetError", err)
	}
	if _, err := s.Write([]byte("x")); !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("write: %v, want a reset", err)
	}
}

// mustBeEmpty checks that neither we nor yamux remember any stream.
func mustBeEmpty(t *testing.T, p *pair) {
	t.Helper()
	eventually(t, "no stream is left", func() bool { return p.server.link.numStreams()+p.agent.link.numStreams() == 0 })
	p.server.link.probe(time.Minute) // both ends read a frame, see muxConn.Read
	p.agent.link.probe(time.Minute)
	eventually(t, "yamux remembers no stream", func() bool {
		return remembered(p.server)+remembered(p.agent) == 0 && len(p.server.link.opens) == 0
	})
}

// remembered is how many streams yamux knows.
func remembered(s *session) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mux == nil {
		return 0
	}
	return s.mux.NumStreams()
}

func TestHalfCloseEachWay(t *testing.T) {
	p := newPair(t, testSettings())
	for _, serverFirst := range []bool{true, false} {
		a, b := p.open(t)
		if !serverFirst {
			a, b = b, a
		}
		mustWrite(t, a, "request")
		if err := a.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(b); err != nil || string(got) != "request" {
			t.Fatalf("%q, %v", got, err)
		}
		if _, err := a.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
			t.Fatalf("write after CloseWrite: %v", err)
		}
		// The other direction still works, more than a window of it.
		answer := bytes.Repeat([]byte("answer"), 100_000)
		go func() {
			_, _ = b.Write(answer)
			_ = b.CloseWrite()
		}()
		if got, err := io.ReadAll(a); err != nil || !bytes.Equal(got, answer) {
			t.Fatalf("%d bytes, %v", len(got), err)
		}
		a.Close()
		b.Close()
	}
	mustBeEmpty(t, p)
	if o, c := p.serverTotal.streamsOpened.Load(), p.serverTotal.streamsClosed.Load(); o != 2 || c != 2 {
		t.Errorf("opened %d, closed %d", o, c)
	}
}

func TestResetEachWay(t *testing.T) {
	p := newPair(t, testSettings())
	for _, serverResets := range []bool{true, false} {
		a, b := p.open(t)
		if !serverResets {
			a, b = b, a
		}
		mustWrite(t, a, "x")
		mustRead(t, b, "x")
		blocked := make(chan error, 1)
		go func() {
			_, err := a.Read(make([]byte, 1))
			blocked <- err
		}()
		time.Sleep(10 * time.Millisecond)
		a.Reset()
		if err := <-blocked; !errors.Is(err, net.ErrClosed) {
			t.Errorf("own read: %v", err)
		}
		mustReset(t, b)
		if _, err := a.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
			t.Errorf("own write: %v", err)
		}
		b.Close()
	}
	mustBeEmpty(t, p)
	// The session has not suffered.
	a, b := p.open(t)
	mustWrite(t, a, "still here")
	mustRead(t, b, "still here")
	a.Reset()
	b.Reset()
	mustBeEmpty(t, p)
}

func TestDataBeforeResetArrives(t *testing.T) {
	p := newPair(t, testSettings())
	a, b := p.open(t)
	mustWrite(t, a, "last words")
	eventually(t, "data has arrived", func() bool {
		b.link.mu.Lock()
		defer b.link.mu.Unlock()
		return b.received == 10
	})
	a.Reset()
	_ = b.WaitFailed()
	mustRead(t, b, "last words")
	mustReset(t, b)
	b.Close()
	mustBeEmpty(t, p)
}

func TestResetAfterHalfClose(t *testing.T) {
	p := newPair(t, testSettings())
	a, b := p.open(t)
	mustWrite(t, a, "words")
	if err := a.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the FIN has arrived", func() bool {
		b.link.mu.Lock()
		defer b.link.mu.Unlock()
		return b.finSeen
	})
	b.Reset()
	if _, err := a.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read: %v", err)
	}
	a.Close()
	mustBeEmpty(t, p)
}

func TestResetOfUnansweredStream(t *testing.T) {
	p := newPair(t, testSettings())
	ctx := context.Background()
	for range 3 * maxOpens {
		s, err := p.server.open(ctx)
		if err != nil {
			t.Fatal(err)
		}
		s.Reset()
	}
	go func() {
		for s := range p.accepted {
			s.Close()
		}
	}()
	defer close(p.accepted)
	mustBeEmpty(t, p)
	defer p.close() // before accepted is closed
}

// A reset is noticed by those who wait for it, whether or not there is something to read or the end of data was read; nothing
// else ends the waiting but a deadline and the own end.
func TestWaitFailed(t *testing.T) {
	p := newPair(t, testSettings())
	for name, prepare := range map[string]func(a, b *Stream){
		"idle":      func(a, b *Stream) {},
		"with data": func(a, b *Stream) { mustWrite(t, a, "unread") },
		"after FIN": func(a, b *Stream) { _ = a.CloseWrite(); _, _ = io.ReadAll(b) },
	} {
		for how, end := range map[string]func(a, b *Stream){
			"reset":      func(a, b *Stream) { a.Reset() },
			"own close":  func(a, b *Stream) { b.Close() },
			"own reset":  func(a, b *Stream) { b.Reset() },
			"deadline":   func(a, b *Stream) { b.SetReadDeadline(time.Unix(1, 0)) },
			"deadline 2": func(a, b *Stream) { b.SetReadDeadline(time.Now().Add(5 * time.Millisecond)) },
		} {
			a, b := p.open(t)
			prepare(a, b)
			waited := make(chan error, 2)
			for range 2 {
				go func() { waited <- b.WaitFailed() }()
			}
			time.Sleep(5 * time.Millisecond)
			if len(waited) > 0 {
				t.Errorf("%s, %s: returned early: %v", name, how, <-waited)
			}
			end(a, b)
			for range 2 {
				if err := <-waited; (err != nil) != (how == "reset") || err != nil && !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("%s, %s: %v", name, how, err)
				}
			}
			if err := b.Failed(); (err != nil) != (how == "reset") {
				t.Errorf("%s, %s: failed with %v", name, how, err)
			}
			a.Reset()
			b.Reset()
		}
	}
	mustBeEmpty(t, p)
}

// WriteTo ends like Read would, and gives back an error of its writer.
func TestWriteTo(t *testing.T) {
	p := newPair(t, testSettings())
	data := make([]byte, 5<<20)
	_, _ = rand.NewChaCha8([32]byte{3}).Read(data)
	a, b := p.open(t)
	go func() {
		_, _ = a.Write(data)
		_ = a.CloseWrite()
	}()
	var got bytes.Buffer
	if n, err := b.WriteTo(&got); err != nil || n != int64(len(data)) || !bytes.Equal(got.Bytes(), data) {
		t.Errorf("%d, %v", n, err)
	}
	a.Close()
	b.Close()

	a, b = p.open(t)
	mustWrite(t, a, "last words")
	got.Reset()
	written := make(chan error, 1)
	go func() {
		_, err := b.WriteTo(&got)
		written <- err
	}()
	time.Sleep(5 * time.Millisecond)
	a.Reset()
	if err := <-written; !errors.Is(err, syscall.ECONNRESET) || got.String() != "last words" {
		t.Errorf("%q, %v", got.String(), err)
	}
	b.Close()

	a, b = p.open(t)
	mustWrite(t, a, "12345")
	n, err := b.WriteTo(writerFunc(func([]byte) (int, error) { return 2, io.ErrClosedPipe }))
	if n != 2 || err != io.ErrClosedPipe {
		t.Errorf("%d, %v", n, err)
	}
	mustRead(t, b, "345")
	a.Reset()
	b.Reset()
	mustBeEmpty(t, p)
}

// The far end may have reset a stream before open has returned it.
// What is written later goes with what is written next, and alone if nothing is.
func TestWriteLater(t *testing.T) {
	p := newPair(t, testSettings())
	a, b := p.open(t)
	if err := b.WriteLater([]byte("alone")); err != nil {
		t.Fatal(err)
	}
	mustRead(t, a, "alone")
	if err := b.WriteLater([]byte("with ")); err != nil {
		t.Fatal(err)
	}
	mustWrite(t, b, "company")
	_ = b.CloseWrite()
	if got, err := io.ReadAll(a); err != nil || string(got) != "with company" {
		t.Fatalf("%q, %v", got, err)
	}
	if err := b.WriteLater([]byte("x")); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("after CloseWrite: %v", err)
	}
	a.Close()
	b.Close()
	mustBeEmpty(t, p)
}

// A reset overtakes data, but not what was written later: a status that is lost would be taken for another failure.
func TestResetDoesNotOvertakeWhatWasWrittenLater(t *testing.T) {
	p := newPair(t, testSettings())
	for range 50 {
		a, b := p.open(t)
		if err := b.WriteLater([]byte("status")); err != nil {
			t.Fatal(err)
		}
		_ = b.Reset()
		mustRead(t, a, "status")
		mustReset(t, a)
		_ = a.Close()
	}
	mustBeEmpty(t, p)
}

func TestResetFasterThanOpen(t *testing.T) {
	p := newPair(t, testSettings())
	go func() {
		for {
			select {
			case s := <-p.accepted:
				s.Reset()
			case <-p.server.link.dead:
				return
			}
		}
	}()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 200 {
				s, err := p.server.open(context.Background())
				if err != nil || s == nil {
					t.Errorf("%v, %v", s, err)
					return
				}
				if _, err := s.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("read: %v", err)
				}
				s.Close()
			}
		})
	}
	wg.Wait()
	mustBeEmpty(t, p)
}

// Close delivers what was written, as an agent's refusal needs it, although the far end has sent bytes that nobody read.
func TestCloseDelivers(t *testing.T) {
	p := newPair(t, testSettings())
	a, b := p.open(t)
	mustWrite(t, a, "unread")
	mustWrite(t, b, "refused")
	b.Close()
	if got, err := io.ReadAll(a); err != nil || string(got) != "refused" {
		t.Fatalf("%q, %v", got, err)
	}
	mustWrite(t, a, "still unread") // swallowed
	a.Close()
	mustBeEmpty(t, p)
}

func TestCloseResetsInTheEnd(t *testing.T) {
	p := newPair(t, testSettings())
	a, b := p.open(t)
	b.Close()
	start := time.Now()
	_ = a.WaitFailed()
	if d := time.Since(start); d < lingerTime-time.Second {
		t.Errorf("reset after %v", d)
	}
	mustReset(t, a)
	a.Close()
	mustBeEmpty(t, p)
}

func TestSessionDeathIsAReset(t *testing.T) {
	for _, how := range []string{"connection lost", "killed here", "killed there"} {
		t.Run(how, func(t *testing.T) {
			p := newPair(t, testSettings())
			a, b := p.open(t)
			c, d := p.open(t)
			mustWrite(t, d, "finished")
			d.CloseWrite()
			eventually(t, "the FIN has arrived", func() bool {
				c.link.mu.Lock()
				defer c.link.mu.Unlock()
				return c.finSeen
			})
			read := make(chan error, 2)
			for _, s := range []*Stream{a, b} {
				go func() {
					_, err := io.Copy(io.Discard, s)
					read <- err
				}()
			}
			time.Sleep(10 * time.Millisecond)
			switch how {
			case "connection lost":
				p.agentRaw.Close()
			case "killed here":
				p.server.kill(errClosed)
			case "killed there":
				p.agent.kill(errClosed)
			}
			for range 2 {
				if err := <-read; !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("read: %v, want a reset", err)
				}
			}
			// What truly ended before does so still.
			if got, err := io.ReadAll(c); err != nil || string(got) != "finished" {
				t.Errorf("%q, %v", got, err)
			}
			for _, s := range []*Stream{a, b, c, d} {
				s.Close()
			}
		})
	}
}

func TestStalledReaderStallsNobodyElse(t *testing.T) {
	p := newPair(t, testSettings())
	stalled, _ := p.open(t)
	full := make(chan error, 1)
	go func() {
		_, err := stalled.Write(make([]byte, 64<<20))
		full <- err
	}()
	eventually(t, "the stalled stream has used its credit", func() bool {
		stalled.link.mu.Lock()
		defer stalled.link.mu.Unlock()
		return stalled.credit == 0
	})
	a, b := p.open(t)
	data := make([]byte, 20<<20)
	go func() {
		_, _ = a.Write(data)
		_ = a.CloseWrite()
	}()
	if n, err := io.Copy(io.Discard, b); err != nil || n != int64(len(data)) {
		t.Fatalf("%d, %v", n, err)
	}
	select {
	case err := <-full:
		t.Fatalf("write without a reader ended: %v", err)
	default:
	}
	stalled.Reset()
	if err := <-full; !errors.Is(err, net.ErrClosed) {
		t.Errorf("write: %v", err)
	}
	a.Close()
	b.Close()
}

func TestDeadlines(t *testing.T) {
	p := newPair(t, testSettings())
	a, b := p.open(t)
	check := func(what string, err error) {
		t.Helper()
		var ne net.Error
		if !errors.Is(err, os.ErrDeadlineExceeded) || !errors.As(err, &ne) || !ne.Timeout() {
			t.Errorf("%s: %v", what, err)
		}
	}
	a.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	_, err := a.Read(make([]byte, 1))
	check("read", err)
	a.SetReadDeadline(time.Time{})

	// A deadline that is set while the call waits.
	blocked := make(chan error, 1)
	go func() { _, err := a.Read(make([]byte, 1)); blocked <- err }()
	time.Sleep(10 * time.Millisecond)
	a.SetReadDeadline(time.Unix(1, 0))
	check("blocked read", <-blocked)
	mustWrite(t, b, "x")
	_, err = a.Read(make([]byte, 1))
	check("read with data", err)
	a.SetReadDeadline(time.Time{})
	mustRead(t, a, "x")

	a.SetWriteDeadline(time.Now().Add(time.Second))
	n, err := a.Write(make([]byte, 10<<20))
	check("write", err)
	if n != initialWindow {
		t.Errorf("wrote %d", n)
	}
	a.SetWriteDeadline(time.Time{})
	go func() { _, err := a.Write(make([]byte, 10<<20)); blocked <- err }()
	time.Sleep(10 * time.Millisecond)
	a.SetWriteDeadline(time.Unix(1, 0))
	check("blocked write", <-blocked)
	a.Reset()
	b.Reset()
}

func TestManyStreamsAtOnce(t *testing.T) {
	p := newPair(t, testSettings())
	const n = 700 // more than may be unacknowledged
	go func() {
		for range n {
			s := <-p.accepted
			go func() {
				_, _ = io.Copy(s, s)
				_ = s.CloseWrite()
				_ = s.Close()
			}()
		}
	}()
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
			defer cancel()
			s, err := p.server.open(ctx)
			if err != nil {
				t.Error(err)
				return
			}
			defer s.Close()
			data := make([]byte, rand.IntN(100_000))
			for j := range data {
				data[j] = byte(i + j)
			}
			go func() {
				_, _ = s.Write(data)
				_ = s.CloseWrite()
			}()
			if got, err := io.ReadAll(s); err != nil || !bytes.Equal(got, data) {
				t.Errorf("%d of %d bytes, %v", len(got), len(data), err)
			}
		})
	}
	wg.Wait()
	mustBeEmpty(t, p)
	if o, c := p.agentTotal.streamsOpened.Load(), p.agentTotal.streamsClosed.Load(); o != n || c != n {
		t.Errorf("opened %d, closed %d", o, c)
	}
}

func TestBulkBothWaysIsIntact(t *testing.T) {
	p := newPair(t, testSettings())
	a, b := p.open(t)
	const size = 24 << 20
	var wg sync.WaitGroup
	for _, dir := range [][2]*Stream{{a, b}, {b, a}} {
		sums := make(chan [32]byte, 1)
		wg.Go(func() {
			h := sha256.New()
			src := io.TeeReader(io.LimitReader(rand.NewChaCha8([32]byte{1}), size), h)
			if _, err := io.CopyBuffer(struct{ io.Writer }{dir[0]}, src, make([]byte, 50_000)); err != nil {
				t.Error(err)
			}
			_ = dir[0].CloseWrite()
			sums <- [32]byte(h.Sum(nil))
		})
		wg.Go(func() {
			h := sha256.New()
			if n, err := io.CopyBuffer(h, struct{ io.Reader }{dir[1]}, make([]byte, 7_777)); err != nil || n != size {
				t.Errorf("%d, %v", n, err)
			}
			if [32]byte(h.Sum(nil)) != <-sums {
				t.Error("checksum differs")
			}
		})
	}
	wg.Wait()
	a.Close()
	b.Close()
	mustBeEmpty(t, p)
}

// A key that is pressed while others copy files waits for a few frames, not for the files: it is counted how many bytes
// of others go to TLS between its Write and its own frame. On a slow link these must be few.
func TestSmallWriteWaitsForAFewFrames(t *testing.T) {
	t.Run("fast", func(t *testing.T) { smallWriteWaits(t, 0) })
	t.Run("slow", func(t *testing.T) { smallWriteWaits(t, 20*time.Millisecond) })
}

// smallWriteWaits is the test with a link that takes each batch of frames in the given time.
func smallWriteWaits(t *testing.T, batch time.Duration) {
	const copies = 4
	var seen, pressed, passed atomic.Int64 // bytes written; the same when the key was pressed, and when it went out
	p := newPairSeen(t, testSettings(), func(b []byte, to io.Writer) (int, error) {
		time.Sleep(batch)
		if at := bytes.Index(b, []byte("KEYSTROKE")); at >= 0 {
			passed.Store(seen.Load() + int64(at))
		}
		seen.Add(int64(len(b)))
		return to.Write(b)
	})
	var wg sync.WaitGroup
	var streams []*Stream
	for range copies {
		a, b := p.open(t)
		streams = append(streams, a)
		wg.Go(func() { _, _ = io.Copy(io.Discard, b); b.Close() })
		wg.Go(func() { _, _ = a.Write(make([]byte, 1<<30)); a.Close() })
	}
	key, far := p.open(t)
	var waited []int64
	for range 30 {
		time.Sleep(5 * time.Millisecond)
		pressed.Store(seen.Load())
		mustWrite(t, key, "KEYSTROKE")
		mustRead(t, far, "KEYSTROKE")
		waited = append(waited, passed.Load()-pressed.Load())
	}
	// Only what is being written: neither the queue, nor a frame of each stream that waits. The median, because the
	// scheduler may put us aside before the Write.
	slices.Sort(waited)
	if bound := int64(maxQueue + maxSend + headerLen); waited[15] > bound {
		t.Errorf("%d bytes went before, want at most %d", waited[15], bound)
	}
	for _, s := range streams {
		s.Reset()
	}
	wg.Wait()
	key.Reset()
	far.Reset()
}

// On a link with a long round trip a window must grow beyond the 256 KiB that yamux starts with, and stay inside the
// budget; on one stream of it nobody reads, nothing grows.
func TestWindowGrowsWithNeed(t *testing.T) {
	set := testSettings()
	set.maxWindow, set.budget = 4<<20, 4<<20
	near, far := tcpPair(t)
	near2, far2 := tcpPair(t)
	delayed(t, far, near2, 30*time.Millisecond)
	p := newPairOver(t, set, near, far2)
	eventually(t, "the round trip was measured", func() bool { return p.agent.rtt() >= 50*time.Millisecond })
	a, b := p.open(t)
	go func() {
		_, _ = a.Write(make([]byte, 12<<20))
		_ = a.CloseWrite()
	}()
	if n, err := io.Copy(io.Discard, b); err != nil || n != 12<<20 {
		t.Fatalf("%d, %v", n, err)
	}
	l := b.link
	l.mu.Lock()
	window, budget := b.window, l.budget
	l.mu.Unlock()
	if window < 1<<20 || window > set.maxWindow {
		t.Errorf("window %d", window)
	}
	if budget != set.budget-(window-initialWindow) {
		t.Errorf("budget %d with a window of %d", budget, window)
	}
	a.Reset()
	b.Close()
	mustBeEmpty(t, p)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.budget != set.budget {
		t.Errorf("budget %d at the end", l.budget)
	}
}

// feed lets the next frames of input arrive at a link that scripted made.
func feed(t *testing.T, l *link, hs ...header) {
	t.Helper()
	l.in.src = bytes.NewReader(frames(hs...))
	for range hs {
		if err := l.receive(); err != nil {
			t.Fatal(err)
		}
	}
}

// useCredit lets everything arrive that stream 1 may receive, and then word that there would be more.
func useCredit(t *testing.T, l *link, s *Stream) {
	t.Helper()
	for s.received < s.granted {
		feed(t, l, header{typ: typeData, id: 1, length: uint32(min(s.granted-s.received, maxReceive))})
	}
	feed(t, l, header{typ: typeWindow, id: 1})
}

func mustHaveWindow(t *testing.T, s *Stream, window int) {
	t.Helper()
	l := s.link
	if s.window != window {
		t.Fatalf("the window is %d, want %d", s.window, window)
	}
	want := max(window, int(s.granted-s.consumed)) - initialWindow
	if s.extra != want || l.budget != l.set.budget-want || l.total.windows.Load() != int64(want) {
		t.Fatalf("%d of the budgets are taken, and %d, %d left of them; want %d", s.extra, l.budget, l.total.windows.Load(), want)
	}
}

// A window grows by need and not by time: whatever a window took, it was too small if the far end waits for credit
// when everything has been read.
func TestWindowGrowsWhenBothEndsWait(t *testing.T) {
	l := scripted(frames(), false)
	feed(t, l, header{typ: typeWindow, flags: flagSYN, id: 1})
	s := l.streams[1]
	read := func(n int) { t.Helper(); must(io.ReadFull(s, make([]byte, n))) }

	// The reader is behind: it is what limits. More data shows that the far end had credit meanwhile.
	useCredit(t, l, s)
	read(initialWindow - 1)
	feed(t, l, header{typ: typeData, id: 1, length: 1000})
	read(1001)
	mustHaveWindow(t, s, initialWindow)

	// Without word from the far end nothing is known.
	for s.received < s.granted {
		n := int(min(s.granted-s.received, maxReceive))
		feed(t, l, header{typ: typeData, id: 1, length: uint32(n)})
		read(n)
		if s.consumed > 4*initialWindow {
			break
		}
	}
	mustHaveWindow(t, s, initialWindow)

	for _, window := range []int{4 * initialWindow, 16 * initialWindow, 32 * initialWindow} {
		useCredit(t, l, s)
		read(int(s.received - s.consumed))
		mustHaveWindow(t, s, window)
		feed(t, l, header{typ: typeWindow, id: 1}) // sent before it knew: once is enough
		mustHaveWindow(t, s, window)
	}
	useCredit(t, l, s)
	read(int(s.received - s.consumed))
	mustHaveWindow(t, s, l.set.maxWindow)

	// A stream at rest shrinks to the first window; what was granted can still come, and only then the budget has it again.
	l.mu.Lock()
	for range 10 {
		l.narrow()
	}
	l.mu.Unlock()
	mustHaveWindow(t, s, initialWindow)
	for s.received < s.granted && s.granted-s.consumed > initialWindow {
		feed(t, l, header{typ: typeData, id: 1, length: maxReceive})
		read(maxReceive)
		mustHaveWindow(t, s, initialWindow)
	}
	if s.extra != 0 {
		t.Errorf("%d are still taken", s.extra)
	}
}

func TestWindowsStayInsideTheBudgets(t *testing.T) {
	for name, limit := range map[string]func(*settings){
		"session": func(s *settings) { s.budget = 2 * initialWindow },
		"process": func(s *settings) { s.allWindows = 2 * initialWindow },
	} {
		t.Run(name, func(t *testing.T) {
			l := scripted(frames(), false)
			limit(&l.set)
			l.budget = l.set.budget
			feed(t, l, header{typ: typeWindow, flags: flagSYN, id: 1})
			s := l.streams[1]
			for range 5 {
				useCredit(t, l, s)
				must(io.ReadFull(s, make([]byte, s.received-s.consumed)))
			}
			mustHaveWindow(t, s, 2*initialWindow)
			l.fail(errClosed)
			if l.budget != l.set.budget || l.total.windows.Load() != 0 {
				t.Errorf("%d and %d left at the end", l.budget, l.total.windows.Load())
			}
		})
	}
}

// delayed forwards between two connections, each byte d after it arrived.
func delayed(t *testing.T, a, b net.Conn, d time.Duration) {
	type piece struct {
		at   time.Time
		data []byte
	}
	var wg sync.WaitGroup
	for _, dir := range [][2]net.Conn{{a, b}, {b, a}} {
		pieces := make(chan piece, 4096)
		wg.Go(func() {
			defer close(pieces)
			for {
				buf := make([]byte, 64<<10)
				n, err := dir[0].Read(buf)
				if n > 0 {
					pieces <- piece{time.Now().Add(d), buf[:n]}
				}
				if err != nil {
					return
				}
			}
		})
		wg.Go(func() {
			defer dir[1].Close()
			for p := range pieces {
				time.Sleep(time.Until(p.at))
				if _, err := dir[1].Write(p.data); err != nil {
					for range pieces {
					}
					return
				}
			}
		})
	}
	t.Cleanup(func() { a.Close(); b.Close(); wg.Wait() })
}
