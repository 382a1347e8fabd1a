// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"
)

// pause is exponential backoff with full jitter: the n-th pause is anything from nothing to first*growth^n, at most limit. Full
// jitter spreads 10,000 agents that lost the same server better than any other kind.
type pause struct {
	first, limit time.Duration
	growth       time.Duration // 0: twofold
	ceiling      time.Duration
}

func (p *pause) next() time.Duration {
	p.ceiling = min(max(max(p.growth, 2)*p.ceiling, p.first), p.limit)
	return rand.N(p.ceiling)
}

func (p *pause) reset() { p.ceiling = 0 }

// broadcast wakes everybody who waits at that moment.
type broadcast struct {
	mu sync.Mutex
	ch chan struct{}
}

// next returns a channel that is closed by the next send.
func (b *broadcast) next() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ch == nil {
		b.ch = make(chan struct{})
	}
	return b.ch
}

func (b *broadcast) send() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ch != nil {
		close(b.ch)
		b.ch = nil
	}
}

// rest waits for d, for wake, which may be nil, or for the end of ctx.
func rest(ctx context.Context, d time.Duration, wake <-chan struct{}) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-wake:
	case <-ctx.Done():
	}
}
