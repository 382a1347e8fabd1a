// SPDX-License-Identifier: Apache-2.0

package intercept

import (
	"context"
	"io"
	"sync"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/relay"
	"github.com/edge-tunnel/edge-tunnel/pkg/relay/ledger"
	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

// opening is the stream of one connection, as the relay sees it from the first moment on. The direction that reads it waits for the
// status, and makes the second try; the other one writes meanwhile, and what it writes is kept:
//
//	waiting ── retryable, once ──► waiting on another stream, which has got all that is kept
//	   │ OK                           │ OK
//	   ▼                              ▼
//	settled, nothing is kept        settled
//
// Anything else settles it too, with a failure. It is read with WriteTo alone.
type opening struct {
	Stream // the present one; changed by the reading direction, with both locks

	s       *Server
	entry   *ledger.Entry[facts]
	facts   *facts
	header  wire.Header
	began   time.Time
	done    chan struct{} // closed when settled
	sending sync.Mutex    // a write to Stream before it is settled

	mu      sync.Mutex // guards the rest, never for long; taken after sending
	settled bool
	fail    *failure // set with settled
	kept    []byte   // everything written so far
	fin     bool     // and CloseWrite was called
	torn    error    // Stream lacks some of it
	over    bool     // Reset was called
	giveUp  func()   // ends Open of the second try
}

// open opens a stream.
func (o *opening) open(ctx context.Context, failed Stream) (Stream, *failure) {
	stream, err := o.s.cfg.Open(ctx, o.facts.node, o.header, failed)
	if err != nil {
		return nil, openFailure(o.s.ctx, err)
	}
	return stream, nil
}

// first makes the first try. On failure there is no stream.
func (o *opening) first() (fail *failure) {
	ctx, cancel := context.WithTimeout(o.s.ctx, o.s.cfg.OpenTimeout)
	defer cancel()
	o.Stream, fail = o.open(ctx, nil)
	return fail
}

// WriteTo waits for the status, and passes on what follows it.
func (o *opening) WriteTo(w io.Writer) (int64, error) {
	reply, fail := o.await()
	if fail == nil && reply.Status.Retryable() {
		if fail = o.again(); fail == nil {
			reply, fail = o.await()
		}
	}
	if fail == nil && reply.Status != wire.StatusOK {
		fail = &failure{reply.Status.String(), reply.Message}
	}
	if fail = o.settle(fail); fail != nil {
		return 0, fail
	}
	return io.Copy(w, o.Stream)
}

// await reads the status.
func (o *opening) await() (wire.Reply, *failure) {
	o.SetReadDeadline(time.Now().Add(o.s.cfg.StatusTimeout))
	reply, err := wire.ReadReply(o.Stream)
	if err != nil {
		return wire.Reply{}, replyFailure(o.s.ctx, err)
	}
	o.SetReadDeadline(time.Time{})
	return reply, nil
}

// again makes the second try.
func (o *opening) again() *failure {
	failed := o.Stream
	failed.Reset() // who writes to it gives up
	o.facts.retried = true
	o.s.retried.Add(1)
	ctx, cancel := context.WithTimeout(o.s.ctx, o.s.cfg.OpenTimeout)
	defer cancel()
	o.mu.Lock()
	o.giveUp = cancel
	if o.over {
		cancel()
	}
	o.mu.Unlock()
	stream, fail := o.open(ctx, failed)
	if fail != nil {
		return fail
	}

	o.sending.Lock()
	defer o.sending.Unlock()
	o.mu.Lock()
	o.Stream, o.torn = stream, nil
	kept, fin, over := o.kept, o.fin, o.over
	o.mu.Unlock()
	if over {
		stream.Reset()
	}
	var err error
	if len(kept) > 0 {
		_, err = stream.Write(kept)
	}
	if err == nil && fin {
		err = stream.CloseWrite()
	}
	_ = o.tear(err)
	return nil
}

// settle ends the waiting, and returns the failure if there is one.
func (o *opening) settle(fail *failure) *failure {
	o.mu.Lock()
	if fail == nil && o.torn != nil {
		fail = replyFailure(o.s.ctx, o.torn) // there is a hole in what the edge service will see
	}
	o.settled, o.fail, o.kept = true, fail, nil
	o.mu.Unlock()
	if fail == nil {
		o.s.cfg.Opened(time.Since(o.began))
		o.facts.established = true
		o.entry.Describe(*o.facts)
	}
	close(o.done)
	return fail
}

// tear notes that a write to the stream failed. What that means the status decides; the error is returned if it has come.
func (o *opening) tear(err error) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if err == nil || o.settled {
		return err
	}
	o.torn = err
	return nil
}

// Write waits for the status only when as much is kept as may be.
func (o *opening) Write(p []byte) (int, error) {
	early, err := o.writeEarly(p)
	if err != nil || early == len(p) {
		return early, err
	}
	<-o.done
	if o.fail != nil {
		return early, o.fail
	}
	n, err := o.Stream.Write(p[early:])
	return early + n, err
}

// writeEarly sends what can be sent before the status, and keeps it.
func (o *opening) writeEarly(p []byte) (int, error) {
	o.sending.Lock()
	defer o.sending.Unlock()
	o.mu.Lock()
	if o.settled {
		o.mu.Unlock()
		return 0, nil
	}
	p = p[:min(len(p), wire.MaxRetained-len(o.kept))]
	o.kept = append(o.kept, p...)
	stream, torn := o.Stream, o.torn
	o.mu.Unlock()
	if torn != nil || len(p) == 0 {
		return len(p), nil
	}
	n, err := stream.Write(p)
	if err = o.tear(err); err != nil {
		return n, err
	}
	return len(p), nil // also what the stream did not take: it is kept
}

// CloseWrite does not wait.
func (o *opening) CloseWrite() error {
	o.sending.Lock()
	defer o.sending.Unlock()
	o.mu.Lock()
	o.fin = true
	stream, torn := o.Stream, o.torn
	o.mu.Unlock()
	if torn != nil {
		return nil
	}
	return o.tear(stream.CloseWrite())
}

// Reset resets the present stream, and the next one.
func (o *opening) Reset() error {
	o.mu.Lock()
	o.over = true
	stream, giveUp := o.Stream, o.giveUp
	o.mu.Unlock()
	if giveUp != nil {
		giveUp()
	}
	return stream.Reset()
}

// Failed implements relay.Watcher.
func (o *opening) Failed() error {
	o.mu.Lock()
	stream := o.Stream
	o.mu.Unlock()
	if w, ok := stream.(relay.Watcher); ok {
		return w.Failed()
	}
	return nil
}

// WaitFailed implements relay.Watcher. Nobody calls it before the stream is settled.
func (o *opening) WaitFailed() error {
	if w, ok := o.Stream.(relay.Watcher); ok {
		return w.WaitFailed()
	}
	return nil
}
