// SPDX-License-Identifier: Apache-2.0

package intercept

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/relay"
	"github.com/edge-tunnel/edge-tunnel/pkg/relay/ledger"
	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

// opening is one connection from its lookup until its status has come.
//
// Two goroutines share it: the connection's own reads the status, and a pump carries the client's bytes meanwhile. Only one of
// them touches kept and fin at a time: await starts the pump and waits for it before it returns.
type opening struct {
	s       *Server
	entry   *ledger.Entry[facts]
	client  relay.Conn
	node    string
	header  wire.Header
	kept    []byte // everything read from the client so far
	fin     bool   // the client has finished, after kept
	retried bool
}

// establish returns a stream whose status is OK and that has got all of kept and fin. On failure no stream is left.
func (o *opening) establish() (Stream, *failure) {
	stream, reply, fail := o.try(nil)
	if fail == nil && reply.Status.Retryable() {
		o.retried = true
		o.s.retried.Add(1)
		stream, reply, fail = o.try(stream)
	}
	if fail != nil {
		return nil, fail
	}
	if reply.Status != wire.StatusOK {
		return nil, &failure{reply.Status.String(), reply.Message}
	}
	counted := o.entry.Remote(stream)
	if o.fin {
		return finSent{counted}, nil
	}
	return counted, nil
}

// try opens a stream and waits for its status. Unless the status is OK the returned stream has been reset, and is good
// only to tell Open which one failed.
func (o *opening) try(failed Stream) (Stream, wire.Reply, *failure) {
	ctx, cancel := context.WithTimeout(o.s.ctx, o.s.cfg.OpenTimeout)
	stream, err := o.s.cfg.Open(ctx, o.node, o.header, failed)
	cancel()
	if err != nil {
		return nil, wire.Reply{}, openFailure(o.s.ctx, err)
	}
	reply, fail := o.await(stream)
	if fail != nil || reply.Status != wire.StatusOK {
		stream.Reset()
	}
	return stream, reply, fail
}

// await reads the status, while the pump carries the client's bytes.
func (o *opening) await(stream Stream) (wire.Reply, *failure) {
	stopReset := context.AfterFunc(o.s.ctx, func() { stream.Reset() })
	defer stopReset()
	pumped := make(chan error, 1)
	go func() { pumped <- o.pump(stream) }()

	stream.SetReadDeadline(time.Now().Add(o.s.cfg.StatusTimeout))
	reply, err := wire.ReadReply(stream)
	if err != nil || reply.Status != wire.StatusOK {
		stream.Reset() // the pump may be in a write
	}
	o.client.SetReadDeadline(time.Unix(1, 0)) // or in a read
	lost := <-pumped
	o.client.SetReadDeadline(time.Time{})

	var gone *clientError
	switch {
	case errors.As(lost, &gone):
		return wire.Reply{}, gone.failure()
	case err != nil:
		return wire.Reply{}, replyFailure(o.s.ctx, err)
	case reply.Status == wire.StatusOK && lost != nil:
		// There is a hole in what the edge service will see: this stream must not go on.
		return wire.Reply{}, replyFailure(o.s.ctx, lost)
	}
	stream.SetReadDeadline(time.Time{})
	return reply, nil
}

// clientError is an error of the client's connection, not of the stream.
type clientError struct{ err error }

func (e *clientError) Error() string { return e.err.Error() }

func (e *clientError) failure() *failure {
	if relay.IsReset(e.err) {
		return &failure{reason: string(relay.ClientReset)}
	}
	return &failure{string(relay.ClientError), e.Error()}
}

// Sizes of the buffer for what is kept: most first flights (a TLS hello, an HTTP request) fit into the smallest.
const minKept = 2 << 10

// pump sends the stream what is kept already, which is what a second try needs, and then whatever the client sends, until the
// client's read deadline tells it to stop, or enough is kept.
func (o *opening) pump(stream Stream) error {
	if len(o.kept) > 0 {
		if _, err := stream.Write(o.kept); err != nil {
			return fmt.Errorf("send kept bytes: %w", err)
		}
	}
	for !o.fin {
		if len(o.kept) == wire.MaxRetained {
			return nil
		}
		if len(o.kept) == cap(o.kept) {
			o.kept = slices.Grow(o.kept, max(minKept, len(o.kept)))
		}
		have := len(o.kept)
		n, err := o.client.Read(o.kept[have:min(cap(o.kept), wire.MaxRetained)])
		o.kept = o.kept[:have+n]
		if n > 0 {
			o.entry.AddSent(n)
			if _, err := stream.Write(o.kept[have:]); err != nil {
				return fmt.Errorf("send first bytes: %w", err)
			}
		}
		switch {
		case err == nil:
		case errors.Is(err, io.EOF):
			o.fin = true
		case errors.Is(err, os.ErrDeadlineExceeded):
			return nil
		default:
			stream.Reset() // wakes the reader of the status, and tells the agent to give up its dial
			return &clientError{err}
		}
	}
	if err := stream.CloseWrite(); err != nil {
		return fmt.Errorf("send end of data: %w", err)
	}
	if client, ok := o.client.(relay.Watcher); ok {
		// A client that has finished may still be reset. The read deadline ends the waiting.
		if err := client.WaitFailed(); err != nil {
			stream.Reset()
			return &clientError{err}
		}
	}
	return nil
}

// finSent is a stream whose sending side was closed before its status came. The relay reads the client's end of data once more
// and would close it again.
type finSent struct{ *ledger.Conn }

func (finSent) CloseWrite() error { return nil }
