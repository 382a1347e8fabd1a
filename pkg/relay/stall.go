// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"sync"
	"sync/atomic"
	"time"
)

// stallCheck is how often it is looked for a Write that blocks, so one is noticed when it has blocked for once to twice as
// long. Then the side that is not being read meanwhile is asked whether it still lives, and again each time.
const stallCheck = 2 * time.Second

// stall is the timer of one session. It runs while there are writes, and costs each of them a look at armed.
type stall struct {
	armed atomic.Bool

	mu    sync.Mutex
	timer *time.Timer
	over  bool // the connections may belong to nobody by now
	check func() (idle bool)
}

// arm makes the timer run.
func (s *stall) arm() {
	if s.armed.Load() {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over || s.armed.Swap(true) {
		return
	}
	if s.timer == nil {
		s.timer = time.AfterFunc(stallCheck, s.fire)
	} else {
		s.timer.Reset(stallCheck)
	}
}

// fire calls check, and lets the timer rest when nothing was written since the last time.
func (s *stall) fire() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over {
		return
	}
	s.armed.Store(false) // before check: a Write that it does not see arms the timer again
	if !s.check() && !s.armed.Swap(true) {
		s.timer.Reset(stallCheck)
	}
}

// stop returns when no check runs and none will.
func (s *stall) stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.over = true
	if s.timer != nil {
		s.timer.Stop()
	}
}
