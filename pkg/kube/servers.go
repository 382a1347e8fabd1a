// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

const (
	// A server is silent when its heartbeat stands still for so long, by our own clock. Other servers give it longer, see serverGone: they have
	// better ways to know.
	serverSilent = time.Minute

	// A server is gone for good when its heartbeat is so much older than that of one that is alive, and has stood still for some time by our own clock as
	// well: its clock may be wrong.
	serverDead = time.Hour
	deadStill  = 10 * time.Minute

	sweepEvery = time.Minute
)

// liveness is what is known of a server.
type liveness uint8

const (
	silent  liveness = iota
	unheard          // not for long enough to tell
	alive
)

// servers follows what servers say by their Leases, see [Registry], and deletes those of servers that are gone for good.
type servers struct {
	client    kubernetes.Interface
	namespace string
	leases    *follower[*coordinationv1.Lease]
	log       *slog.Logger
	now       func() time.Time

	mu    sync.Mutex
	beats map[string]heartbeatSeen // by server
	away  bool                     // the API server was, when it was last looked
	swept uint64                   // Leases deleted
	err   error                    // of the latest sweep
}

// heartbeatSeen is when a server wrote, by its clock, and when that was seen, by ours.
type heartbeatSeen struct {
	renewed, at time.Time
	again       bool // it was seen to change: somebody writes it
}

func newServers(client kubernetes.Interface, namespace string, log *slog.Logger) *servers {
	s := &servers{client: client, namespace: namespace, log: log, now: time.Now, beats: make(map[string]heartbeatSeen)}
	s.leases = followLeases(client, namespace, log, s.seen)
	return s
}

// run follows and sweeps until ctx ends.
func (s *servers) run(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { s.leases.run(ctx) })
	for sleep(ctx, sweepEvery) {
		s.sweep(ctx)
	}
}

// sweeps is how many Leases were deleted, and why some could not be.
func (s *servers) sweeps() (uint64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.swept, s.err
}

// seen takes what one heartbeat says in the place of what it said; either may be nil.
func (s *servers) seen(was, is *coordinationv1.Lease) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if was != nil && is == nil && was.Labels[LabelRegistry] == registryServer {
		delete(s.beats, holder(was))
	}
	if is == nil || is.Labels[LabelRegistry] != registryServer || is.Spec.RenewTime == nil {
		return
	}
	before, known := s.beats[holder(is)]
	switch renewed := is.Spec.RenewTime.Time; {
	case !known:
		s.beats[holder(is)] = heartbeatSeen{renewed: renewed, at: s.now()}
	case !renewed.Equal(before.renewed):
		s.beats[holder(is)] = heartbeatSeen{renewed: renewed, at: s.now(), again: true}
	}
}

// holder is the server that writes a Lease, "" if it does not say.
func holder(l *coordinationv1.Lease) string {
	if l.Spec.HolderIdentity == nil {
		return ""
	}
	return *l.Spec.HolderIdentity
}

// look says what is known of each server that has a heartbeat, and whether that is all there is to know: nothing is while the API server is
// away, and after that all have to be heard again.
func (s *servers) look() (map[string]liveness, bool) {
	_, complete := s.leases.get("")
	away := s.leases.state().Err != nil
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.away && !away {
		for server, b := range s.beats {
			s.beats[server] = heartbeatSeen{renewed: b.renewed, at: s.now()}
		}
	}
	if s.away = away; away || !complete {
		return nil, false
	}
	known := make(map[string]liveness, len(s.beats))
	for server := range s.beats {
		known[server] = s.of(server)
	}
	return known, true
}

// of needs mu.
func (s *servers) of(server string) liveness {
	b, known := s.beats[server]
	var latest time.Time
	for _, other := range s.beats {
		if other.renewed.After(latest) {
			latest = other.renewed
		}
	}
	switch {
	case !known, s.now().Sub(b.at) >= serverSilent:
		return silent
	case b.again:
		return alive
	case latest.Sub(b.renewed) >= serverGone: // long before we came
		return silent
	}
	return unheard
}

// dead says whether a server is gone for good. It needs mu.
func (s *servers) dead(server string) bool {
	if server == "" || s.of(server) != silent || s.now().Sub(s.beats[server].at) < deadStill {
		return false
	}
	for other, b := range s.beats {
		if s.of(other) == alive && b.renewed.Sub(s.beats[server].renewed) >= serverDead {
			return true
		}
	}
	return false
}

// sweep deletes the Leases of servers that are gone for good: last the heartbeat, so that what is left is found again.
func (s *servers) sweep(ctx context.Context) {
	if _, whole := s.look(); !whole {
		return
	}
	leases := s.leases.all()
	slices.SortFunc(leases, func(a, b *coordinationv1.Lease) int { return kindOrder(a) - kindOrder(b) })
	s.mu.Lock()
	leases = slices.DeleteFunc(leases, func(l *coordinationv1.Lease) bool { return !s.dead(holder(l)) })
	s.mu.Unlock()
	var failed error
	for _, l := range leases {
		err := func() error {
			ctx, cancel := context.WithTimeout(ctx, requestLimit)
			defer cancel()
			return s.client.CoordinationV1().Leases(s.namespace).Delete(ctx, l.Name, metav1.DeleteOptions{
				Preconditions: &metav1.Preconditions{UID: &l.UID, ResourceVersion: &l.ResourceVersion}})
		}()
		if apierrors.IsConflict(err) || apierrors.IsNotFound(err) {
			continue // it was written meanwhile: its server is back
		}
		if err != nil {
			failed = fmt.Errorf("delete the leases of servers that are gone: %w", err)
			break
		}
		s.log.Info("a server is gone for good, its Lease is deleted", "server", holder(l), "lease", l.Name)
		s.mu.Lock()
		s.swept++
		s.mu.Unlock()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if failed != nil && s.err == nil && ctx.Err() == nil {
		s.log.Warn("Leases of servers that are gone stay", "err", failed)
	}
	s.err = failed
}

func kindOrder(l *coordinationv1.Lease) int {
	if l.Labels[LabelRegistry] == registryServer {
		return 1
	}
	return 0
}
