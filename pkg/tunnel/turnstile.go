// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"runtime"
	"sync"
)

// turnstile lets only so many handshakes compute at one time. When 10,000 agents come back at once, each of them would otherwise have a
// goroutine that wants to, and everybody else's bytes would wait behind all of them: for seconds, not milliseconds. Waiting for
// the network takes no place. Tunnels that die are buried one after the other as well.
//
// Those that have begun go first: what was begun is worth something only when it is finished, before the agent loses patience. Of the
// others the last to come goes first: when more come than can be served, those at the front of a line would be the ones whose time is
// up, and an honest agent would stand behind a whole flood.
type turnstile struct {
	mu      sync.Mutex
	free    int
	waiting [2][]chan struct{} // beginning, going
}

const (
	beginning = iota
	going
)

// newTurnstile leaves a quarter of the cores to others, and has one place at least.
func newTurnstile() *turnstile { return &turnstile{free: max(1, runtime.GOMAXPROCS(0)*3/4)} }

// enter waits for a place. A nil turnstile has places for all.
func (t *turnstile) enter(stage int) {
	if t == nil {
		return
	}
	t.mu.Lock()
	if t.free > 0 {
		t.free--
		t.mu.Unlock()
		return
	}
	turn := make(chan struct{})
	t.waiting[stage] = append(t.waiting[stage], turn)
	t.mu.Unlock()
	<-turn
}

// leave passes the place on.
func (t *turnstile) leave() {
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for stage := going; stage >= beginning; stage-- {
		if last := len(t.waiting[stage]) - 1; last >= 0 {
			close(t.waiting[stage][last])
			t.waiting[stage] = t.waiting[stage][:last]
			return
		}
	}
	t.free++
}

// turn is one handshake's use of a turnstile, in the goroutine of the handshake.
type turn struct {
	at     *turnstile
	inside bool
}

func (t *turn) enter(stage int) {
	t.at.enter(stage)
	t.inside = true
}

func (t *turn) leave() {
	if t.inside {
		t.inside = false
		t.at.leave()
	}
}
