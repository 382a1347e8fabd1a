// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"time"
)

// agentsResult is what many agents cost a server, and how they come back.
type agentsResult struct {
	Run    circumstances `json:"run"`
	Agents int           `json:"agents"`
	Rests  []repose      `json:"rests"`
	Storms []storm       `json:"storms"`
	Visits []sample      `json:"visits"` // of every node once, after each storm
}

// repose is the server while nothing happens.
type repose struct {
	After   string  `json:"after"`
	Seconds float64 `json:"seconds"` // measured, after as long a time to settle
	RSS     float64 `json:"rss_kib"` // at the end
	Each    float64 `json:"each_kib"`
	Bare    float64 `json:"bare_rss_kib"` // before the first agent came
	Heap    float64 `json:"heap_kib"`     // live, and not yet collected
	Stacks  float64 `json:"stacks_kib"`
	Routine float64 `json:"goroutines"`
	Cores   float64 `json:"cores"`
	Logins  float64 `json:"logins"` // attempts meanwhile: agents look for a second server
}

// storm is how all agents log in at once.
type storm struct {
	What     string             `json:"what"`
	P50      float64            `json:"p50_s"` // until an agent is back
	P99      float64            `json:"p99_s"`
	Last     float64            `json:"last_s"`
	Targets  float64            `json:"targets_s"` // until the kernel has all of them online
	Dials    uint64             `json:"dials"`
	Failures uint64             `json:"failures"`
	Refused  map[string]float64 `json:"refused,omitempty"` // by the server, by reason
	Server   float64            `json:"server_cpu"`        // seconds
	Fleets   float64            `json:"fleets_cpu"`
	Peak     float64            `json:"peak_rss_kib"`
	Tunnel   *lag               `json:"tunnel,omitempty"` // through the tunnel of an agent that stays
	Beside   *lag               `json:"beside,omitempty"` // the same between the same two nodes, without a tunnel
}

func runAgents(ctx context.Context, o options) (_ *agentsResult, err error) {
	t := &stage{progress: o.progress}
	defer t.clear(&err)
	count, quiet := 10000, time.Minute
	if o.quick {
		count, quiet = 200, 2*time.Second
	}
	result := &agentsResult{Run: look(ctx, o), Agents: count}
	c := &crowd{t: t, bin: o.bin, profile: o.profile, count: count}
	if err := c.prepare(ctx); err != nil {
		return nil, err
	}
	if err := c.gather(ctx); err != nil {
		return nil, err
	}
	// The restart is last: the tunnel of the agent that stays does not outlive it.
	causes := []cause{{"first login", c.start}}
	for range min(o.rounds, 3) {
		causes = append(causes, cause{"all connections break", c.cut})
	}
	causes = append(causes, cause{"the server is killed and starts again", c.restart})
	for i, kind := range causes {
		s, err := c.storm(ctx, kind)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", kind.name, err)
		}
		result.Storms = append(result.Storms, s)
		o.say("%s: the last one is back after %.1f s", s.What, s.Last)
		visited, err := c.client.do(task{Work: work{visits, 16, count}})
		if err != nil {
			return nil, err
		}
		result.Visits = append(result.Visits, visited)
		if i == 0 || i == len(causes)-1 {
			r, err := c.repose(ctx, kind.name, quiet)
			if err != nil {
				return nil, err
			}
			result.Rests = append(result.Rests, r)
			o.say("at rest: %.1f KiB each, %.3f cores", r.Each, r.Cores)
		}
	}
	return result, nil
}

func (a *agentsResult) text() string {
	rests := table{{"after", "RSS, MiB", "each, KiB", "bar: ≤ 40 KiB", "cores", "bar: ≤ 0.1", "heap + stacks, MiB", "goroutines", "further dials meanwhile"}}
	for _, r := range a.Rests {
		rests = append(rests, []string{r.After, fmt.Sprintf("%s (%s without agents)", number(r.RSS/1024, 0), number(r.Bare/1024, 0)), number(r.Each, 1),
			agentMemoryBar.judge([]float64{r.Each}), number(r.Cores, 3), agentCoreBar.judge([]float64{r.Cores}),
			fmt.Sprintf("%s + %s", number(r.Heap/1024, 0), number(r.Stacks/1024, 0)), number(r.Routine, 0), number(r.Logins, 0)})
	}
	storms := table{{"what", "back after, s: p50, p99, last", "bar: last ≤ 20 s", "targets online after, s", "dials (failed)", "CPU, s: server + agents", "peak RSS, MiB"}}
	live := table{{"what", "message through a tunnel that stays, ms: p50, p99, max", "bar: p99 ≤ 50 ms", "the same without a tunnel", "new connections, p99, ms: tunnel, without"}}
	for _, s := range a.Storms {
		storms = append(storms, []string{s.What, fmt.Sprintf("%s, %s, %s", number(s.P50, 1), number(s.P99, 1), number(s.Last, 1)),
			stormBar.judge([]float64{s.Last}), number(s.Targets, 1), fmt.Sprintf("%s (%s)", number(float64(s.Dials), 0), number(float64(s.Failures), 0)),
			fmt.Sprintf("%s + %s", number(s.Server, 1), number(s.Fleets, 1)), number(s.Peak/1024, 0)})
		if s.Tunnel != nil {
			three := func(l *lag) string {
				return fmt.Sprintf("%s, %s, %s", number(l.P50, 1), number(l.P99, 1), number(l.Max, 1))
			}
			live = append(live, []string{s.What, three(s.Tunnel), liveBar.judge([]float64{s.Tunnel.P99}), three(s.Beside),
				fmt.Sprintf("%s, %s", number(s.Tunnel.ConnectPs, 1), number(s.Beside.ConnectPs, 1))})
		}
	}
	visited := ""
	for _, v := range a.Visits {
		visited += fmt.Sprintf(" %s in %s s (p99 %s ms).", count(v.Ops, "node"), number(v.Seconds, 1), number(v.P99/1e3, 1))
	}
	return a.Run.text() + fmt.Sprintf("%s agents at rest\n\n", number(float64(a.Agents), 0)) + rests.String() +
		"\nAll of them log in at once\n\n" + storms.String() +
		"\nBeside it\n\n" + live.String() +
		"\nAfter each, a connection to every node's address, and the right name from it:" + visited + "\n"
}
