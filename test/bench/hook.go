// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"

	"github.com/edge-tunnel/edge-tunnel/test/netlab"
)

// hookResult is what the probe found.
type hookResult struct {
	Run      circumstances `json:"run"`
	Programs []programCost `json:"programs"`
	Connects []connectCost `json:"connects"`
	Refusal  refusal       `json:"refusal"`
	Updates  []update      `json:"updates"`
}

// programCost is what one of the programs costs a call, by the kernel's statistics.
type programCost struct {
	Program string  `json:"program"`
	Case    string  `json:"case"`
	Miss    bool    `json:"miss,omitempty"` // connect() of somebody unrelated: the bar is about these
	Targets int     `json:"targets"`        // in the map
	Calls   float64 `json:"calls"`          // for each system call, or connection
	Ours    spread  `json:"ours_ns"`
	Empty   spread  `json:"empty_ns"` // of the empty program at the same hook, during the same calls
	Net     spread  `json:"net_ns"`   // the difference
}

// connectCost is what connect and close of an unrelated connection take, all included, statistics off.
type connectCost struct {
	Attached string `json:"attached"`
	Micros   spread `json:"us"`
}

// refusal is how soon connect() to an offline node fails.
type refusal struct {
	P50 spread `json:"p50_us"`
	P99 spread `json:"p99_us"`
}

// update is how long it takes to put targets into an empty map, and then to change one.
type update struct {
	Targets int     `json:"targets"`
	Millis  float64 `json:"ms"`
	State   spread  `json:"state_ms"`   // its tunnel comes or goes
	Address spread  `json:"address_ms"` // its address comes or goes: the whole list is handed over
}

// probing is what the probe is told, as JSON.
type probing struct {
	Rounds   int    `json:"rounds"`
	Connects int    `json:"connects"` // for each case and round
	BPFFS    string `json:"bpffs"`
	Cgroup   string `json:"cgroup"`
}

// runHook runs the probe in a node of its own: namespace, cgroup and bpf filesystem go with it.
func runHook(ctx context.Context, o options) (_ *hookResult, err error) {
	t := &stage{progress: o.progress}
	defer t.clear(&err)
	here := look(ctx, o)
	node := netlab.New(t).Cloud("hook")
	if err := node.Do(sparePorts); err != nil {
		return nil, err
	}
	todo := probing{Rounds: o.rounds, Connects: 3000, BPFFS: node.BPFFS(), Cgroup: node.Cgroup()}
	if o.quick {
		todo.Connects = 300
	}
	args, err := json.Marshal(todo)
	if err != nil {
		return nil, err
	}
	probe := node.Helper(ctx, "hookprobe", string(args))
	probe.Stderr = os.Stderr
	found, err := probe.Output()
	if err != nil {
		return nil, fmt.Errorf("probe: %w", err)
	}
	result := &hookResult{}
	if err := json.Unmarshal(found, result); err != nil {
		return nil, err
	}
	result.Run = here
	return result, nil
}
