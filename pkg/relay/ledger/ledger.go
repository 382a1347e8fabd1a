// SPDX-License-Identifier: Apache-2.0

// Package ledger knows the connections that one end of the tunnel has open, and how the finished ones ended. Both ends
// keep one: pkg/intercept in the cloud, pkg/deliver at the edge.
//
//	e, ok := book.Begin(now)       a place in the table; not ok: full, or closed
//	e.Describe(facts)              what is known about it, as soon as it is known
//	conn := e.Client(conn)         its bytes, while they flow
//	result := e.End(reason)        out of the table, into a counter
//
// Begun connections are always the open ones plus the ended ones, which Stats lets anybody check; each Begin must be
// followed by exactly one End. The ledger owns no connection and no goroutine. Its size is bounded by the limit given
// to New and by the list of reasons.
package ledger

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Other is the reason under which End counts whatever was not announced to New, so that labels stay bounded.
const Other = "other"

// Book is the table of open connections, each with facts of type T, and the counters of the ended ones. Methods may be
// called from any goroutine.
type Book[T any] struct {
	limit int

	mu     sync.Mutex // guards everything below
	open   map[*Entry[T]]struct{}
	closed bool
	idle   chan struct{} // closed when open is empty and closed is set
	begun  uint64
	ended  map[string]uint64

	overflowed     uint64
	sent, received int64 // of the ended ones
}

// New returns a book with room for limit open connections. Reasons are all that End will be told.
func New[T any](limit int, reasons ...string) *Book[T] {
	b := &Book[T]{
		limit: limit,
		open:  make(map[*Entry[T]]struct{}),
		idle:  make(chan struct{}),
		ended: map[string]uint64{Other: 0},
	}
	for _, r := range reasons {
		b.ended[r] = 0
	}
	return b
}

// Entry is one open connection.
type Entry[T any] struct {
	book           *Book[T]
	since          time.Time
	facts          atomic.Pointer[T]
	sent, received atomic.Int64
}

// Begin takes a place in the table, and reports false when there is none left or the book is closed.
func (b *Book[T]) Begin(now time.Time) (*Entry[T], bool) {
	e := &Entry[T]{book: b, since: now}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed || len(b.open) >= b.limit {
		b.overflowed++
		return nil, false
	}
	b.begun++
	b.open[e] = struct{}{}
	return e, true
}

// Describe says what is known about the connection. The facts must not be changed afterwards; describe it anew instead.
func (e *Entry[T]) Describe(facts T) { e.facts.Store(&facts) }

// Result is what the ledger says about one connection.
type Result[T any] struct {
	Facts          T // the zero value when it was never described
	Since          time.Time
	Sent, Received int64 // bytes so far: client to edge service, and back
}

func (e *Entry[T]) result() Result[T] {
	r := Result[T]{Since: e.since, Sent: e.sent.Load(), Received: e.received.Load()}
	if facts := e.facts.Load(); facts != nil {
		r.Facts = *facts
	}
	return r
}

// End takes the connection out of the table and counts its reason.
func (e *Entry[T]) End(reason string) Result[T] {
	b := e.book
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.open, e)
	if _, known := b.ended[reason]; !known {
		reason = Other
	}
	b.ended[reason]++
	b.settle()
	r := e.result()
	b.sent += r.Sent
	b.received += r.Received
	return r
}

// settle wakes Wait. The lock is held.
func (b *Book[T]) settle() {
	if !b.closed || len(b.open) > 0 {
		return
	}
	select {
	case <-b.idle:
	default:
		close(b.idle)
	}
}

// Open lists the described connections, oldest first.
func (b *Book[T]) Open() []Result[T] {
	b.mu.Lock()
	list := make([]Result[T], 0, len(b.open))
	for e := range b.open {
		if e.facts.Load() != nil {
			list = append(list, e.result())
		}
	}
	b.mu.Unlock()
	slices.SortFunc(list, func(x, y Result[T]) int { return x.Since.Compare(y.Since) })
	return list
}

// Stats are the ledger's totals. Begun is Open plus the sum of Ended.
type Stats struct {
	Begun uint64
	Open  int
	Ended map[string]uint64 // by reason, all of them, also those that never happened

	Overflowed     uint64 // calls of Begin that found no place, or a closed book
	Sent, Received int64  // bytes of all connections, the open ones included
}

// Stats returns the present totals.
func (b *Book[T]) Stats() Stats {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := Stats{Begun: b.begun, Open: len(b.open), Ended: make(map[string]uint64, len(b.ended)),
		Overflowed: b.overflowed, Sent: b.sent, Received: b.received}
	for e := range b.open {
		s.Sent += e.sent.Load()
		s.Received += e.received.Load()
	}
	for reason, n := range b.ended {
		s.Ended[reason] = n
	}
	return s
}

// Close makes every later Begin fail. It may be called more than once.
func (b *Book[T]) Close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	b.settle()
}

// Closed reports whether Close was called.
func (b *Book[T]) Closed() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.closed
}

// Wait returns when the book is closed and the last connection has ended, or with the error of ctx.
func (b *Book[T]) Wait(ctx context.Context) error {
	select {
	case <-b.idle:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
