// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

const (
	memoryEvery  = 15 * time.Second
	memoryExcess = 16 << 20 // not worth a collection
)

// tidyMemory gives memory back to the system when it has become quiet, until ctx ends. After a storm of logins Go keeps as much again as is
// in use, for the next one; beside 10,000 tunnels at rest, which make hardly any garbage, the next collection would be long in coming.
func tidyMemory(ctx context.Context) {
	tick := time.NewTicker(memoryEvery)
	defer tick.Stop()
	was := readMemory()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := readMemory()
		if now.excessive(was) {
			runtime.GC() // halves stacks that are too large: those of 10,000 handshakes
			debug.FreeOSMemory()
			now = readMemory()
		}
		was = now
	}
}

// memory is what the process has of the system, what of that is in use, and how much was ever allocated, in bytes.
type memory struct{ held, live, allocated uint64 }

func readMemory() memory {
	samples := []metrics.Sample{
		{Name: "/memory/classes/heap/objects:bytes"},
		{Name: "/memory/classes/heap/free:bytes"},
		{Name: "/gc/heap/live:bytes"},
		{Name: "/gc/heap/allocs:bytes"},
	}
	metrics.Read(samples)
	value := func(i int) uint64 { return samples[i].Value.Uint64() }
	return memory{held: value(0) + value(1), live: value(2), allocated: value(3)}
}

// excessive reports whether a collection would give back a quarter of the heap or more, and since was so little was allocated that Go
// would not soon collect by itself.
func (m memory) excessive(was memory) bool {
	excess := m.held - min(m.live, m.held)
	return excess > memoryExcess && excess > m.held/4 && m.allocated-was.allocated < m.live/4
}
