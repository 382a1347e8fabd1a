// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"bytes"
	"errors"
	"io"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/yamux"
)

// stillConn is a net.Conn that never does anything; links under test read and write elsewhere.
type stillConn struct{ net.Conn }

func (stillConn) Close() error                     { return nil }
func (stillConn) SetReadDeadline(time.Time) error  { return nil }
func (stillConn) SetWriteDeadline(time.Time) error { return nil }

type readWriter struct {
	io.Reader
	io.Writer
}

// scripted makes a link that receives input. With opener, streams 1, 3 and 5 have been opened.
func scripted(input []byte, opener bool) *link {
	set := testSettings()
	set.maxStreams = 8
	l := newLink(readWriter{bytes.NewReader(input), io.Discard}, newRaw(stillConn{}), opener, set, new(counters))
	if opener {
		for id := uint32(1); id <= 5; id += 2 {
			l.opens <- struct{}{}
			_, _ = l.takeFrame(header{typ: typeWindow, flags: flagSYN, id: id, length: 1 << 20}.appendTo(nil))
		}
	}
	return l
}

// shown is everything that yamux gets to see before the link fails.
func shown(l *link) []header {
	var all []byte
	buf, c := make([]byte, 4096), &muxConn{link: l}
	for {
		n, err := c.Read(buf)
		all = append(all, buf[:n]...)
		if err != nil {
			break
		}
	}
	var hs []header
	for len(all) > 0 {
		h, err := parseHeader(all)
		if err != nil {
			panic(err)
		}
		hs = append(hs, h)
		all = all[headerLen+h.body():]
	}
	return hs
}

func frames(hs ...header) []byte {
	var b []byte
	for _, h := range hs {
		b = append(h.appendTo(b), make([]byte, h.body())...)
	}
	return b
}

func TestViolationsEndTheSession(t *testing.T) {
	var windowful []header
	for range initialWindow / maxReceive {
		windowful = append(windowful, header{typeData, 0, 1, maxReceive})
	}
	var pings []header
	for range maxPongs + 1 {
		pings = append(pings, header{typePing, flagSYN, 0, 1})
	}
	for name, c := range map[string]struct {
		opener bool
		input  []byte
	}{
		"stream opened by an agent":      {true, frames(header{typeWindow, flagSYN, 2, 0})},
		"stream opened by an agent, odd": {true, frames(header{typeWindow, flagSYN, 7, 0})},
		"even stream":                    {false, frames(header{typeWindow, flagSYN, 2, 0})},
		"stream opened twice":            {false, frames(header{typeWindow, flagSYN, 1, 0}, header{typeWindow, flagSYN, 1, 0})},
		"more than its credit":           {true, frames(append(windowful, header{typeData, 0, 1, 1})...)},
		"data after FIN":                 {true, frames(header{typeWindow, flagFIN, 1, 0}, header{typeData, 0, 1, 1})},
		"two FINs":                       {true, frames(header{typeWindow, flagFIN, 1, 0}, header{typeWindow, flagFIN, 1, 0})},
		"endless credit":                 {true, frames(header{typeWindow, 0, 1, 1 << 30})},
		"frame too long":                 {true, header{typeData, 0, 1, maxReceive + 1}.appendTo(nil)},
		"stream 0":                       {true, frames(header{typeData, 0, 0, 0})},
		"unknown type":                   {true, frames(header{9, 0, 1, 0})},
		"unknown flags":                  {true, frames(header{typeWindow, 1 << 9, 1, 0})},
		"unknown version":                {true, append([]byte{1}, make([]byte, 11)...)},
		"ping with strange flags":        {true, frames(header{typePing, flagFIN, 0, 0})},
		"flood of pings":                 {true, frames(pings...)},
		"go-away for a stream":           {true, frames(header{typeGoAway, 0, 1, 0})},
	} {
		l := scripted(c.input, c.opener)
		shown(l)
		var e *Error
		if err := l.cause(); !errors.As(err, &e) || e.Reason() != "protocol_violation" {
			t.Errorf("%s: %v", name, err)
		}
		for _, s := range l.streams {
			t.Errorf("%s: stream %d is left", name, s.id)
		}
	}
}

// yamux must see one acknowledgement and one end for each stream that was opened, whatever the far end sends.
func TestAcknowledgedOnce(t *testing.T) {
	l := scripted(frames(
		header{typeData, 0, 1, 5},           // without any
		header{typeWindow, flagACK, 1, 0},   // too late
		header{typeWindow, flagRST, 3, 0},   // refused
		header{typeWindow, flagACK, 5, 100}, // as it should be
		header{typeData, flagACK, 5, 3},
		header{typeWindow, flagRST, 5, 0},
		header{typeData, flagACK, 9, 3}, // unknown
	), true)
	got := shown(l)
	want := []header{
		{typeWindow, flagACK, 1, 0}, {typeWindow, flagACK, 3, 0}, {typeWindow, flagRST, 3, 0},
		{typeWindow, flagACK, 5, 0}, {typeWindow, flagRST, 5, 0},
	}
	if !slices.Equal(got, want) {
		t.Errorf("%v\nwant %v", got, want)
	}
	if len(l.opens) != 0 {
		t.Errorf("%d slots are taken", len(l.opens))
	}
}

func TestStreamsOverTheLimitAreReset(t *testing.T) {
	var in []header
	for id := range uint32(20) {
		in = append(in, header{typeWindow, flagSYN, 2*id + 1, 0})
	}
	l := scripted(frames(in...), false)
	c := &muxConn{link: l}
	// Before the end of the input is seen, which fails the link.
	for range 8 {
		if n, err := c.Read(make([]byte, headerLen)); n != headerLen || err != nil {
			t.Fatal(n, err)
		}
	}
	if len(l.streams) != 8 {
		t.Errorf("%d streams", len(l.streams))
	}
	_, _ = c.Read(make([]byte, headerLen))
	if n := l.total.refusedStreams.Load(); n != 12 {
		t.Errorf("%d refused", n)
	}
}

// Many streams write at once; on the wire no frame is longer than we say, and none is torn.
func TestFramesOnTheWire(t *testing.T) {
	var mu sync.Mutex
	var wire bytes.Buffer
	p := newPairSeen(t, testSettings(), func(b []byte, to io.Writer) (int, error) {
		mu.Lock()
		wire.Write(b)
		mu.Unlock()
		return to.Write(b)
	})
	var wg sync.WaitGroup
	for range 5 {
		a, b := p.open(t)
		wg.Go(func() { _, _ = io.Copy(io.Discard, b); b.Close() })
		wg.Go(func() {
			_, _ = a.Write(make([]byte, 1<<20))
			_ = a.CloseWrite()
			a.Close()
		})
	}
	wg.Wait()
	mu.Lock()
	defer mu.Unlock()
	b := wire.Bytes()
	seen := make(map[uint32]int)
	for len(b) > 0 {
		h, err := parseHeader(b)
		if err != nil || h.body() > maxSend {
			t.Fatal(h, err)
		}
		seen[h.id] += h.body()
		b = b[headerLen+h.body():]
	}
	for id, n := range seen {
		if id != 0 && n != 1<<20 {
			t.Errorf("stream %d: %d bytes", id, n)
		}
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

func FuzzFrames(f *testing.F) {
	f.Add(true, frames(header{typeWindow, flagACK, 1, 5}, header{typeData, 0, 1, 7}, header{typeWindow, flagFIN, 1, 0}))
	f.Add(true, frames(header{typeWindow, flagRST, 1, 0}, header{typePing, flagSYN, 0, 7}, header{typeGoAway, 0, 0, 0}))
	f.Add(false, frames(header{typeWindow, flagSYN, 1, 5}, header{typeData, 0, 1, 7}, header{typeData, flagFIN, 1, 3}))
	f.Add(false, frames(header{typeData, flagSYN | flagFIN, 3, 9}, header{typeWindow, flagRST, 3, 0}, header{typeWindow, flagSYN, 3, 0}))
	f.Fuzz(func(t *testing.T, opener bool, input []byte) {
		l := scripted(input, opener)
		syn, ack, end := make(map[uint32]int), make(map[uint32]int), make(map[uint32]int)
		for _, h := range shown(l) {
			if h.typ != typeWindow || h.length != 0 {
				t.Fatalf("%v was shown", h)
			}
			switch {
			case h.flags == flagSYN && !opener:
				syn[h.id]++
			case h.flags == flagACK && opener:
				ack[h.id]++
			case h.flags == flagRST:
				end[h.id]++
			default:
				t.Fatalf("%v was shown", h)
			}
			if syn[h.id] > 1+end[h.id] || ack[h.id] > 1 || end[h.id] > max(syn[h.id], ack[h.id]) {
				t.Fatalf("%v: one too many, or too early", h)
			}
		}
		if l.cause() == nil || len(l.streams) != 0 || l.budget != l.set.budget {
			t.Fatalf("not cleaned up: %v, %d streams", l.cause(), len(l.streams))
		}
	})
}

// The same with yamux on top, and at the end without: whatever arrives, the session ends by itself and nothing hangs.
func FuzzSession(f *testing.F) {
	f.Add(frames(header{typeWindow, flagSYN, 1, 5}, header{typeData, 0, 1, 7}, header{typeWindow, flagFIN, 1, 0}))
	f.Add(frames(header{typeWindow, flagSYN, 1, 5}, header{typeWindow, flagRST, 1, 0}, header{typeData, 0, 1, 70}))
	f.Add(frames(header{typeData, flagSYN | flagRST, 1, 5}, header{typeData, flagSYN | flagFIN, 3, 5}, header{typeData, flagSYN, 3, 5}))
	f.Fuzz(func(t *testing.T, input []byte) {
		set := testSettings()
		session := func(opener bool) *session {
			return newSession(readWriter{bytes.NewReader(input), io.Discard}, newRaw(stillConn{}), opener, set, new(counters), discardLog)
		}
		s := session(false)
		done := make(chan struct{})
		go func() {
			defer close(done)
			s.run(func() {
				for {
					st, err := s.accept()
					if err != nil {
						return
					}
					_ = st.SetReadDeadline(time.Now().Add(time.Second))
					_, err = io.Copy(io.Discard, st)
					var re *ResetError
					if err != nil && !errors.As(err, &re) && !errors.Is(err, net.ErrClosed) {
						t.Errorf("%v", err)
					}
					_ = st.Close()
				}
			})
			session(true).run(nil)
		}()
		select {
		case <-done:
		case <-time.After(10 * time.Second):
			t.Fatal("session does not end")
		}
	})
}

// What BenchmarkStream is measured against.
func rawYamux(b *testing.B, near, far io.ReadWriteCloser) (net.Conn, net.Conn) {
	cfg := yamux.DefaultConfig()
	cfg.LogOutput = io.Discard
	c := must(yamux.Client(near, cfg))
	s := must(yamux.Server(far, cfg))
	b.Cleanup(func() { c.Close(); s.Close() })
	x := must(c.OpenStream())
	return x, must(s.AcceptStream())
}
