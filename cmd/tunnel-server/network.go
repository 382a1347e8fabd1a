// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/hostnet"
	"github.com/edge-tunnel/edge-tunnel/pkg/route"
)

// retryListen is the pause before a listener that could not be opened is tried again: an address may still be tentative.
const retryListen = 2 * time.Second

// network keeps three things in step with the host's addresses: the redirect listeners, where the kernel redirects to, and
// what cannot be a target.
type network struct {
	fixed     []netip.Addr // --node-ip; a family that it does not name is followed
	loopback  []netip.Addr
	redirects *redirects
	setAddrs  func(v4, v6 netip.Addr) error // tells the kernel where pods go
	setRules  func(route.Rules)
	rules     route.Rules // what does not change
	log       *slog.Logger

	mu           sync.Mutex // guards what follows, and redirects
	want4, want6 netip.Addr // where pods should be redirected to
	v4, v6       netip.Addr // where they are
	problem      error
	retrying     *time.Timer
	ended        bool
}

// changed puts a state of the host's network into force. New listeners come before the kernel sends anything there, and old
// ones go after it has stopped.
func (n *network) changed(ctx context.Context, s hostnet.State) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.want4, n.want6 = s.V4, s.V6
	for _, a := range n.fixed {
		if a.Is4() {
			n.want4 = a
		} else {
			n.want6 = a
		}
	}
	rules := n.rules
	rules.Local = s.Local
	rules.Redirect = valid(n.want4, n.want6)
	n.setRules(rules)
	n.apply(ctx)
}

// apply makes v4 and v6 what they should be, as far as that is possible now. Called with the lock held.
func (n *network) apply(ctx context.Context) {
	v4, v6 := n.want4, n.want6
	wanted := append([]netip.Addr{v4, v6}, n.loopback...)
	problem := n.redirects.cover(ctx, wanted)
	if problem != nil {
		// Without a listener the family is as good as absent: pods are refused, not sent to whoever has the port.
		if !n.redirects.has(v4) {
			v4 = netip.Addr{}
		}
		if !n.redirects.has(v6) {
			v6 = netip.Addr{}
		}
		n.again(ctx)
	}
	if err := n.setAddrs(v4, v6); err != nil {
		problem = errors.Join(problem, err)
		n.again(ctx)
	} else {
		if v4 != n.v4 || v6 != n.v6 {
			n.log.Info("pods are redirected to", "ipv4", shown(v4), "ipv6", shown(v6))
		}
		n.v4, n.v6 = v4, v6
		n.redirects.retain(wanted)
	}
	if problem != nil && (n.problem == nil || n.problem.Error() != problem.Error()) {
		n.log.Warn("redirect listeners are not complete", "err", problem)
	}
	n.problem = problem
}

// reopen closes all redirect listeners and opens them anew. In between connects are refused.
func (n *network) reopen(ctx context.Context) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.redirects.retain(nil)
	n.apply(ctx)
}

// again tries once more in a while. Called with the lock held.
func (n *network) again(ctx context.Context) {
	if n.retrying != nil || n.ended {
		return // it is on its way, or too late
	}
	n.retrying = time.AfterFunc(retryListen, func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		n.retrying = nil
		if !n.ended && ctx.Err() == nil {
			n.apply(ctx)
		}
	})
}

// stop ends the retries; no call of changed may follow.
func (n *network) stop() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.ended = true
	if n.retrying != nil {
		n.retrying.Stop()
	}
}

// addrs are where pods are redirected to.
func (n *network) addrs() []netip.Addr {
	n.mu.Lock()
	defer n.mu.Unlock()
	return valid(n.v4, n.v6)
}

func valid(addrs ...netip.Addr) []netip.Addr {
	return slices.DeleteFunc(addrs, func(a netip.Addr) bool { return !a.IsValid() })
}

func (n *network) err() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.problem != nil {
		return fmt.Errorf("redirect listeners: %w", n.problem)
	}
	return nil
}

func shown(a netip.Addr) string {
	if !a.IsValid() {
		return "none"
	}
	return a.String()
}
