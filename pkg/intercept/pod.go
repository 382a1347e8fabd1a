// SPDX-License-Identifier: Apache-2.0

package intercept

import "sync"

// pods counts the open connections of each cgroup outside the host's network namespace: a container's, say. What all share, one of them must
// not be able to use up: it has a part of all connections, and half of those to one node. By cgroup, because whoever may make network
// namespaces would have a share in each.
type pods struct {
	limit, nodeLimit int

	mu   sync.Mutex
	open map[share]int // those that are not 0
}

// share is what one cgroup has open to a node; to all nodes if that has no name.
type share struct {
	cgroup uint64
	node   string
}

func newPods(limit, perNode int) *pods {
	return &pods{limit: limit, nodeLimit: max(1, perNode/2), open: make(map[share]int)}
}

// begin counts a connection in, unless the pod has as many as it may.
func (p *pods) begin(o Origin, node string) bool {
	if o.Host {
		return true
	}
	all, one := share{o.Cgroup, ""}, share{o.Cgroup, node}
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
	for _, s := range []share{{o.Cgroup, ""}, {o.Cgroup, node}} {
		if p.open[s]--; p.open[s] == 0 {
			delete(p.open, s)
		}
	}
}
