// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"math/rand/v2"
	"sync"
)

// gate bounds the connections that have not proven who they are, without letting them keep out those that can.
//
// A newcomer always gets in; when the gate is full, another stranger is dropped for it, chosen at random. Dropping the
// oldest would be worse: at a rate of max per round trip no honest handshake would ever be completed, while at random one
// in e still is, and agents try again. Refusing the newcomer would be worst: 4,096 idle connections would keep everybody out.
//
// Those that have said something and those that have not share the gate in halves, and the larger group loses one. With
// one group for all, or the silent always first, a flood of one kind could crowd out honest agents in the other
// stage. Source addresses play no part: behind a load balancer all agents have the same.
type gate struct {
	mu     sync.Mutex
	max    int
	groups [2][]*stranger // silent, speaking
}

const (
	silent = iota
	speaking
)

// stranger is a connection in the gate. Its fields need gate.mu.
type stranger struct {
	raw     *raw
	group   int
	index   int // in its group; -1: not in the gate
	dropped bool
}

// enter takes c in and drops another if need be.
func (g *gate) enter(c *stranger) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.groups[silent])+len(g.groups[speaking]) >= g.max {
		g.dropOne()
	}
	g.add(c, silent)
}

// speak moves c to those that have said something.
func (g *gate) speak(c *stranger) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if c.index >= 0 {
		g.remove(c)
		g.add(c, speaking)
	}
}

// leave takes c out: it has failed, or has proven who it is. It reports false if c was dropped.
func (g *gate) leave(c *stranger) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if c.index >= 0 {
		g.remove(c)
	}
	return !c.dropped
}

// relieve drops one stranger because the process has no file descriptors left.
func (g *gate) relieve() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.groups[silent])+len(g.groups[speaking]) > 0 {
		g.dropOne()
	}
}

func (g *gate) size() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.groups[silent]) + len(g.groups[speaking])
}

func (g *gate) dropOne() {
	group := g.groups[silent]
	if len(g.groups[speaking]) > len(group) {
		group = g.groups[speaking]
	}
	c := group[rand.IntN(len(group))]
	g.remove(c)
	c.dropped = true
	c.raw.abort()
}

func (g *gate) add(c *stranger, group int) {
	c.group, c.index = group, len(g.groups[group])
	g.groups[group] = append(g.groups[group], c)
}

func (g *gate) remove(c *stranger) {
	group := g.groups[c.group]
	last := group[len(group)-1]
	group[c.index], last.index = last, c.index
	group[len(group)-1] = nil
	g.groups[c.group] = group[:len(group)-1]
	c.index = -1
}
