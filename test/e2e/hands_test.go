// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// hands are a process inside of a node that makes sockets there: in its cgroup, so that the programs attached to it see them, and
// in its network namespace. The sockets come to the test by SCM_RIGHTS, each with the answer to a request; many requests may be under
// way at once.
type hands struct {
	conn  *net.UnixConn // packets
	pid   int           // of the process that its sockets' records name
	netns *os.File      // of its namespace, whose number is not given to another one while this is open

	mu      sync.Mutex
	last    uint64
	pending map[uint64]chan handsAnswer
	gone    error // after the connection's end
	ended   chan struct{}
}

// handsRequest asks for one socket.
type handsRequest struct {
	ID      uint64
	Op      string // "dial" or "listen"
	Network string // "tcp", "tcp4", "tcp6"
	Addr    string // IP:PORT
	Local   string // to bind to before connecting; may be empty
	UID     int    // whose socket it is; not root's without any capability
	Timeout time.Duration
}

// handsAnswer comes with the socket if there is no error.
type handsAnswer struct {
	ID    uint64
	Errno syscall.Errno // if the error has one
	Error string
	Took  time.Duration // the call alone

	socket *os.File
}

// err is the error as the test sees it; errors.Is finds its errno.
func (a handsAnswer) err() error {
	switch {
	case a.Error == "":
		return nil
	case a.Errno != 0:
		return fmt.Errorf("%s (%w)", a.Error, a.Errno)
	}
	return errors.New(a.Error)
}

// newHands starts the process. Its end of the pair is the process's life line.
func (h *host) newHands() *hands {
	h.t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		h.t.Fatalf("make a socket pair: %v", err)
	}
	mine, theirs := os.NewFile(uintptr(pair[0]), "hands"), os.NewFile(uintptr(pair[1]), "hands")
	defer mine.Close()
	defer theirs.Close()
	conn, err := net.FileConn(mine)
	if err != nil {
		h.t.Fatal(err)
	}
	cmd := h.Helper(context.Background(), "hands")
	cmd.Env = append(cmd.Env, raceVariable)
	cmd.ExtraFiles = []*os.File{theirs}
	process, err := h.StartCmd(cmd)
	if err != nil {
		conn.Close()
		h.t.Fatalf("start the hands of %s: %v", h.Name, err)
	}
	netns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", process.PID()))
	if err != nil {
		conn.Close()
		h.t.Fatal(err)
	}
	hs := &hands{
		conn: conn.(*net.UnixConn), pid: process.PID(), netns: netns,
		pending: make(map[uint64]chan handsAnswer), ended: make(chan struct{}),
	}
	go hs.receive()
	h.t.Cleanup(func() {
		hs.conn.Close()
		<-hs.ended
	})
	return hs
}

// do has a request done. The caller closes the answer's socket.
func (hs *hands) do(r handsRequest) (handsAnswer, error) {
	answer := make(chan handsAnswer, 1)
	hs.mu.Lock()
	if hs.gone != nil {
		hs.mu.Unlock()
		return handsAnswer{}, hs.gone
	}
	hs.last++
	r.ID = hs.last
	hs.pending[r.ID] = answer
	hs.mu.Unlock()

	packet, err := json.Marshal(r)
	if err != nil {
		return handsAnswer{}, err
	}
	if _, err := hs.conn.Write(packet); err != nil {
		return handsAnswer{}, err
	}
	a, ok := <-answer
	if !ok {
		return a, errors.New("the hands are gone")
	}
	return a, a.err()
}

func (hs *hands) receive() {
	defer close(hs.ended)
	for {
		a, err := receiveAnswer(hs.conn)
		hs.mu.Lock()
		if err != nil {
			hs.gone = fmt.Errorf("the hands are gone: %w", err)
			for _, waiting := range hs.pending {
				close(waiting)
			}
			hs.pending = nil
			hs.mu.Unlock()
			return
		}
		hs.pending[a.ID] <- a
		delete(hs.pending, a.ID)
		hs.mu.Unlock()
	}
}

func receiveAnswer(conn *net.UnixConn) (handsAnswer, error) {
	packet, rights := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
	n, m, _, _, err := conn.ReadMsgUnix(packet, rights)
	if err == nil && n == 0 {
		err = io.EOF
	}
	if err != nil {
		return handsAnswer{}, err
	}
	var a handsAnswer
	if err := json.Unmarshal(packet[:n], &a); err != nil || m == 0 {
		return a, err
	}
	messages, err := unix.ParseSocketControlMessage(rights[:m])
	if err != nil {
		return a, err
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return a, err
	}
	unix.CloseOnExec(fds[0])
	a.socket = os.NewFile(uintptr(fds[0]), "socket")
	return a, nil
}

// handsMain is the process. It ends with the connection to the test.
func handsMain([]string) int {
	file := os.NewFile(3, "hands")
	c, err := net.FileConn(file)
	file.Close()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	conn := c.(*net.UnixConn)
	defer conn.Close()
	packet := make([]byte, 4096)
	for {
		n, err := conn.Read(packet)
		if err != nil || n == 0 {
			return 0
		}
		var r handsRequest
		if err := json.Unmarshal(packet[:n], &r); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		go r.serve(conn)
	}
}

// serve does one request and answers it.
func (r handsRequest) serve(conn *net.UnixConn) {
	a := handsAnswer{ID: r.ID}
	if r.UID != 0 {
		// Of this thread only, which ends with the goroutine.
		runtime.LockOSThread()
		if err := dropRoot(r.UID); err != nil {
			a.Error = err.Error()
		}
	}
	var socket syscall.Conn
	if a.Error == "" {
		began := time.Now()
		var err error
		socket, err = r.open()
		a.Took = time.Since(began)
		if err != nil {
			a.Error = err.Error()
			errors.As(err, &a.Errno)
		}
	}
	packet, err := json.Marshal(a)
	if err != nil {
		panic(err)
	}
	if a.Error != "" {
		_, _ = conn.Write(packet) // the test has gone if that fails
		return
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		panic(err)
	}
	_ = raw.Control(func(fd uintptr) {
		_, _, _ = conn.WriteMsgUnix(packet, unix.UnixRights(int(fd)), nil)
	})
	socket.(io.Closer).Close()
}

// dropRoot gives the calling thread another user and takes its capabilities away.
func dropRoot(uid int) error {
	for _, call := range []struct {
		number uintptr
		id     int
	}{{unix.SYS_SETRESGID, uid}, {unix.SYS_SETRESUID, uid}} {
		if _, _, errno := unix.RawSyscall(call.number, uintptr(call.id), uintptr(call.id), uintptr(call.id)); errno != 0 {
			return fmt.Errorf("become user %d: %w", uid, errno)
		}
	}
	return nil
}

func (r handsRequest) open() (syscall.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), r.Timeout)
	defer cancel()
	switch r.Op {
	case "dial":
		var d net.Dialer
		d.SetMultipathTCP(false)
		if r.Local != "" {
			local, err := net.ResolveTCPAddr("tcp", r.Local)
			if err != nil {
				return nil, err
			}
			d.LocalAddr = local
		}
		conn, err := d.DialContext(ctx, r.Network, r.Addr)
		if err != nil {
			return nil, err
		}
		return conn.(*net.TCPConn), nil
	case "listen":
		var lc net.ListenConfig
		lc.SetMultipathTCP(false)
		ln, err := lc.Listen(ctx, r.Network, r.Addr)
		if err != nil {
			return nil, err
		}
		return ln.(*net.TCPListener), nil
	}
	return nil, errors.New("unknown request " + strings.TrimSpace(r.Op))
}

// nobody is a user without any capability.
const nobody = 65534

// dialOptions are what a connect can have beside its destination.
type dialOptions struct {
	network string        // "tcp4" or "tcp6" fix the family; default "tcp"
	local   string        // IP:PORT to bind to; port 0 is any
	uid     int           // of the process that connects; without any capability if it is not 0
	timeout time.Duration // default 10 s
}

// dial connects from the node, as any of its processes would. The connection is the test's: it is closed with the test at the latest.
func (h *host) dial(addr fmt.Stringer) (*net.TCPConn, error) {
	conn, _, err := h.dialWith(addr, dialOptions{})
	return conn, err
}

// dialWith is dial with options. It also says how long connect() took on the node.
func (h *host) dialWith(addr fmt.Stringer, o dialOptions) (*net.TCPConn, time.Duration, error) {
	network := o.network
	if network == "" {
		network = "tcp"
	}
	r := handsRequest{Op: "dial", Network: network, Addr: addr.String(), Local: o.local, UID: o.uid, Timeout: o.timeout}
	if r.Timeout == 0 {
		r.Timeout = 10 * time.Second
	}
	a, err := h.hands.do(r)
	if err != nil {
		return nil, a.Took, err
	}
	defer a.socket.Close()
	conn, err := net.FileConn(a.socket)
	if err != nil {
		return nil, a.Took, err
	}
	h.t.Cleanup(func() { conn.Close() })
	return conn.(*net.TCPConn), a.Took, nil
}

// mustDial is dial in a test that cannot go on without.
func (h *host) mustDial(addr fmt.Stringer) *net.TCPConn {
	h.t.Helper()
	conn, err := h.dial(addr)
	if err != nil {
		h.t.Fatalf("dial %s from %s: %v", addr, h.Name, err)
	}
	return conn
}

// listen listens on the node, as one of its processes of that user would. The listener is the caller's to close.
func (h *host) listen(addr fmt.Stringer, uid int) (*net.TCPListener, error) {
	a, err := h.hands.do(handsRequest{Op: "listen", Network: "tcp", Addr: addr.String(), UID: uid, Timeout: 10 * time.Second})
	if err != nil {
		return nil, err
	}
	defer a.socket.Close()
	ln, err := net.FileListener(a.socket)
	if err != nil {
		return nil, err
	}
	return ln.(*net.TCPListener), nil
}
