// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"io"
	"sync/atomic"

	"github.com/edge-tunnel/edge-tunnel/pkg/relay"
)

// Conn is a connection whose bytes are counted. It passes on relay.Watcher and io.WriterTo, so wrapping costs a relay
// nothing but the counting. (What relay.TCP returns has faster ways that a wrapper would hide: count the stream.)
type Conn struct {
	relay.Conn
	read, written *atomic.Int64
}

// Client counts on the client's side of the connection: bytes read from c are Sent, bytes written to it are Received.
func (e *Entry[T]) Client(c relay.Conn) *Conn { return &Conn{c, &e.sent, &e.received} }

// Remote counts on the far side of the connection: bytes written to c are Sent, bytes read from it are Received.
func (e *Entry[T]) Remote(c relay.Conn) *Conn { return &Conn{c, &e.received, &e.sent} }

func (c *Conn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.read.Add(int64(n))
	return n, err
}

func (c *Conn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.written.Add(int64(n))
	return n, err
}

// Failed is that of the connection within, and nil if it is no relay.Watcher.
func (c *Conn) Failed() error {
	if w, ok := c.Conn.(relay.Watcher); ok {
		return w.Failed()
	}
	return nil
}

// WaitFailed is that of the connection within, and returns nil at once if it is no relay.Watcher.
func (c *Conn) WaitFailed() error {
	if w, ok := c.Conn.(relay.Watcher); ok {
		return w.WaitFailed()
	}
	return nil
}

// WriteTo is that of the connection within, or copies.
func (c *Conn) WriteTo(w io.Writer) (int64, error) { return io.Copy(&counter{w, c.read}, c.Conn) }

// counter counts what is written to w.
type counter struct {
	w io.Writer
	n *atomic.Int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n.Add(int64(n))
	return n, err
}
