// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Every connection begins with a request of messageLen bytes: what it wants, a number, zeros.
const messageLen = 64

const (
	wantAnswer   byte = iota + 1 // one answer of messageLen bytes
	wantEcho                     // all that follows comes back
	wantBytes                    // that many bytes, then the end
	wantSink                     // that many bytes follow; the answer is their number, as 8 bytes
	wantFlow                     // bytes for that many milliseconds, then the end
	wantFlowSink                 // bytes follow, and the end; the answer is how many came within that many milliseconds
	wantKeys                     // as wantEcho, byte by byte
)

func request(want byte, n int64) []byte {
	b := make([]byte, messageLen)
	b[0] = want
	binary.BigEndian.PutUint64(b[1:], uint64(n))
	return b
}

// bulkPiece is how much of a bulk transfer is read or written at once.
const bulkPiece = 128 << 10

// serviceMain is what the clients want to reach. It listens on all the addresses that it is given.
func serviceMain(args []string) int {
	failed := make(chan error)
	for _, addr := range args {
		ln, err := listen(addr)
		if err != nil {
			return failRole(err)
		}
		go func() { failed <- acceptAll(ln, serve) }()
	}
	ready()
	return failRole(<-failed)
}

// serve answers one connection. Errors are the client's to notice: its counts will not be right.
func serve(c *net.TCPConn) {
	defer c.Close()
	head := make([]byte, messageLen)
	if _, err := io.ReadFull(c, head); err != nil {
		return
	}
	n := int64(binary.BigEndian.Uint64(head[1:]))
	switch head[0] {
	case wantAnswer:
		if _, err := c.Write(head); err == nil {
			_, _ = c.Read(head) // the client closes first
		}
	case wantEcho:
		for {
			if _, err := io.ReadFull(c, head); err != nil {
				return
			}
			if _, err := c.Write(head); err != nil {
				return
			}
		}
	case wantBytes:
		_, _ = send(c, n)
	case wantFlow:
		_ = sendFor(c, n)
	case wantFlowSink:
		got, _ := receiveFor(c, n)
		_, _ = c.Write(binary.BigEndian.AppendUint64(nil, uint64(got)))
	case wantKeys:
		for {
			if _, err := io.ReadFull(c, head[:1]); err != nil {
				return
			}
			if _, err := c.Write(head[:1]); err != nil {
				return
			}
		}
	case wantSink:
		got, _ := receive(c, n)
		_, _ = c.Write(binary.BigEndian.AppendUint64(nil, uint64(got)))
	}
}

// send writes n bytes.
func send(w io.Writer, n int64) (sent int64, err error) {
	piece := make([]byte, bulkPiece)
	for sent < n && err == nil {
		var m int
		m, err = w.Write(piece[:min(n-sent, bulkPiece)])
		sent += int64(m)
	}
	return sent, err
}

// sendFor writes for that many milliseconds. What is in buffers then has to arrive yet, which takes long on a slow link: so the
// kernel takes no more ahead than it needs, whatever the window.
func sendFor(c *net.TCPConn, millis int64) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var setErr error
	err = raw.Control(func(fd uintptr) {
		setErr = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, bulkPiece)
	})
	if err := errors.Join(err, setErr); err != nil {
		return err
	}
	piece := make([]byte, bulkPiece/8) // small, for the clock to be looked at often
	for end := time.Now().Add(time.Duration(millis) * time.Millisecond); err == nil && time.Now().Before(end); {
		_, err = c.Write(piece)
	}
	return err
}

// receive reads until n bytes have come, or the end has.
func receive(r io.Reader, n int64) (got int64, err error) {
	piece := make([]byte, bulkPiece)
	for got < n && err == nil {
		var m int
		m, err = r.Read(piece)
		got += int64(m)
	}
	return got, err
}

// receiveFor reads to the end and returns how many bytes came within that many milliseconds.
func receiveFor(r io.Reader, millis int64) (got int64, err error) {
	piece := make([]byte, bulkPiece)
	for end := time.Now().Add(time.Duration(millis) * time.Millisecond); err == nil; {
		var m int
		m, err = r.Read(piece)
		if time.Now().Before(end) {
			got += int64(m)
		}
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return got, err
}

func listen(addr string) (*net.TCPListener, error) {
	tcp, err := net.ResolveTCPAddr("tcp", addr)
	if err != nil {
		return nil, err
	}
	return net.ListenTCP("tcp", tcp) // no MPTCP, other than net.Listen
}

// acceptAll handles connections until the listener fails.
func acceptAll(ln *net.TCPListener, handle func(*net.TCPConn)) error {
	for {
		c, err := ln.AcceptTCP()
		if err != nil {
			return err
		}
		go handle(c)
	}
}

// readyLine is what a role prints when it can be used.
const readyLine = "ready"

func ready() { fmt.Println(readyLine) }

// failRole says what went wrong and gives the exit status. Roles end by being killed; they never end well.
func failRole(err error) int {
	fmt.Fprintln(os.Stderr, "error:", strings.TrimSpace(err.Error()))
	return 1
}
