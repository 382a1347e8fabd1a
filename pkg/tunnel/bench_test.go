// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"testing"
	"time"
)

func tlsPair(b *testing.B) (near, far *tls.Conn) {
	ca := newPKI(b)
	x, y := tcpPair(b)
	near, far = tls.Client(x, ca.client(b, "edge", time.Hour)), tls.Server(y, ca.server(b, "cloud"))
	done := make(chan error, 1)
	go func() { done <- far.Handshake() }()
	if err := near.Handshake(); err != nil {
		b.Fatal(err)
	}
	if err := <-done; err != nil {
		b.Fatal(err)
	}
	return near, far
}

func bulk(b *testing.B, from io.Writer, to io.Reader, end func() error) {
	const piece = 64 << 10
	b.SetBytes(piece)
	b.ReportAllocs()
	done := make(chan error, 1)
	go func() {
		_, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{to}, make([]byte, piece))
		done <- err
	}()
	buf := make([]byte, piece)
	for b.Loop() {
		if _, err := from.Write(buf); err != nil {
			b.Fatal(err)
		}
	}
	if err := end(); err != nil {
		b.Fatal(err)
	}
	if err := <-done; err != nil {
		b.Fatal(err)
	}
}

// One stream, one direction: ours, yamux as released over the same TLS, and TLS alone.
func BenchmarkBulk(b *testing.B) {
	b.Run("tunnel", func(b *testing.B) {
		p := newPair(b, testSettings())
		s, a := p.open(b)
		bulk(b, s, a, s.CloseWrite)
	})
	b.Run("yamux", func(b *testing.B) {
		near, far := tlsPair(b)
		s, a := rawYamux(b, near, far)
		bulk(b, s, a, s.Close)
	})
	b.Run("tls", func(b *testing.B) {
		near, far := tlsPair(b)
		bulk(b, near, far, near.Close)
	})
}

// A byte there and back.
func BenchmarkRoundTrip(b *testing.B) {
	run := func(b *testing.B, s, a net.Conn) {
		go func() { _, _ = io.Copy(struct{ io.Writer }{a}, struct{ io.Reader }{a}) }()
		buf := make([]byte, 1)
		b.ReportAllocs()
		for b.Loop() {
			if _, err := s.Write(buf); err != nil {
				b.Fatal(err)
			}
			if _, err := io.ReadFull(s, buf); err != nil {
				b.Fatal(err)
			}
		}
		_ = s.Close()
	}
	b.Run("tunnel", func(b *testing.B) {
		p := newPair(b, testSettings())
		s, a := p.open(b)
		run(b, s, a)
	})
	b.Run("yamux", func(b *testing.B) {
		near, far := tlsPair(b)
		s, a := rawYamux(b, near, far)
		run(b, s, a)
	})
}

// Open, a byte there and back, close.
func BenchmarkOpen(b *testing.B) {
	p := newPair(b, testSettings())
	go func() {
		for {
			select {
			case a := <-p.accepted:
				buf := make([]byte, 1)
				_, _ = a.Read(buf)
				_, _ = a.Write(buf)
				_ = a.CloseWrite()
				_, _ = a.Read(buf)
				_ = a.Close()
			case <-p.server.link.dead:
				return
			}
		}
	}()
	buf := make([]byte, 1)
	b.ReportAllocs()
	for b.Loop() {
		s, err := p.server.open(context.Background())
		if err != nil {
			b.Fatal(err)
		}
		_, _ = s.Write(buf)
		_ = s.CloseWrite()
		if got, err := io.ReadAll(s); err != nil || len(got) != 1 {
			b.Fatal(got, err)
		}
		_ = s.Close()
	}
}
