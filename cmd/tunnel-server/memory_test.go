// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"runtime"
	"runtime/debug"
	"testing"
	"testing/synctest"
	"time"
)

func TestExcessiveMemory(t *testing.T) {
	const mib = 1 << 20
	for _, c := range []struct {
		what     string
		was, now memory
		want     bool
	}{
		{"as much again", memory{}, memory{held: 200 * mib, live: 100 * mib}, true},
		{"little in all", memory{}, memory{held: 20 * mib, live: 10 * mib}, false},
		{"a small part", memory{}, memory{held: 120 * mib, live: 100 * mib}, false},
		{"busy", memory{allocated: 10 * mib}, memory{held: 200 * mib, live: 100 * mib, allocated: 50 * mib}, false},
		{"less than at the last collection", memory{}, memory{held: 50 * mib, live: 100 * mib}, false},
	} {
		if got := c.now.excessive(c.was); got != c.want {
			t.Errorf("%s: %v", c.what, got)
		}
	}
}

// TestMemoryIsGivenBack makes garbage and lets it be quiet.
func TestMemoryIsGivenBack(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // nobody else collects
	debug.FreeOSMemory()
	before := readMemory()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); tidyMemory(ctx) }()
		garbage := make([]byte, 128<<20)
		runtime.KeepAlive(garbage)
		if got := readMemory().held; got < before.held+100<<20 {
			t.Errorf("%d bytes are held", got)
		}
		time.Sleep(2*memoryEvery + time.Second) // the first one sees that there was much to do
		if got := readMemory().held; got > before.held+64<<20 {
			t.Errorf("%d bytes are held still", got)
		}
		cancel()
		<-done
	})
}
