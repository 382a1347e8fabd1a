// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"unsafe"
)

// TCP makes c a side of a relay. It is a Watcher, and is read without holding a buffer while it is idle.
//
// From here on c is reset when the process dies: the kernel, which closes it then, would send a FIN, and the far side would take what
// it got for all that there is. Close, and nothing else, ends it in order.
func TCP(c *net.TCPConn) Conn {
	t := &tcp{TCPConn: c}
	t.raw, _ = c.SyscallConn() // fails for a nil connection only
	_ = c.SetLinger(0)         // fails on a closed connection only, as below
	t.tryRead = t.read
	return t
}

type tcp struct {
	*net.TCPConn
	raw syscall.RawConn

	// What readPooled and its callback hand to each other; kept here so that a read allocates nothing. One goroutine
	// reads at a time.
	tryRead func(fd uintptr) bool
	relayer *Relayer
	buf     *buffer
	n       int
	err     error
}

// Close ends the connection in order: what was written is sent, and then a FIN.
func (t *tcp) Close() error {
	_ = t.SetLinger(-1)
	return t.TCPConn.Close()
}

// Reset aborts the connection: with a linger time of 0, close sends RST in place of FIN and drops what is not yet sent.
func (t *tcp) Reset() error {
	_ = t.SetLinger(0)
	if err := t.TCPConn.Close(); !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// readPooled waits for t to become readable and reads into a buffer taken only then.
func (t *tcp) readPooled(r *Relayer) (*buffer, int, error) {
	t.relayer = r
	if err := t.raw.Read(t.tryRead); err != nil {
		return nil, 0, err
	}
	return t.buf, t.n, t.err
}

// read is the callback of readPooled. It must read, not just ask, and report false only after EAGAIN: the poller tells of
// changes only.
func (t *tcp) read(fd uintptr) bool {
	t.buf = t.relayer.get()
	for {
		t.n, t.err = syscall.Read(int(fd), t.buf[:])
		switch {
		case t.err == syscall.EINTR:
			continue
		case t.err == nil && t.n > 0:
			return true
		}
		t.relayer.put(t.buf)
		t.buf = nil
		switch t.err {
		case nil:
			t.err = io.EOF
		case syscall.EAGAIN:
			return false
		default:
			t.n, t.err = 0, os.NewSyscallError("read", t.err)
		}
		return true
	}
}

// Failed implements Watcher. It leaves the socket's error in place: fetching it (SO_ERROR) would make a concurrent Read
// return EOF, and the reset would travel on as a FIN. So a connection that timed out is reported as reset, too.
func (t *tcp) Failed() error {
	var failed bool
	if err := t.raw.Control(func(fd uintptr) { failed = hasError(fd) }); err != nil || !failed {
		return nil
	}
	return os.NewSyscallError("poll", syscall.ECONNRESET)
}

// WaitFailed implements Watcher. The runtime's poller wakes readers on EPOLLERR and EPOLLHUP, also after EOF.
func (t *tcp) WaitFailed() error {
	var failed bool
	err := t.raw.Read(func(fd uintptr) bool {
		failed = hasError(fd)
		return failed
	})
	if err != nil || !failed {
		return nil
	}
	return os.NewSyscallError("poll", syscall.ECONNRESET)
}

// hasError reports whether an error is pending on a socket. The connection's state would not do: it is "closed" also after
// an orderly end with data left to read.
func hasError(fd uintptr) bool {
	const pollErr = 0x8
	p := struct {
		fd              int32
		events, revents int16
	}{fd: int32(fd)}
	var now syscall.Timespec
	n, _, errno := syscall.Syscall6(syscall.SYS_PPOLL, uintptr(unsafe.Pointer(&p)), 1, uintptr(unsafe.Pointer(&now)), 0, 0, 0)
	return errno == 0 && n == 1 && p.revents&pollErr != 0
}
