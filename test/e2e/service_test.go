// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/relay"
)

// serve serves a port on the node's first address and returns it. Each connection is handled in a goroutine of its own and closed when
// that returns; everything is closed with the test.
func (h *host) serve(port uint16, handle func(*net.TCPConn)) netip.AddrPort {
	h.t.Helper()
	return h.serveAt(h.at(port), handle)
}

// serveAt is serve for another address of the node.
func (h *host) serveAt(addr netip.AddrPort, handle func(*net.TCPConn)) netip.AddrPort {
	h.t.Helper()
	ln, err := h.listen(addr, 0)
	if err != nil {
		h.t.Fatalf("listen on %s of %s: %v", addr, h.Name, err)
	}
	var (
		wg   sync.WaitGroup
		mu   sync.Mutex
		open = make(map[*net.TCPConn]struct{})
		over bool
	)
	wg.Go(func() {
		for {
			conn, err := ln.AcceptTCP()
			if err != nil {
				return
			}
			mu.Lock()
			if over {
				mu.Unlock()
				conn.Close()
				return
			}
			open[conn] = struct{}{}
			mu.Unlock()
			wg.Go(func() {
				handle(conn)
				conn.Close()
				mu.Lock()
				delete(open, conn)
				mu.Unlock()
			})
		}
	})
	h.t.Cleanup(func() {
		ln.Close()
		mu.Lock()
		over = true
		for conn := range open {
			conn.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return addr
}

// echo sends back what comes, and the end after it.
func echo(conn *net.TCPConn) { _, _ = io.Copy(conn, conn) }

// sink reads to the end, then answers with the SHA-256 of what came.
func sink(conn *net.TCPConn) {
	sum := sha256.New()
	if _, err := io.Copy(sum, conn); err == nil {
		_, _ = conn.Write(sum.Sum(nil))
	}
}

// source sends n zeros and then the end; less than nothing is without end.
func source(n int64) func(*net.TCPConn) {
	return func(conn *net.TCPConn) {
		piece := make([]byte, 64<<10)
		for n < 0 {
			if _, err := conn.Write(piece); err != nil {
				return
			}
		}
		_, _ = io.Copy(conn, io.LimitReader(zeros{}, n))
		_ = conn.CloseWrite()
		_, _ = io.Copy(io.Discard, conn)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// greeting is what greet says first.
const greeting = "220 who are you?\r\n"

// greet speaks first, as SSH and SMTP servers do, then echoes.
func greet(conn *net.TCPConn) {
	if _, err := io.WriteString(conn, greeting); err == nil {
		echo(conn)
	}
}

// hold accepts and says nothing until the other end is done.
func hold(conn *net.TCPConn) { _, _ = io.Copy(io.Discard, conn) }

// exchange sends a message to an echo and checks what comes back.
func exchange(conn net.Conn, message string) error {
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	defer func() { _ = conn.SetDeadline(time.Time{}) }()
	if _, err := io.WriteString(conn, message); err != nil {
		return err
	}
	got := make([]byte, len(message))
	if _, err := io.ReadFull(conn, got); err != nil {
		return fmt.Errorf("read the echo: %w", err)
	}
	if !bytes.Equal(got, []byte(message)) {
		return fmt.Errorf("the echo of %q is %q", message, got)
	}
	return nil
}

// mustEcho connects from the host to an echo at addr and uses it.
func (h *host) mustEcho(addr netip.AddrPort) {
	h.t.Helper()
	conn := h.mustDial(addr)
	if err := exchange(conn, "hello "+addr.String()); err != nil {
		h.t.Fatalf("echo at %s from %s: %v", addr, h.Name, err)
	}
	conn.Close()
}

// waitReset reads until the connection is reset, which must be within the limit. Data that comes first is dropped; an orderly end fails.
func waitReset(t *testing.T, conn net.Conn, limit time.Duration) {
	t.Helper()
	if err := conn.SetReadDeadline(time.Now().Add(limit)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, conn); !relay.IsReset(err) {
		t.Fatalf("connection to %s ended with %v, want a reset within %v", conn.RemoteAddr(), err, limit)
	}
}

// wantReset connects from the host and fails unless the connection is reset within the limit. That may be so early that connect() itself
// says so, and then there is nothing to read from.
func (h *host) wantReset(addr fmt.Stringer, o dialOptions, limit time.Duration) {
	h.t.Helper()
	conn, _, err := h.dialWith(addr, o)
	switch {
	case err == nil:
		waitReset(h.t, conn, limit)
	case !errors.Is(err, syscall.ECONNRESET):
		h.t.Fatalf("dial %s from %s: %v, want a reset", addr, h.Name, err)
	}
}

// wantErrno fails unless a connect failed with that.
func wantErrno(t *testing.T, err error, want syscall.Errno) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("got %v, want %v", err, want)
	}
}
