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
// Those that have not said anything, those that wait for their turn and those whose handshake has begun share the gate in thirds, and the largest
// group loses one. With one group for all, or the silent always first, a flood of one kind could crowd out honest agents in another
// stage; and in a storm of honest ones, work that was begun would be lost. Source addresses play no
// part: behind a load balancer all agents have the same.
type gate struct {
	mu     sync.Mutex
	max    int
	groups [3][]*stranger // silent, waiting, begun
}

const (
	silent = iota
	waiting
	begun
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
	if g.total() >= g.max {
		g.dropOne()
	}
	g.add(c, silent)
}

// move puts c into another group.
func (g *gate) move(c *stranger, group int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if c.index >= 0 {
		g.remove(c)
		g.add(c, group)
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
	if g.total() > 0 {
		g.dropOne()
	}
}

func (g *gate) size() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.total()
}

// total needs mu, as all that follow.
func (g *gate) total() int {
	return len(g.groups[silent]) + len(g.groups[waiting]) + len(g.groups[begun])
}

func (g *gate) dropOne() {
	group := g.groups[silent]
	for _, other := range g.groups[waiting:] {
		if len(other) > len(group) {
			group = other
		}
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
