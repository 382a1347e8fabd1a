// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/tunnel"
)

const (
	askEvery   = time.Second           // peers are asked for the nodes that have no tunnel here, and answers are believed that long
	askPause   = 20 * time.Millisecond // between two rounds: what comes up meanwhile is one question
	askTimeout = time.Second
	maxAsk     = 16384 // nodes in one round
)

// asker asks other servers; [tunnel.Peers] does.
type asker interface {
	Live() []string
	Ask(ctx context.Context, server string, nodes []string) ([]string, error)
}

// owners knows which server has a tunnel of each node, and calls a node offline only when all live peers have said that they have none.
// Nothing is announced between servers: each asks, in rounds, one at a time. A round asks about a node the server that had its tunnel
// last, or else the one that is said to have it; if that has none, or there is no such server, all of them.
type owners struct {
	peers  asker
	hint   func(node string) string       // a server that may have a tunnel, or ""; nil: nobody knows
	known  func() []string                // nodes
	online func(node string, online bool) // is told what is in force; calls are in order

	wake chan struct{}

	mu      sync.Mutex // guards what follows
	nodes   map[string]*owned
	waiting []chan struct{} // closed at the end of the next round that begins
	rounds  uint64
}

type owned struct {
	local  bool      // there is a tunnel here
	peer   string    // server that had one when it was asked last
	shown  bool      // what online was told
	urgent bool      // to be asked about now
	asked  time.Time // when the last round about it began
}

func newOwners(peers asker, known func() []string, online func(string, bool)) *owners {
	return &owners{peers: peers, known: known, online: online, wake: make(chan struct{}, 1), nodes: make(map[string]*owned)}
}

// entry needs mu.
func (o *owners) entry(node string) *owned {
	n := o.nodes[node]
	if n == nil {
		n = new(owned)
		o.nodes[node] = n
	}
	return n
}

// show needs mu.
func (o *owners) show(node string, n *owned) {
	if is := n.local || n.peer != ""; is != n.shown {
		n.shown = is
		o.online(node, is)
	}
}

func (o *owners) hurry(n *owned) {
	n.urgent = true
	select {
	case o.wake <- struct{}{}:
	default:
	}
}

// changed notes that a node got a tunnel here, or lost it.
func (o *owners) changed(node string, online bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	n := o.entry(node)
	if n.local = online; online {
		n.peer = ""
		o.show(node, n)
		return
	}
	n.asked = time.Time{} // what was answered before says nothing about where the node went
	o.hurry(n)
}

// disown notes that a server has proven to have no tunnel of a node.
func (o *owners) disown(node, peer string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if n := o.entry(node); n.peer == peer {
		n.peer, n.asked = "", time.Time{}
		o.hurry(n)
	}
}

// find returns a server with a tunnel of the node, or "". If none is on record it waits for the answers of all, unless they were given
// a moment ago. It needs run.
func (o *owners) find(ctx context.Context, node string) string {
	for range 2 {
		o.mu.Lock()
		n := o.entry(node)
		if n.peer != "" || time.Since(n.asked) < askEvery {
			defer o.mu.Unlock()
			return n.peer
		}
		done := make(chan struct{})
		o.waiting = append(o.waiting, done)
		o.hurry(n)
		o.mu.Unlock()
		select {
		case <-done:
		case <-ctx.Done():
			return ""
		}
	}
	return ""
}

// elsewhere counts the nodes that are reached by way of other servers.
func (o *owners) elsewhere() (n int, rounds uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, e := range o.nodes {
		if !e.local && e.peer != "" {
			n++
		}
	}
	return n, o.rounds
}

func (o *owners) run(ctx context.Context) error {
	tick := time.NewTicker(askEvery)
	defer tick.Stop()
	for all := true; ctx.Err() == nil; {
		o.round(ctx, all)
		select {
		case <-ctx.Done():
		case <-time.After(askPause):
		}
		select {
		case <-ctx.Done():
		case <-o.wake:
			all = false
		case <-tick.C:
			all = true
		}
	}
	return nil
}

// round asks about all known nodes without a tunnel here, or only about the urgent ones.
func (o *owners) round(ctx context.Context, all bool) {
	live := o.peers.Live()
	began := time.Now()
	had, done := o.begin(all)
	first := make(map[string]string) // who is asked alone
	questions := make(map[string][]string)
	for node, peer := range had {
		if peer == "" && o.hint != nil {
			peer = o.hint(node)
		}
		if slices.Contains(live, peer) {
			first[node] = peer
			questions[peer] = append(questions[peer], node)
			continue
		}
		for _, p := range live {
			questions[p] = append(questions[p], node)
		}
	}
	found, silent := o.ask(ctx, questions)
	lost := make(map[string][]string)
	for node, peer := range first {
		if found[node] == "" {
			for _, p := range live {
				if p != peer {
					lost[p] = append(lost[p], node)
				}
			}
		}
	}
	again, _ := o.ask(ctx, lost)
	if ctx.Err() != nil {
		return // silence means nothing now
	}

	o.mu.Lock()
	defer o.mu.Unlock()
	for node, peer := range had {
		n := o.nodes[node]
		if n == nil || n.local {
			continue
		}
		n.asked = began
		n.peer = found[node]
		if n.peer == "" {
			n.peer = again[node]
		}
		if n.peer == "" && silent[peer] {
			n.peer = peer // nobody says otherwise; if it is dead, its connection will be
		}
		o.show(node, n)
	}
	for _, d := range done {
		close(d)
	}
}

// begin returns the nodes to ask about, with the servers that had them last, and who waits for the answers.
func (o *owners) begin(all bool) (had map[string]string, done []chan struct{}) {
	known := make(map[string]struct{})
	if all {
		for _, node := range o.known() {
			known[node] = struct{}{}
		}
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.rounds++
	if all {
		for node, n := range o.nodes {
			if _, ok := known[node]; !ok && !n.local && !n.urgent { // forgotten
				n.peer = ""
				o.show(node, n)
				delete(o.nodes, node)
			}
		}
		for node := range known {
			o.entry(node)
		}
	}
	had = make(map[string]string)
	for node, n := range o.nodes { // in random order: with too many, each gets its turn
		switch {
		case n.local:
			n.urgent = false
		case len(had) == maxAsk && n.urgent:
			o.hurry(n)
		case len(had) < maxAsk && (all || n.urgent):
			n.urgent = false
			had[node] = n.peer
		}
	}
	done, o.waiting = o.waiting, nil
	return had, done
}

// ask asks servers in parallel. Of several that have a node, any is found. Silent are those that did not answer in time.
func (o *owners) ask(ctx context.Context, questions map[string][]string) (found map[string]string, silent map[string]bool) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	found, silent = make(map[string]string), make(map[string]bool)
	var (
		wg sync.WaitGroup
		mu sync.Mutex
	)
	for peer, nodes := range questions {
		wg.Go(func() {
			answer, err := o.peers.Ask(ctx, peer, nodes)
			asked := make(map[string]struct{}, len(nodes))
			for _, node := range nodes {
				asked[node] = struct{}{}
			}
			mu.Lock()
			defer mu.Unlock()
			silent[peer] = err != nil && err != tunnel.ErrNoPeer
			for _, node := range answer {
				if _, ok := asked[node]; ok && (found[node] == "" || rand.N(2) == 0) {
					found[node] = peer
				}
			}
		})
	}
	wg.Wait()
	return found, silent
}
