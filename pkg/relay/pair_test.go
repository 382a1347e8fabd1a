// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"bufio"
	"context"
	"io"
	"net"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is how long a test waits for what must happen; never for what must not.
const patience = 20 * time.Second

// tcpPair returns the two ends of one loopback connection.
func tcpPair(t testing.TB) (near, far *net.TCPConn) {
	t.Helper()
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	near, err = net.DialTCP("tcp", nil, l.Addr().(*net.TCPAddr))
	if err != nil {
		t.Fatal(err)
	}
	far, err = l.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	_ = near.SetDeadline(time.Now().Add(patience))
	t.Cleanup(func() { near.Close(); far.Close() })
	return near, far
}

// plain hides everything but Conn.
type plain struct{ Conn }

// stream is a Conn such as a tunnel's: buffered in userspace, an io.WriterTo and a Watcher, not a socket.
type stream struct {
	Conn
	Watcher
	r *bufio.Reader
}

func newStream(c Conn) *stream { return &stream{c, c.(Watcher), bufio.NewReaderSize(c, 4096)} }

func (s *stream) Read(b []byte) (int, error)         { return s.r.Read(b) }
func (s *stream) WriteTo(w io.Writer) (int64, error) { return s.r.WriteTo(w) }

// kinds are the sorts of Conn that b is tested with; watches says whether a reset that nobody reads is noticed.
var kinds = []struct {
	name    string
	wrap    func(*net.TCPConn) Conn
	watches bool
}{
	{"tcp", TCP, true},
	{"stream", func(c *net.TCPConn) Conn { return newStream(TCP(c)) }, true},
	{"plain", func(c *net.TCPConn) Conn { return plain{TCP(c)} }, false},
}

// running is a relay under test between two peers: client talks to a, remote to b.
type running struct {
	client, remote *net.TCPConn
	cancel         context.CancelCauseFunc
	done           chan Result
}

func start(t testing.TB, wrap func(*net.TCPConn) Conn) *running {
	t.Helper()
	client, a := tcpPair(t)
	remote, b := tcpPair(t)
	ctx, cancel := context.WithCancelCause(context.Background())
	r := &running{client, remote, cancel, make(chan Result, 1)}
	go func() { r.done <- new(Relayer).Relay(ctx, TCP(a), wrap(b)) }()
	t.Cleanup(func() { cancel(nil) })
	return r
}

func (r *running) result(t testing.TB) Result {
	t.Helper()
	select {
	case res := <-r.done:
		return res
	case <-time.After(patience):
		r.cancel(nil)
		t.Fatal("the relay does not end")
		panic("unreachable")
	}
}

func (r *running) expect(t testing.TB, reason Reason, sent, received int64) Result {
	t.Helper()
	res := r.result(t)
	if res.Reason != reason || res.Sent != sent || res.Received != received || (res.Err == nil) != (reason == Closed) {
		t.Errorf("result %+v, want %s, %d sent, %d received", res, reason, sent, received)
	}
	return res
}

// swap exchanges the roles of client and remote, to run one test in both directions.
func (r *running) side(t testing.TB, name string) (self, other *net.TCPConn, reset Reason) {
	t.Helper()
	if name == "client" {
		return r.client, r.remote, ClientReset
	}
	return r.remote, r.client, RemoteReset
}

// reset closes c with RST.
func reset(t testing.TB, c *net.TCPConn) {
	t.Helper()
	if err := TCP(c).Reset(); err != nil {
		t.Fatal(err)
	}
}
