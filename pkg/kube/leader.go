// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
)

// LeaderConfig is how one of several processes is chosen.
type LeaderConfig struct {
	Client          kubernetes.Interface
	Namespace, Name string // of the Lease
	Identity        string // of this process: no other may have it
	// A leader that could not say for Lease that it lives is replaced; it stops after two thirds of that. Default 15 s.
	Lease time.Duration
	Log   *slog.Logger
}

// Validate joins everything that is wrong.
func (c LeaderConfig) Validate() error {
	var bad []error
	for _, field := range []struct {
		name    string
		missing bool
	}{{"Client", c.Client == nil}, {"Namespace", c.Namespace == ""}, {"Name", c.Name == ""}, {"Identity", c.Identity == ""}} {
		if field.missing {
			bad = append(bad, fmt.Errorf("leader: %s is not set", field.name))
		}
	}
	return errors.Join(bad...)
}

// Leader has a function run in one of several processes. A process that is no longer the one waits to be it again; nothing ends it.
type Leader struct {
	c LeaderConfig

	mu      sync.Mutex
	leading bool
	leader  string
	terms   uint64
	err     error // of the last request for the lease
}

// LeaderStats is a snapshot.
type LeaderStats struct {
	Leading bool
	Leader  string // the identity of who leads, empty if that is not known
	Terms   uint64 // how often this process has begun to lead
	Error   string // why the lease cannot be read or written now
}

// NewLeader returns a Leader for [Leader.Run].
func NewLeader(c LeaderConfig) (*Leader, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if c.Lease <= 0 {
		c.Lease = 15 * time.Second
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return &Leader{c: c}, nil
}

// Stats returns a snapshot.
func (l *Leader) Stats() LeaderStats {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := LeaderStats{Leading: l.leading, Leader: l.leader, Terms: l.terms}
	if l.err != nil {
		out.Error = l.err.Error()
	}
	return out
}

// seen remembers how a request for the lease went. That there is none yet, or that another was faster, is no trouble.
func (l *Leader) seen(err error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err = err; apierrors.IsNotFound(err) || apierrors.IsConflict(err) || apierrors.IsAlreadyExists(err) {
		l.err = nil
	}
	return err
}

// lock tells the Leader how its requests go: client-go logs that only.
type lock struct {
	resourcelock.Interface
	leader *Leader
}

func (k lock) Get(ctx context.Context) (*resourcelock.LeaderElectionRecord, []byte, error) {
	record, raw, err := k.Interface.Get(ctx)
	return record, raw, k.leader.seen(err)
}

func (k lock) Create(ctx context.Context, r resourcelock.LeaderElectionRecord) error {
	return k.leader.seen(k.Interface.Create(ctx, r))
}

func (k lock) Update(ctx context.Context, r resourcelock.LeaderElectionRecord) error {
	return k.leader.seen(k.Interface.Update(ctx, r))
}

// Run has lead run whenever this process is the leader, until ctx ends. The context that lead gets ends with the leadership; the next
// leader begins when it has returned, or the lease has run out.
func (l *Leader) Run(ctx context.Context, lead func(context.Context) error) error {
	for ctx.Err() == nil {
		if err := l.term(ctx, lead); err != nil {
			return err
		}
	}
	return nil
}

func (l *Leader) term(ctx context.Context, lead func(context.Context) error) error {
	// The election outlives ctx, so that the lease is given back when lead has returned and not before.
	election, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	begun := make(chan context.Context, 1)
	elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
		Lock: lock{leader: l, Interface: &resourcelock.LeaseLock{
			LeaseMeta: metav1.ObjectMeta{Namespace: l.c.Namespace, Name: l.c.Name},
			Client:    l.c.Client.CoordinationV1(), LockConfig: resourcelock.ResourceLockConfig{Identity: l.c.Identity},
		}},
		LeaseDuration: l.c.Lease, RenewDeadline: l.c.Lease * 2 / 3, RetryPeriod: l.c.Lease * 2 / 15,
		ReleaseOnCancel: true, Name: l.c.Name,
		Callbacks: leaderelection.LeaderCallbacks{
			OnStartedLeading: func(term context.Context) { begun <- term },
			OnStoppedLeading: func() {},
			OnNewLeader: func(identity string) {
				l.mu.Lock()
				l.leader = identity
				l.mu.Unlock()
				l.c.Log.Info("leader", "identity", identity, "self", identity == l.c.Identity)
			},
		},
	})
	if err != nil {
		return fmt.Errorf("elect leader: %w", err)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	ended := make(chan struct{})
	wg.Go(func() {
		defer close(ended)
		elector.Run(election)
	})
	select {
	case <-ctx.Done():
		return nil
	case <-ended: // elected and not any more, before the function below could begin
		return nil
	case term := <-begun:
		l.lead(ctx, term, lead)
		return nil
	}
}

// lead runs the function until it returns or its term or ctx ends.
func (l *Leader) lead(ctx, term context.Context, lead func(context.Context) error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(term, cancel)()
	l.set(true)
	defer l.set(false)
	l.c.Log.Info("leading")
	if err := lead(ctx); err != nil {
		l.c.Log.Error("leading failed, another may", "err", err)
	}
	l.c.Log.Info("no longer leading", "lost", term.Err() != nil)
}

func (l *Leader) set(leading bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.leading = leading; leading {
		l.terms++
	}
}
