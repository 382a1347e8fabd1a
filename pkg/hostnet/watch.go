// SPDX-License-Identifier: Apache-2.0

package hostnet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
)

const (
	// settle: events come in bursts (an address brings routes, a link both); wait for the rest before looking.
	settle = 75 * time.Millisecond
	// Where a look is slow, as with a full routing table, and events never end, no more than a tenth of the time is spent on looking.
	settlePerCost = 10
	settleMax     = 5 * time.Second
	retryPause    = time.Second // after a look or a subscription that failed
)

// Groups to subscribe to, from linux/rtnetlink.h.
var groups = [...]uint{1 /* LINK */, 5 /* IPV4_IFADDR */, 7 /* IPV4_ROUTE */, 9 /* IPV6_IFADDR */, 11 /* IPV6_ROUTE */}

// Change is what a [Watcher] tells.
type Change struct {
	State
	// Gained: since the last Change a way off this host appeared: a link with an address came up, an address was added to
	// one, or a default or gateway route. Whoever waits to dial again should do so now.
	Gained bool
}

// Watcher follows the network of the namespace that Run is called in. A literal is ready for use.
type Watcher struct {
	// Changed is called from Run with the first state, at once, and then after each change; not twice with the same
	// state, unless Gained is set. The next look at the network waits for it to return. Required.
	Changed func(Change)
	Log     *slog.Logger // nil discards

	// For tests.
	receiveBuffer int                 // bytes; 0 is the system's default
	onSubscribe   func(*subscription) // called for each

	looks, overruns, failures atomic.Uint64
}

// WatcherStats counts since the Watcher was made.
type WatcherStats struct {
	Looks    uint64 // times the whole state was read
	Overruns uint64 // times the kernel had to drop events
	Failures uint64 // looks and subscriptions that failed
}

// Stats may be called at any time.
func (w *Watcher) Stats() WatcherStats {
	return WatcherStats{Looks: w.looks.Load(), Overruns: w.overruns.Load(), Failures: w.failures.Load()}
}

// Run watches until ctx ends, then returns nil. It returns an error only if it never saw the state; later failures
// are logged, counted and tried again.
func (w *Watcher) Run(ctx context.Context) error {
	log := w.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	var last view
	for {
		err := w.follow(ctx, log, &last)
		switch {
		case ctx.Err() != nil:
			return nil
		case !last.valid:
			return fmt.Errorf("watch network: %w", err)
		}
		w.failures.Add(1)
		log.Warn("watching the network failed, trying again", "err", err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(retryPause):
		}
	}
}

// view is what was told last.
type view struct {
	valid bool
	state State
	ways  map[way]struct{}
}

// follow uses one subscription until it breaks or ctx ends.
func (w *Watcher) follow(ctx context.Context, log *slog.Logger, last *view) error {
	// First the subscription, then the first look: what happens between is in both.
	sub, err := w.subscribe()
	if err != nil {
		return err
	}
	defer sub.close()
	if w.onSubscribe != nil {
		w.onSubscribe(sub)
	}
	h, err := openHandle()
	if err != nil {
		return err
	}
	defer h.Close()

	for {
		began := time.Now()
		var retry <-chan time.Time
		if err := w.look(ctx, h, last); err != nil {
			if ctx.Err() != nil || !last.valid {
				return err
			}
			w.failures.Add(1)
			log.Warn("reading the network failed, trying again", "err", err)
			retry = time.After(retryPause)
		}
		quiet := min(max(settle, settlePerCost*time.Since(began)), settleMax)

		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-sub.broken:
			return sub.err
		case <-retry:
			continue
		case <-sub.events:
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(quiet):
		}
		select { // all events until here are covered by the look that comes now
		case <-sub.events:
		default:
		}
	}
}

// look reads the state and tells it if it is news.
func (w *Watcher) look(ctx context.Context, h *netlink.Handle, last *view) error {
	w.looks.Add(1)
	f, err := readFacts(ctx, h)
	if err != nil {
		return err
	}
	now := view{valid: true, state: f.state(), ways: f.ways()}
	gained := false
	if last.valid {
		for way := range now.ways {
			if _, had := last.ways[way]; !had {
				gained = true
				break
			}
		}
	}
	news := !last.valid || gained || !now.state.equal(last.state)
	*last = now
	if news {
		w.Changed(Change{State: now.state, Gained: gained})
	}
	return nil
}

// subscription turns netlink messages into "something happened".
type subscription struct {
	sock   *nl.NetlinkSocket
	events chan struct{} // holds one
	broken chan struct{} // closed when the reader has ended
	err    error         // why; to be read after broken
}

func (w *Watcher) subscribe() (*subscription, error) {
	sock, err := nl.Subscribe(syscall.NETLINK_ROUTE, groups[:]...)
	if err != nil {
		return nil, fmt.Errorf("subscribe to netlink: %w", err)
	}
	if w.receiveBuffer != 0 {
		if err := sock.SetReceiveBufferSize(w.receiveBuffer, false); err != nil {
			sock.Close()
			return nil, fmt.Errorf("set receive buffer: %w", err)
		}
	}
	s := &subscription{sock: sock, events: make(chan struct{}, 1), broken: make(chan struct{})}
	go func() {
		defer close(s.broken)
		s.err = w.receive(s)
	}()
	return s, nil
}

func (w *Watcher) receive(s *subscription) error {
	for {
		_, _, err := s.sock.Receive()
		switch {
		case err == nil:
		case errors.Is(err, syscall.EINTR), errors.Is(err, syscall.EAGAIN):
			continue
		case errors.Is(err, syscall.ENOBUFS):
			// Events were dropped. The socket lives on, and the full look that follows any event makes up for it.
			w.overruns.Add(1)
		default:
			return err // also when closed, which has more than one error; never a reason to spin
		}
		select {
		case s.events <- struct{}{}:
		default:
		}
	}
}

// close ends the reader and waits for it.
func (s *subscription) close() {
	s.sock.Close()
	<-s.broken
}
