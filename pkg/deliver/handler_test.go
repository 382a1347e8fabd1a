// SPDX-License-Identifier: Apache-2.0

package deliver_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/edge-tunnel/edge-tunnel/pkg/deliver"
	"github.com/edge-tunnel/edge-tunnel/pkg/relay"
	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	self = netip.MustParseAddr("127.0.0.2") // the node's "own" address of these tests
	src  = netip.MustParseAddrPort("10.1.0.1:40000")
)

// lab is a handler, an edge service, and the log.
type lab struct {
	t       *testing.T
	handler *deliver.Handler
	service net.Listener
	dst     netip.AddrPort // the service
	handles sync.WaitGroup
	log     *logBuffer
}

func newLab(t *testing.T, change func(*deliver.Config)) *lab {
	t.Helper()
	l := &lab{t: t, log: &logBuffer{}, service: listen(t, self.String()+":0")}
	l.dst = l.service.Addr().(*net.TCPAddr).AddrPort()
	cfg := deliver.Config{
		Policy: deliver.Policy{Allow: rules(t, self.String()+":*")},
		Logger: slog.New(slog.NewJSONHandler(l.log, nil)),
	}
	if change != nil {
		change(&cfg)
	}
	var err error
	if l.handler, err = deliver.New(cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		l.handler.Close()
		l.handles.Wait()
		s := l.handler.Stats()
		var ended uint64
		for _, n := range s.Ended {
			ended += n
		}
		if s.Open != 0 || s.Begun != ended || s.Dialing != 0 || s.Ended["other"] != 0 {
			t.Errorf("after Close: %+v", s)
		}
	})
	return l
}

func listen(t *testing.T, addr string) net.Listener {
	t.Helper()
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(context.Background(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln
}

// open hands the handler a stream with this destination and returns the server's end of it.
func (l *lab) open(dst netip.AddrPort) *net.TCPConn {
	l.t.Helper()
	ln := listen(l.t, "127.0.0.1:0")
	defer ln.Close()
	conn, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	far, err := ln.Accept()
	if err != nil {
		l.t.Fatal(err)
	}
	l.handles.Go(func() {
		l.handler.Handle(context.Background(), "cloud-1", relay.TCP(far.(*net.TCPConn)),
			wire.Header{Kind: wire.KindConnect, Trace: 0xabc, Dst: dst, Src: src})
	})
	return conn.(*net.TCPConn)
}

// accept is the service's end of the next connection.
func (l *lab) accept() *net.TCPConn {
	l.t.Helper()
	l.service.(*net.TCPListener).SetDeadline(time.Now().Add(10 * time.Second))
	conn, err := l.service.Accept()
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	return conn.(*net.TCPConn)
}

func expectStatus(t *testing.T, stream io.Reader, want wire.Status) wire.Reply {
	t.Helper()
	reply, err := wire.ReadReply(stream)
	if err != nil || reply.Status != want {
		t.Fatalf("reply %v %q, %v, want %v", reply.Status, reply.Message, err, want)
	}
	return reply
}

func expect(t *testing.T, r io.Reader, want string) {
	t.Helper()
	buf := make([]byte, len(want))
	if n, err := io.ReadFull(r, buf); err != nil || string(buf) != want {
		t.Fatalf("read %.40q, %v, want %.40q", buf[:n], err, want)
	}
}

func expectEOF(t *testing.T, r io.Reader) {
	t.Helper()
	if n, err := r.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Fatalf("read %d bytes, %v, want the end of data", n, err)
	}
}

func expectReset(t *testing.T, r io.Reader) {
	t.Helper()
	if _, err := io.Copy(io.Discard, r); !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("read ended with %v, want a reset", err)
	}
}

func send(t *testing.T, w io.Writer, text string) {
	t.Helper()
	if _, err := io.WriteString(w, text); err != nil {
		t.Fatal(err)
	}
}

func reset(c *net.TCPConn) {
	c.SetLinger(0)
	c.Close()
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 2000 {
		if ok() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("%s: did not happen", what)
}

// ended waits for the end of the only stream, and returns its access record.
func (l *lab) ended(reason string) map[string]any {
	l.t.Helper()
	l.handles.Wait()
	if s := l.handler.Stats(); s.Ended[reason] != 1 || s.Begun != 1 {
		l.t.Fatalf("ended %v of %d, want one %s", s.Ended, s.Begun, reason)
	}
	return l.log.record(l.t)
}

type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

// record is the one access record, without its times.
func (b *logBuffer) record(t *testing.T) map[string]any {
	t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	var r map[string]any
	if err := json.Unmarshal(b.b.Bytes(), &r); err != nil {
		t.Fatalf("want one record, have %q", b.b.Bytes())
	}
	if d, _ := r["duration"].(float64); d <= 0 {
		t.Errorf("duration is %v", r["duration"])
	}
	delete(r, "duration")
	delete(r, "time")
	return r
}

func TestServiceSpeaksFirst(t *testing.T) {
	l := newLab(t, nil)
	stream := l.open(l.dst)
	service := l.accept()
	expectStatus(t, stream, wire.StatusOK)
	send(t, service, "220 ready\r\n")
	expect(t, stream, "220 ready\r\n")
	send(t, stream, "EHLO\r\n")
	expect(t, service, "EHLO\r\n")

	eventually(t, "open", func() bool {
		c := l.handler.Connections()
		return len(c) == 1 && c[0].State == "open" && c[0].Sent == 6
	})
	c := l.handler.Connections()[0]
	if c.Dialed != l.dst || c.Dst != l.dst || c.Src != src || c.Server != "cloud-1" || c.Trace != "0000000000000abc" {
		t.Errorf("connection %+v", c)
	}

	stream.CloseWrite()
	expectEOF(t, service)
	service.Close()
	expectEOF(t, stream)
	got := l.ended("closed")
	want := map[string]any{
		"level": "INFO", "msg": "connection", "trace": "0000000000000abc", "server": "cloud-1", "src": "10.1.0.1:40000",
		"dst": l.dst.String(), "dialed": l.dst.String(), "sent": 6.0, "received": 11.0, "reason": "closed",
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("record\n%v, want\n%v", got, want)
	}
}

// slowDial holds back every dial until it is released, or its context ends.
func slowDial(c *deliver.Config) (dialing chan netip.AddrPort, release chan struct{}) {
	dialing, release = make(chan netip.AddrPort, 100), make(chan struct{})
	c.Dial = func(ctx context.Context, target netip.AddrPort) (*net.TCPConn, error) {
		dialing <- target
		select {
		case <-release:
			var d net.Dialer
			return d.DialTCP(ctx, "tcp", netip.AddrPort{}, target)
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	return dialing, release
}

func TestBytesDuringTheDialAreDelivered(t *testing.T) {
	payload := strings.Repeat("0123456789abcdef", 64<<10) // 1 MiB
	var dialing chan netip.AddrPort
	var release chan struct{}
	l := newLab(t, func(c *deliver.Config) { dialing, release = slowDial(c) })
	stream := l.open(l.dst)
	<-dialing
	go func() {
		io.WriteString(stream, payload)
		stream.CloseWrite()
	}()
	time.Sleep(10 * time.Millisecond) // some arrive during the dial, the rest after it
	if state := l.handler.Connections()[0].State; state != "dialing" {
		t.Errorf("state %s", state)
	}
	close(release)
	service := l.accept()
	expect(t, service, payload)
	expectEOF(t, service)
	send(t, service, "thanks")
	service.Close()
	expectStatus(t, stream, wire.StatusOK)
	expect(t, stream, "thanks")
	expectEOF(t, stream)
	if r := l.ended("closed"); r["sent"] != float64(len(payload)) || r["received"] != 6.0 {
		t.Errorf("record %v", r)
	}
}

func TestEndOfDataDuringTheDialIsDelivered(t *testing.T) {
	var dialing chan netip.AddrPort
	var release chan struct{}
	l := newLab(t, func(c *deliver.Config) { dialing, release = slowDial(c) })
	stream := l.open(l.dst)
	<-dialing
	send(t, stream, "all")
	stream.CloseWrite()
	time.Sleep(10 * time.Millisecond) // they arrive during the dial
	close(release)
	service := l.accept()
	expect(t, service, "all")
	expectEOF(t, service)
	send(t, service, "answer")
	service.Close()
	expectStatus(t, stream, wire.StatusOK)
	expect(t, stream, "answer")
	expectEOF(t, stream)
	l.ended("closed")
}

func TestServiceHalfCloses(t *testing.T) {
	l := newLab(t, nil)
	stream := l.open(l.dst)
	service := l.accept()
	expectStatus(t, stream, wire.StatusOK)
	service.CloseWrite()
	expectEOF(t, stream)
	send(t, stream, "still here")
	expect(t, service, "still here")
	stream.CloseWrite()
	expectEOF(t, service)
	l.ended("closed")
}

func TestResets(t *testing.T) {
	t.Run("stream, during the dial", func(t *testing.T) {
		var dialing chan netip.AddrPort
		l := newLab(t, func(c *deliver.Config) { dialing, _ = slowDial(c) })
		stream := l.open(l.dst)
		<-dialing
		reset(stream)
		l.ended("client_reset") // though the dial would have gone on for 10 s
	})
	t.Run("stream, after the status", func(t *testing.T) {
		l := newLab(t, nil)
		stream := l.open(l.dst)
		service := l.accept()
		expectStatus(t, stream, wire.StatusOK)
		reset(stream)
		expectReset(t, service)
		l.ended("client_reset")
	})
	t.Run("service", func(t *testing.T) {
		l := newLab(t, nil)
		stream := l.open(l.dst)
		service := l.accept()
		expectStatus(t, stream, wire.StatusOK)
		reset(service)
		expectReset(t, stream)
		l.ended("remote_reset")
	})
}

func TestFailedDials(t *testing.T) {
	fail := func(err error) func(*deliver.Config) {
		return func(c *deliver.Config) {
			c.Dial = func(context.Context, netip.AddrPort) (*net.TCPConn, error) {
				return nil, &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", err)}
			}
		}
	}
	for _, c := range []struct {
		status wire.Status
		change func(*deliver.Config)
	}{
		{wire.StatusRefused, fail(syscall.ECONNREFUSED)},
		{wire.StatusRefused, fail(syscall.ECONNRESET)},
		{wire.StatusUnreachable, fail(syscall.EHOSTUNREACH)},
		{wire.StatusUnreachable, fail(syscall.ENETUNREACH)},
		{wire.StatusUnreachable, fail(syscall.EPERM)},
		{wire.StatusOverloaded, fail(syscall.EMFILE)},
		{wire.StatusOverloaded, fail(syscall.EADDRNOTAVAIL)},
		{wire.StatusTimedOut, fail(syscall.ETIMEDOUT)},
		{wire.StatusInternal, fail(syscall.ENOSYS)},
		{wire.StatusNotAllowed, func(c *deliver.Config) { c.Policy = deliver.Policy{} }},
		{wire.StatusTimedOut, func(c *deliver.Config) {
			c.DialTimeout = 20 * time.Millisecond
			slowDial(c)
		}},
	} {
		t.Run(c.status.String(), func(t *testing.T) {
			l := newLab(t, c.change)
			stream := l.open(l.dst)
			send(t, stream, "never delivered")
			reply := expectStatus(t, stream, c.status)
			expectEOF(t, stream)
			reset(stream)
			r := l.ended(c.status.String())
			if reply.Message == "" || r["detail"] != reply.Message || r["dialed"] != "" || r["received"] != 0.0 {
				t.Errorf("reply %q, record %v", reply.Message, r)
			}
		})
	}
}

func TestRealRefusal(t *testing.T) {
	l := newLab(t, nil)
	l.service.Close()
	expectStatus(t, l.open(l.dst), wire.StatusRefused)
}

// Loopback comes first; only its refusal leads to the node's own address.
func TestLoopbackThenOwnAddress(t *testing.T) {
	port := func(l net.Listener) uint16 { return l.Addr().(*net.TCPAddr).AddrPort().Port() }
	service := listen(t, "127.0.0.1:0")
	own := netip.MustParseAddr("10.99.0.5")
	for _, c := range []struct {
		first error // what dialing loopback gives
		want  string
	}{
		{nil, "[127.0.0.1]"},
		{syscall.ECONNREFUSED, "[127.0.0.1 10.99.0.5]"},
		{syscall.EHOSTUNREACH, "[127.0.0.1]"},
	} {
		var mu sync.Mutex
		var dialed []netip.Addr
		l := newLab(t, func(cfg *deliver.Config) {
			cfg.Policy = deliver.Policy{Own: func(a netip.Addr) bool { return a == own }, Loopback: ports(port(service))}
			cfg.Dial = func(ctx context.Context, target netip.AddrPort) (*net.TCPConn, error) {
				mu.Lock()
				defer mu.Unlock()
				dialed = append(dialed, target.Addr())
				if len(dialed) == 1 && c.first != nil {
					return nil, c.first
				}
				var d net.Dialer
				return d.DialTCP(ctx, "tcp", netip.AddrPort{}, service.Addr().(*net.TCPAddr).AddrPort())
			}
		})
		stream := l.open(netip.AddrPortFrom(own, port(service)))
		wire.ReadReply(stream)
		reset(stream)
		l.handles.Wait()
		mu.Lock()
		if fmt.Sprint(dialed) != c.want {
			t.Errorf("when loopback gives %v: dialed %v, want %s", c.first, dialed, c.want)
		}
		mu.Unlock()
	}
}

func TestLimits(t *testing.T) {
	t.Run("connections", func(t *testing.T) {
		l := newLab(t, func(c *deliver.Config) { c.MaxConns = 1 })
		first := l.open(l.dst)
		l.accept()
		expectStatus(t, first, wire.StatusOK)
		second := l.open(l.dst)
		expectStatus(t, second, wire.StatusOverloaded)
		reset(second)
	})
	t.Run("dials", func(t *testing.T) {
		var dialing chan netip.AddrPort
		l := newLab(t, func(c *deliver.Config) {
			c.MaxDials = 1
			dialing, _ = slowDial(c)
		})
		l.open(l.dst)
		<-dialing
		if n := l.handler.Stats().Dialing; n != 1 {
			t.Errorf("%d dials, want 1", n)
		}
		second := l.open(l.dst)
		expectStatus(t, second, wire.StatusOverloaded)
		reset(second)
		eventually(t, "second ended", func() bool { return l.handler.Stats().Ended["overloaded"] == 1 })
	})
}

func TestDrain(t *testing.T) {
	l := newLab(t, nil)
	stream := l.open(l.dst)
	service := l.accept()
	expectStatus(t, stream, wire.StatusOK)
	done := make(chan int, 1)
	go func() { done <- l.handler.Drain(context.Background()) }()

	// Others are turned away with a status that lets the server try another owner.
	eventually(t, "draining", func() bool {
		late := l.open(l.dst)
		defer reset(late)
		reply, err := wire.ReadReply(late)
		if err != nil {
			t.Fatal(err)
		}
		return reply.Status == wire.StatusDraining && reply.Status.Retryable()
	})
	send(t, stream, "goes on")
	expect(t, service, "goes on")
	stream.Close()
	service.Close()
	if n := <-done; n != 0 {
		t.Errorf("%d streams were reset", n)
	}
}

func TestDrainResetsWhatDoesNotEnd(t *testing.T) {
	var dialing chan netip.AddrPort
	var slow atomic.Bool
	l := newLab(t, func(c *deliver.Config) {
		var held func(context.Context, netip.AddrPort) (*net.TCPConn, error)
		dialing, _ = slowDial(c)
		held, c.Dial = c.Dial, func(ctx context.Context, target netip.AddrPort) (*net.TCPConn, error) {
			if slow.Load() {
				return held(ctx, target)
			}
			var d net.Dialer
			return d.DialTCP(ctx, "tcp", netip.AddrPort{}, target)
		}
	})
	relaying := l.open(l.dst)
	service := l.accept()
	expectStatus(t, relaying, wire.StatusOK)
	slow.Store(true)
	waiting := l.open(l.dst)
	<-dialing
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if n := l.handler.Drain(ctx); n != 2 {
		t.Errorf("%d streams were reset, want 2", n)
	}
	expectReset(t, relaying)
	expectReset(t, waiting)
	expectReset(t, service)
	l.handles.Wait()
	if s := l.handler.Stats(); s.Ended["canceled"] != 2 {
		t.Errorf("ended %v", s.Ended)
	}
}

func TestConfigErrorsAreJoined(t *testing.T) {
	_, err := deliver.New(deliver.Config{MaxConns: -1, DialTimeout: -1, Policy: deliver.Policy{Allow: []deliver.Rule{{}}}})
	for _, part := range []string{"negative limit", "negative dial timeout", "without addresses"} {
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("New = %v, want %q in it", err, part)
		}
	}
}
