// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"bytes"
	"context"
	"io"
	"sync"
	"testing"
	"time"
)

// say sends text over a new stream, and wants it back.
func say(t *testing.T, p *pair, text []byte) {
	t.Helper()
	s, a := p.open(t)
	go func() {
		echo(context.Background(), a, testHeader)
		a.Close()
	}()
	go func() {
		_, _ = s.Write(text)
		_ = s.CloseWrite()
	}()
	if got, err := io.ReadAll(s); err != nil || !bytes.Equal(got, text) {
		t.Fatalf("%d bytes of %d came back: %v", len(got), len(text), err)
	}
	s.Close()
}

func parked(s *session) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mux == nil
}

// TestParkAndGoOn has streams in many yamux sessions of one tunnel, one after the other.
func TestParkAndGoOn(t *testing.T) {
	p := newPair(t, testSettings())
	if !parked(p.server) {
		t.Error("it begins with a yamux session")
	}
	last := uint32(0)
	for i := range 20 {
		for range i % 3 {
			say(t, p, make([]byte, 100_000))
		}
		eventually(t, "no stream is left", func() bool { return p.server.link.numStreams()+p.agent.link.numStreams() == 0 })
		p.server.park()
		if !parked(p.server) {
			t.Fatal("it has a yamux session still")
		}
		p.server.link.probe(time.Minute)
		p.agent.link.probe(time.Minute)
		p.server.link.mu.Lock()
		id := p.server.link.lastID
		p.server.link.mu.Unlock()
		if used := (id - last) / 2; used > uint32(i%3) || i > 1 && id%2 != 1 {
			t.Errorf("stream %d after %d", id, last)
		}
		last = id
	}
	if last != 2*19-1 {
		t.Errorf("the last of 19 streams has number %d", last)
	}
	say(t, p, []byte("x"))
	mustBeEmpty(t, p)
}

// TestOpenStreamsKeepYamux does not park what is in use.
func TestOpenStreamsKeepYamux(t *testing.T) {
	p := newPair(t, testSettings())
	s, a := p.open(t)
	p.server.park()
	if parked(p.server) {
		t.Error("it was parked with a stream")
	}
	_ = s.Reset()
	_ = a.Reset()
}

// TestParkWhileBusy parks as often as it can while streams come and go, end in the middle of what is being received, and pings fly.
func TestParkWhileBusy(t *testing.T) {
	p := newPair(t, testSettings())
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				p.server.park()
				time.Sleep(100 * time.Microsecond)
			}
		}
	})
	for i := range 30 {
		p.server.link.probe(time.Minute)
		p.agent.link.probe(time.Minute)
		if i%2 == 0 {
			say(t, p, make([]byte, 300_000))
			continue
		}
		s, a := p.open(t)
		go func() { _, _ = a.Write(make([]byte, 1<<20)) }()
		if _, err := io.ReadFull(s, make([]byte, 1+i*3000)); err != nil {
			t.Fatal(err)
		}
		_ = s.Reset()
		_ = a.Reset()
	}
	close(stop)
	wg.Wait()
	if err := p.server.link.cause(); err != nil {
		t.Error(err)
	}
	mustBeEmpty(t, p)
}

// TestIdleTunnelIsParked leaves it to the timer.
func TestIdleTunnelIsParked(t *testing.T) {
	p := newPair(t, testSettings())
	say(t, p, []byte("x"))
	eventually(t, "no stream is left", func() bool { return p.server.link.numStreams() == 0 })
	p.server.link.tick() // sees that there was traffic
	if parked(p.server) {
		t.Error("it was parked at once")
	}
	p.server.link.mu.Lock()
	p.server.link.used = time.Now().Add(-parkAfter)
	p.server.link.mu.Unlock()
	p.server.link.tick()
	if !parked(p.server) {
		t.Error("it was not parked")
	}
	say(t, p, []byte("y"))
}
