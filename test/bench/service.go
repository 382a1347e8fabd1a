// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
)

// Every connection begins with a request of messageLen bytes: what it wants, a number, zeros.
const messageLen = 64

const (
	wantAnswer byte = iota + 1 // one answer of messageLen bytes
	wantEcho                   // all that follows comes back
	wantBytes                  // that many bytes, then the end
	wantSink                   // that many bytes follow; the answer is their number, as 8 bytes
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
