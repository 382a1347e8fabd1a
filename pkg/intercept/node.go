// SPDX-License-Identifier: Apache-2.0

package intercept

import "sync"

// NodeStats are the totals of one edge node.
type NodeStats struct {
	Open           int    // connections now, those still being opened included
	Ended          uint64 // connections that ended, however they did
	Sent, Received uint64 // bytes of the ended ones: client to edge service, and back
}

// nodes counts connections by node. It holds the nodes that Lookup has named until they are forgotten.
type nodes struct {
	limit int

	mu      sync.Mutex
	byName  map[string]*NodeStats
	forgets map[string]bool // forgotten while connections were open
}

func newNodes(limit int) *nodes {
	return &nodes{limit: limit, byName: make(map[string]*NodeStats), forgets: make(map[string]bool)}
}

// begin counts a connection in, unless the node has as many as it may.
func (n *nodes) begin(name string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	stats := n.byName[name]
	if stats == nil {
		stats = &NodeStats{}
		n.byName[name] = stats
	}
	delete(n.forgets, name)
	if stats.Open >= n.limit {
		return false
	}
	stats.Open++
	return true
}

func (n *nodes) end(name string, sent, received int64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	stats := n.byName[name]
	stats.Open--
	stats.Ended++
	stats.Sent += uint64(sent)
	stats.Received += uint64(received)
	if stats.Open == 0 && n.forgets[name] {
		n.drop(name)
	}
}

func (n *nodes) forget(name string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	stats := n.byName[name]
	switch {
	case stats == nil:
	case stats.Open == 0:
		n.drop(name)
	default:
		n.forgets[name] = true
	}
}

func (n *nodes) drop(name string) {
	delete(n.byName, name)
	delete(n.forgets, name)
}

func (n *nodes) stats() map[string]NodeStats {
	n.mu.Lock()
	defer n.mu.Unlock()
	all := make(map[string]NodeStats, len(n.byName))
	for name, stats := range n.byName {
		all[name] = *stats
	}
	return all
}
