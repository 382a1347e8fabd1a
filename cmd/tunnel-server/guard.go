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
)

// guardKernel is what the guard looks at and repairs; [redirect.Kernel] has it.
type guardKernel interface {
	Health() error
	Programs() ([]redirect.HookProgram, error)
	Attach() error
	Canary(context.Context) redirect.CanaryResult
	Stats() (redirect.Counters, error)
}

// guard proves again and again that the interception works, and repairs it where that is possible.
type guard struct {
	kernel guardKernel
	reopen func(context.Context) // makes the redirect listeners anew
	log    *slog.Logger

	mu     sync.Mutex // guards what follows
	latest guardState

	// Only for the goroutine that looks.
	reordered time.Time
	unproven  bool // the programs were attached again, and no canary has arrived since
	path      podPath
}

// guardState is what the guard found at its latest look.
type guardState struct {
	hooks      error // programs that are not in force
	ipv4, ipv6 error // of the latest canary
	proven     bool  // a canary was there
	pods       error // see podPath
	programs   []redirect.HookProgram
	reattached uint64 // times, since the start
}

// canary is why the interception is not proven to work; nil if it is.
func (s guardState) canary() error {
	if !s.proven {
		return errors.New("not tested yet")
	}
	return errors.Join(s.ipv4, s.ipv6)
}

func (g *guard) state() guardState {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.latest
}

func (g *guard) update(change func(*guardState)) {
	g.mu.Lock()
	defer g.mu.Unlock()
	change(&g.latest)
}

// run looks until ctx ends. A first look, with a canary, was there before.
func (g *guard) run(ctx context.Context) error {
	ticks := time.NewTicker(guardInterval)
	defer ticks.Stop()
	for n := 1; ; n++ {
		select {
		case <-ctx.Done():
			return nil
		case <-ticks.C:
		}
		g.look(ctx, n%canaryEvery == 0)
	}
}

// look looks once. The programs are attached and the listeners served.
func (g *guard) look(ctx context.Context, canary bool) {
	repaired := g.lookAtHooks()
	g.lookAtPods()
	if s := g.state(); canary || repaired || s.canary() != nil {
		g.sendCanary(ctx)
	}
	g.unproven = g.unproven || repaired
	if g.unproven && g.state().canary() != nil && ctx.Err() == nil {
		// A cgroup that was removed and made anew has the programs again, but listeners stay in the cgroup that they were opened in.
		g.log.Warn("opening the redirect listeners anew", "why", "the programs were attached again, and the canary does not arrive")
		g.reopen(ctx)
		g.sendCanary(ctx)
	}
	g.unproven = g.unproven && g.state().canary() != nil
}

// lookAtHooks attaches the programs again where they are gone, or where others run after them.
func (g *guard) lookAtHooks() (repaired bool) {
	hooks, programs := g.kernel.Health(), g.programs()
	last := ourTurnIsLast(programs)
	if hooks != nil || !last && time.Since(g.reordered) > reorderPause {
		g.log.Warn("attaching the programs again", "why", whyAgain(hooks))
		g.reordered = time.Now()
		if hooks = g.kernel.Attach(); hooks != nil {
			g.log.Error("cannot attach the programs", "err", hooks)
		}
		repaired = hooks == nil
		programs = g.programs()
	}
	g.update(func(s *guardState) {
		s.hooks, s.programs = hooks, programs
		if repaired {
			s.reattached++
		}
	})
	return repaired
}

func whyAgain(hooks error) string {
	if hooks != nil {
		return hooks.Error()
	}
	return "others run after them"
}

func (g *guard) programs() []redirect.HookProgram {
	list, err := g.kernel.Programs()
	if err != nil {
		g.log.Warn("cannot list the programs on the hooks", "err", err)
	}
	return list
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

// warnOfEphemeralPorts says so if the redirect ports are not safe from those who ask for any port, which the bind hook does not see.
func warnOfEphemeralPorts(kernel interface{ EphemeralPorts() ([]uint16, error) }, log *slog.Logger) {
	ports, err := kernel.EphemeralPorts()
	if err != nil {
		log.Warn("cannot tell whether the redirect ports are ephemeral ports", "err", err)
		return
	}
	if len(ports) > 0 {
		log.Warn("redirect ports are among the ephemeral ports, where others can get them while no server runs",
			"ports", ports, "hint", fmt.Sprintf("sysctl -w net.ipv4.ip_local_reserved_ports=%d-%d (beside what is in it)", ports[0], ports[len(ports)-1]))
	}
}

func (g *guard) lookAtPods() {
	counters, err := g.kernel.Stats()
	if err != nil {
		g.log.Warn("cannot read the counters", "err", err)
		return
	}
	problem := g.path.judge(counters)
	if was := g.state().pods; problem != nil && was == nil {
		g.log.Error("connections of pods do not arrive", "err", problem)
	} else if problem == nil && was != nil {
		g.log.Info("nothing is known any more against the way of the pods' connections")
	}
	g.update(func(s *guardState) { s.pods = problem })
}

func (g *guard) sendCanary(ctx context.Context) {
	result := g.kernel.Canary(ctx)
	if ctx.Err() != nil {
		return // it proves nothing
	}
	was := g.state()
	for _, f := range []struct {
		name     string
		was, now error
	}{{"IPv4", was.ipv4, result.IPv4}, {"IPv6", was.ipv6, result.IPv6}} {
		if f.now != nil && (f.was == nil || f.was.Error() != f.now.Error()) {
			g.log.Error("interception does not work", "family", f.name, "err", f.now)
		} else if f.now == nil && f.was != nil {
			g.log.Info("interception works again", "family", f.name)
		}
	}
	g.update(func(s *guardState) { s.ipv4, s.ipv6, s.proven = result.IPv4, result.IPv6, true })
}
