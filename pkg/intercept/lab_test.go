// SPDX-License-Identifier: Apache-2.0

package intercept_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/edge-tunnel/edge-tunnel/pkg/intercept"
	"github.com/edge-tunnel/edge-tunnel/pkg/relay"
	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// dst is where every client of a lab wanted to go, unless the lab says otherwise.
var dst = netip.MustParseAddrPort("10.99.0.5:10250")

// lab is a server whose streams are TCP connections to the test, which plays the agent.
type lab struct {
	t      *testing.T
	server *intercept.Server
	addr   string
	opens  chan *agentStream
	log    *logBuffer
}

// agentStream is the far end of a stream, its header read.
type agentStream struct {
	*net.TCPConn
	t      *testing.T
	header wire.Header
	node   string
	second bool
}

func newLab(t *testing.T, change func(*intercept.Config)) *lab {
	t.Helper()
	l := &lab{t: t, opens: make(chan *agentStream, 100), log: &logBuffer{}}
	agents := listen(t)
	cfg := intercept.Config{
		Origin: func(*net.TCPConn) (intercept.Origin, error) {
			return intercept.Origin{Dst: dst, PID: 42, UID: 1000, Comm: "curl", Cgroup: 77, Netns: 5, Host: true}, nil
		},
		Lookup: func(a netip.Addr) (string, bool) { return "edge-1", a == dst.Addr() },
		Open: func(ctx context.Context, node string, h wire.Header, failed intercept.Stream) (intercept.Stream, error) {
			near, far := pair(t, agents)
			if err := intercept.WriteHeader(ctx, near, h); err != nil {
				return nil, err
			}
			header, err := wire.ReadHeader(far)
			if err != nil {
				t.Error(err)
			}
			l.opens <- &agentStream{far, t, header, node, failed != nil}
			return near, nil
		},
		Logger: slog.New(slog.NewJSONHandler(l.log, nil)),
	}
	if change != nil {
		change(&cfg)
	}
	var err error
	if l.server, err = intercept.New(cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		l.server.Close()
		s := l.server.Stats()
		var ended uint64
		for _, n := range s.Ended {
			ended += n
		}
		if s.Open != 0 || s.Begun != ended || s.Listeners != 0 {
			t.Errorf("after Close: %d begun, %d ended, %d open, %d listeners", s.Begun, ended, s.Open, s.Listeners)
		}
		for name, node := range s.Nodes {
			if node.Open != 0 {
				t.Errorf("after Close: %s has %d open connections", name, node.Open)
			}
		}
		if n := s.Ended["other"]; n != 0 {
			t.Errorf("%d connections ended for an unannounced reason", n)
		}
	})
	ln := listen(t)
	l.addr = ln.Addr().String()
	if err := l.server.Add(ln); err != nil {
		t.Fatal(err)
	}
	return l
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln
}

var pairing sync.Mutex

// pair connects to ln and accepts: a stream and its far end.
func pair(t *testing.T, ln net.Listener) (relay.Conn, *net.TCPConn) {
	pairing.Lock()
	defer pairing.Unlock()
	near := dial(t, ln.Addr().String())
	far, err := ln.Accept()
	if err != nil {
		t.Error(err)
		return relay.TCP(near), nil
	}
	t.Cleanup(func() { far.Close() })
	return relay.TCP(near), far.(*net.TCPConn)
}

func dial(t *testing.T, addr string) *net.TCPConn {
	var d net.Dialer
	d.SetMultipathTCP(false)
	conn, err := d.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	return conn.(*net.TCPConn)
}

func (l *lab) dial() *net.TCPConn { return dial(l.t, l.addr) }

// dialReset connects and expects a reset, which may come before connect has returned.
func (l *lab) dialReset() {
	l.t.Helper()
	conn, err := net.Dial("tcp", l.addr)
	if err != nil {
		if !errors.Is(err, syscall.ECONNRESET) {
			l.t.Fatal(err)
		}
		return
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	expectReset(l.t, conn)
}

// next is the next stream that the server opened.
func (l *lab) next() *agentStream {
	l.t.Helper()
	select {
	case a := <-l.opens:
		a.SetDeadline(time.Now().Add(20 * time.Second))
		return a
	case <-time.After(10 * time.Second):
		l.t.Fatal("no stream was opened")
		return nil
	}
}

func (a *agentStream) reply(s wire.Status) {
	a.t.Helper()
	if err := wire.WriteReply(a, wire.Reply{Status: s, Message: "because " + s.String()}); err != nil {
		a.t.Error(err)
	}
}

// expect reads exactly want.
func expect(t *testing.T, r io.Reader, want string) {
	t.Helper()
	buf := make([]byte, len(want))
	if n, err := io.ReadFull(r, buf); err != nil || string(buf) != want {
		t.Fatalf("read %q, %v, want %q", buf[:n], err, want)
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

// ended waits until one more connection has ended, for this reason.
func (l *lab) ended(reason string) {
	l.t.Helper()
	eventually(l.t, "end for "+reason, func() bool { return l.server.Stats().Open == 0 })
	if s := l.server.Stats(); s.Ended[reason] != 1 || s.Begun != 1 {
		l.t.Fatalf("ended %v of %d, want one %s", s.Ended, s.Begun, reason)
	}
}

// record waits for the one access record.
func (l *lab) record() map[string]any {
	l.t.Helper()
	eventually(l.t, "record", func() bool { return len(l.log.records(l.t)) > 0 })
	r := l.log.records(l.t)
	if len(r) != 1 {
		l.t.Fatalf("%d access records, want 1: %v", len(r), r)
	}
	return r[0]
}

// logBuffer collects what a slog.JSONHandler writes.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

// records are the access records, decoded.
func (b *logBuffer) records(t *testing.T) []map[string]any {
	t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	var list []map[string]any
	for dec := json.NewDecoder(bytes.NewReader(b.b.Bytes())); ; {
		var r map[string]any
		if err := dec.Decode(&r); errors.Is(err, io.EOF) {
			return list
		} else if err != nil {
			t.Fatal(err)
		}
		if r["msg"] == "connection" {
			list = append(list, r)
		}
	}
}
