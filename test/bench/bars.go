// SPDX-License-Identifier: Apache-2.0

package main

import "fmt"

// bar is a goal for edge-tunnel, as a ratio to another path or as a number.
type bar struct {
	against string // path
	limit   float64
	atLeast bool // else: at most
}

// bars are those of the data path. Works that are not named have none yet.
func bars(k kind) []bar {
	switch k {
	case connects:
		return []bar{{muxPath, 1.3, false}}
	case down, up:
		return []bar{{tlsPath, 0.75, true}, {muxPath, 1, true}}
	}
	return nil
}

// The bars of long links: bulk, and the 99th percentile of keys beside bulk; bulk beside stalled readers.
var (
	longBulkBar = bar{against: directPath, limit: 0.95, atLeast: true}
	longKeysBar = bar{limit: 1.5}
	stalledBar  = bar{limit: 0.95, atLeast: true}
)

// The bars of the hop between servers, as ratios to an own tunnel.
var (
	hopConnectBar = bar{limit: 1.6}
	hopBulkBar    = bar{limit: 0.7, atLeast: true}
)

// The bars of many agents.
var (
	agentMemoryBar = bar{limit: 40}  // KiB of the server, each
	agentCoreBar   = bar{limit: 0.1} // cores of the server for the keepalives of all
	stormBar       = bar{limit: 20}  // seconds until the last one is back
	liveBar        = bar{limit: 50}  // milliseconds, 99th percentile beside a storm
)

// The bars of the hook.
var (
	missBar    = bar{limit: 100}  // nanoseconds of a connect() that is nobody's business
	warmBar    = bar{limit: 700}  // of one to a target, where the targets are few
	hitBar     = bar{limit: 1200} // and where they are 65,536
	sockOpsBar = bar{limit: 10}   // of a call for sockets that are not ours
	refusalBar = bar{limit: 1000} // microseconds, 99th percentile
	fillBar    = bar{limit: 200}  // milliseconds until 65,536 targets are in the map
	changeBar  = bar{limit: 1}    // milliseconds until one change is
)

// bar is the goal of a row, if it has one.
func (p programCost) bar() (bar, bool) {
	switch {
	case p.Miss:
		return missBar, true
	case p.Case == notTunneled:
		return sockOpsBar, true
	case p.Case == hitCase && p.Program != "sock_ops" && p.Targets <= 1000:
		return warmBar, true
	case p.Case == hitCase && p.Program != "sock_ops" && p.Targets == maxTargets:
		return hitBar, true
	}
	return bar{}, false
}

func (b bar) text() string {
	if b.atLeast {
		return fmt.Sprintf("≥ %.2f", b.limit)
	}
	return fmt.Sprintf("≤ %.2f", b.limit)
}

func (b bar) met(value float64) bool {
	if b.atLeast {
		return value >= b.limit
	}
	return value <= b.limit
}

// judge says whether the median meets the bar, and if the rounds disagree, how many of them do.
func (b bar) judge(rounds []float64) string {
	if len(rounds) == 0 {
		return nothing
	}
	verdict := "**missed**"
	if b.met(spreadOf(rounds).Median) {
		verdict = "met"
	}
	held := 0
	for _, value := range rounds {
		if b.met(value) {
			held++
		}
	}
	if held > 0 && held < len(rounds) {
		verdict += fmt.Sprintf(" (%d of %d rounds met it)", held, len(rounds))
	}
	return verdict
}
