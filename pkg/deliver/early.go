// SPDX-License-Identifier: Apache-2.0

package deliver

import (
	"context"
	"errors"
	"io"
	"slices"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/relay/ledger"
	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

// early reads a stream while the dial is under way, which is the only way to learn that it was reset. Afterwards it is
// the stream, with what was read given out first.
type early struct {
	*ledger.Conn
	kept []byte
	done chan error
}

const minKept = 2 << 10

// watch starts to read the stream. When the stream breaks, it calls lost; when wire.MaxRetained bytes or the end of data have come,
// it stops reading. Stop must be called before anybody else reads.
func watch(stream *ledger.Conn, lost context.CancelFunc) *early {
	e := &early{Conn: stream, done: make(chan error, 1)}
	go func() {
		err := e.fill()
		if err != nil {
			lost()
		}
		e.done <- err
	}()
	return e
}

// fill returns nil if the stream is good for more.
func (e *early) fill() error {
	for len(e.kept) < wire.MaxRetained {
		if len(e.kept) == cap(e.kept) {
			e.kept = slices.Grow(e.kept, max(minKept, len(e.kept)))
		}
		have := len(e.kept)
		n, err := e.Conn.Read(e.kept[have:min(cap(e.kept), wire.MaxRetained)])
		e.kept = e.kept[:have+n]
		switch {
		case err == nil:
		case errors.Is(err, io.EOF), timedOut(err): // Stop, or the client's end of data; the relay reads that once more
			return nil
		default:
			return err
		}
	}
	return nil
}

// stop ends the reading, and returns the error that broke the stream if one did.
func (e *early) stop() error {
	e.Conn.SetReadDeadline(time.Unix(1, 0))
	err := <-e.done
	e.Conn.SetReadDeadline(time.Time{})
	return err
}

func (e *early) Read(p []byte) (int, error) {
	if len(e.kept) == 0 {
		return e.Conn.Read(p)
	}
	n := copy(p, e.kept)
	if e.kept = e.kept[n:]; len(e.kept) == 0 {
		e.kept = nil
	}
	return n, nil
}

// WaitRead implements relay.ReadWaiter.
func (e *early) WaitRead() error {
	if len(e.kept) > 0 {
		return nil
	}
	return e.Conn.WaitRead()
}
