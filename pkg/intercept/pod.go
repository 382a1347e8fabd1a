// SPDX-License-Identifier: Apache-2.0

package intercept

import "sync"

// pods counts the open connections of each network namespace but the host's. What all share, one pod must not be able to use up: it
// has a part of all connections, and half of those to one node.
type pods struct {
	limit, nodeLimit int

	mu   sync.Mutex
	open map[share]int // those that are not 0
}

// share is what one pod has open to a node; to all nodes if that has no name.
type share struct {
	netns uint64
	node  string
}

func newPods(limit, perNode int) *pods {
	return &pods{limit: limit, nodeLimit: max(1, perNode/2), open: make(map[share]int)}
}

// begin counts a connection in, unless the pod has as many as it may.
func (p *pods) begin(o Origin, node string) bool {
	if o.Host {
		return true
	}
	all, one := share{o.Netns, ""}, share{o.Netns, node}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.open[all] >= p.limit || p.open[one] >= p.nodeLimit {
		return false
	}
	p.open[all]++
	p.open[one]++
	return true
}

// end undoes a begin that returned true.
func (p *pods) end(o Origin, node string) {
	if o.Host {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range []share{{o.Netns, ""}, {o.Netns, node}} {
		if p.open[s]--; p.open[s] == 0 {
			delete(p.open, s)
		}
	}
}
