// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/redirect"
)

const (
	// guardInterval is how often the programs are looked at, and canaryEvery of these looks make a connection of their own.
	guardInterval = 10 * time.Second
	canaryEvery   = 3
	// reorderPause keeps two agents that both want to be last on a hook from fighting.
	reorderPause = time.Minute
	// podSilence is how many pod connects may be redirected, with none arriving, before somebody is to blame.
	podSilence = 5
)

// guard proves again and again that the interception works, and repairs it where that is possible.
type guard struct {
	kernel   *redirect.Kernel
	hostOnly bool
	log      *slog.Logger

	mu         sync.Mutex // guards what follows
	hooks      error      // programs that are not in force
	ipv4, ipv6 error      // of the latest canary
	proven     bool       // a canary was there
	pods       error
	programs   []redirect.HookProgram
	repaired   uint64

	// Only for the goroutine in run.
	reordered time.Time
	counters  redirect.Counters
	silent    uint64 // pod connects redirected since the last that arrived
}

// run looks until ctx ends. The programs are attached and the listeners served.
func (g *guard) run(ctx context.Context) error {
	ticks := time.NewTicker(guardInterval)
	defer ticks.Stop()
	for look := 0; ; look++ {
		g.look(ctx, look%canaryEvery == 0)
		select {
		case <-ctx.Done():
			return nil
		case <-ticks.C:
		}
	}
}

func (g *guard) look(ctx context.Context, canary bool) {
	hooks := g.kernel.Health()
	programs, err := g.kernel.Programs()
	if err != nil {
		g.log.Warn("cannot list the programs on the hooks", "err", err)
	}
	last := ourTurnIsLast(programs)
	if hooks != nil || !last && time.Since(g.reordered) > reorderPause {
		g.log.Warn("attaching the programs again", "detached", hooks, "last", last)
		g.reordered = time.Now()
		hooks = g.kernel.Attach()
		canary = true
		g.mu.Lock()
		g.repaired++
		g.mu.Unlock()
		programs, _ = g.kernel.Programs()
	}

	g.mu.Lock()
	canary = canary || g.ipv4 != nil || g.ipv6 != nil || !g.proven
	g.hooks, g.programs = hooks, programs
	g.mu.Unlock()
	g.lookAtPods()
	if !canary {
		return
	}
	result := g.kernel.Canary(ctx)
	if ctx.Err() != nil {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, f := range []struct {
		name     string
		was, now error
	}{{"IPv4", g.ipv4, result.IPv4}, {"IPv6", g.ipv6, result.IPv6}} {
		if f.now != nil && (f.was == nil || f.was.Error() != f.now.Error()) {
			g.log.Error("interception does not work", "family", f.name, "err", f.now)
		} else if f.now == nil && f.was != nil {
			g.log.Info("interception works again", "family", f.name)
		}
	}
	g.ipv4, g.ipv6, g.proven = result.IPv4, result.IPv6, true
}

// lookAtPods compares what was redirected for pods with what arrived: a host firewall that drops pod-to-node traffic would
// otherwise look like an edge that is dead.
func (g *guard) lookAtPods() {
	now, err := g.kernel.Stats()
	if err != nil {
		g.log.Warn("cannot read the counters", "err", err)
		return
	}
	before := g.counters
	g.counters = now
	if g.hostOnly || before == (redirect.Counters{}) {
		return
	}
	if now.AcceptedPod != before.AcceptedPod {
		g.silent = 0
	} else {
		g.silent += now.RedirectedPod4 + now.RedirectedPod6 - before.RedirectedPod4 - before.RedirectedPod6
	}
	var pods error
	if g.silent >= podSilence {
		what := "a host firewall may drop pod-to-node traffic on the redirect ports"
		if now.HandedOverPod != before.HandedOverPod {
			what = "something may translate addresses between pods and node (SNAT)"
		}
		pods = fmt.Errorf("%d connects of pods were redirected to this node and none arrived: %s", g.silent, what)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.pods = pods
}

// ourTurnIsLast reports whether our programs run after all others on the hooks where another's choice of address counts.
func ourTurnIsLast(programs []redirect.HookProgram) bool {
	last := map[string]bool{"connect4": true, "connect6": true}
	for _, p := range programs {
		if _, counts := last[p.Hook]; counts {
			last[p.Hook] = p.Ours
		}
	}
	return last["connect4"] && last["connect6"]
}

// guardState is what the guard found at its latest look.
type guardState struct {
	hooks    error // not attached
	canary   error // not proven
	pods     error
	programs []redirect.HookProgram
	repaired uint64
}

func (g *guard) state() guardState {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := guardState{hooks: g.hooks, canary: errors.Join(g.ipv4, g.ipv6), pods: g.pods, programs: g.programs, repaired: g.repaired}
	if !g.proven {
		s.canary = errors.New("not tested yet")
	}
	return s
}
