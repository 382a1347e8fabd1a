// SPDX-License-Identifier: Apache-2.0

// Package route knows which edge node an address belongs to.
//
// A [Claim] is what a node says its addresses are: its certificate in standalone use, its Node object in Kubernetes. Claims are
// not believed; [Build] holds them against the [Rules] of this host and makes a [Table] of targets and of refusals. The
// same claims and rules make the same table on every server and in every order of arrival. A table never changes, so it may be
// read from any goroutine; a [Store] holds the one in force.
//
// [Known] remembers the claims of every node that was ever seen, across restarts and reboots, so that an offline node
// stays a target. It is the only part that touches a file or has a goroutine: [Known.Run], which its caller starts and
// waits for. Nothing needs to be closed.
//
// Addresses are compared unmapped: ::ffff:10.0.0.5 and 10.0.0.5 are one address.
package route

import (
	"cmp"
	"net/netip"
	"slices"
	"sync/atomic"
)

// Claim says which addresses a node has, as far as the node is concerned.
type Claim struct {
	Node  string
	Addrs []netip.Addr
}

// Target is an address whose tunneled ports are intercepted.
type Target struct {
	Addr netip.Addr // unmapped, without zone
	Node string     // its owner; empty if ambiguous, so that nobody can pick one by mistake
	// Ambiguous: more than one node claims the address. It stays a target, so that connects are refused by the kernel
	// instead of going direct to whoever has the address here, but belongs to nobody.
	Ambiguous bool
	Claimants []string // two or more nodes, sorted, if ambiguous; else nil
}

// Table is the outcome of [Build]. It is immutable; slices that it returns belong to it and must not be changed. The zero
// value is an empty table.
type Table struct {
	targets  []Target  // by address
	refusals []Refusal // by node, then address
	counts   [numReasons]int
	nodes    map[string][]netip.Addr // owned, unambiguous targets by node
}

// claimed is one address of one node, while a table is built.
type claimed struct {
	addr netip.Addr
	node int // index into the sorted claims: cheaper to sort by than names
}

// Build applies the rules to the claims. Several claims of one node count as one with all their addresses.
func Build(claims []Claim, rules Rules) *Table {
	claims = slices.Clone(claims)
	slices.SortStableFunc(claims, func(a, b Claim) int { return cmp.Compare(a.Node, b.Node) })

	total := 0
	for _, c := range claims {
		total += len(c.Addrs)
	}
	all := make([]claimed, 0, total)
	t := &Table{nodes: make(map[string][]netip.Addr, len(claims))}
	node, addrs := 0, 0
	for i, c := range claims {
		if c.Node != claims[node].Node {
			node, addrs = i, 0 // the first claim of a name stands for all of them, so that duplicates meet below
		}
		if addrs += len(c.Addrs); addrs == 0 && c.Node != "" && (i+1 == len(claims) || claims[i+1].Node != c.Node) {
			t.refuse(c.Node, netip.Addr{}, NoAddress)
		}
		for _, a := range c.Addrs {
			all = append(all, claimed{a.Unmap(), node})
		}
	}
	slices.SortFunc(all, func(a, b claimed) int {
		return cmp.Or(a.addr.Compare(b.addr), cmp.Compare(a.node, b.node))
	})
	all = slices.Compact(all)

	check := rules.compile()
	t.targets = make([]Target, 0, len(all))
	for len(all) > 0 {
		n := 1
		for n < len(all) && all[n].addr == all[0].addr {
			n++
		}
		t.add(claims, all[:n], check)
		all = all[n:]
	}
	slices.SortFunc(t.refusals, func(a, b Refusal) int {
		return cmp.Or(cmp.Compare(a.Node, b.Node), a.Addr.Compare(b.Addr))
	})
	return t
}

// add enters one address with all of its claimants, which are sorted.
func (t *Table) add(claims []Claim, by []claimed, check checker) {
	addr := by[0].addr
	if claims[by[0].node].Node == "" { // sorts first; a nameless claim makes nothing and nobody else ambiguous
		t.refuse("", addr, Invalid)
		if by = by[1:]; len(by) == 0 {
			return
		}
	}
	if reason := check.reason(addr); reason != 0 {
		for _, c := range by {
			t.refuse(claims[c.node].Node, addr, reason)
		}
		return
	}
	if len(by) == 1 {
		node := claims[by[0].node].Node
		t.targets = append(t.targets, Target{Addr: addr, Node: node})
		t.nodes[node] = append(t.nodes[node], addr)
		return
	}
	names := make([]string, len(by))
	for i, c := range by {
		names[i] = claims[c.node].Node
		t.refuse(names[i], addr, Ambiguous)
	}
	t.targets = append(t.targets, Target{Addr: addr, Ambiguous: true, Claimants: names})
}

func (t *Table) refuse(node string, addr netip.Addr, reason Reason) {
	t.refusals = append(t.refusals, Refusal{Node: node, Addr: addr, Reason: reason})
	t.counts[reason]++
}

// Lookup returns the target with this address. It does not allocate. A caller that dials must look at Ambiguous first.
func (t *Table) Lookup(addr netip.Addr) (Target, bool) {
	addr = addr.Unmap()
	// The sorted list is the index as well: 16 comparisons find one of 65,536, once for each connection.
	i, ok := slices.BinarySearchFunc(t.targets, addr, func(t Target, a netip.Addr) int { return t.Addr.Compare(a) })
	if !ok {
		return Target{}, false
	}
	return t.targets[i], true
}

// Targets returns all targets, ambiguous ones too, sorted by address.
func (t *Table) Targets() []Target { return slices.Clip(t.targets) }

// NodeAddrs returns the targets that belong to the node, sorted; ambiguous addresses belong to nobody.
func (t *Table) NodeAddrs(node string) []netip.Addr { return slices.Clip(t.nodes[node]) }

// Refusals returns what was refused, sorted by node, then address. An ambiguous address is refused once for each claimant.
func (t *Table) Refusals() []Refusal { return slices.Clip(t.refusals) }

// Count returns how many claimed addresses were refused for this reason.
func (t *Table) Count(r Reason) int {
	if r >= numReasons {
		return 0
	}
	return t.counts[r]
}

// Store holds the table in force. The zero value holds an empty one.
type Store struct{ table atomic.Pointer[Table] }

// Load returns the table in force, never nil.
func (s *Store) Load() *Table {
	if t := s.table.Load(); t != nil {
		return t
	}
	return &Table{}
}

// Put makes t the table in force.
func (s *Store) Put(t *Table) { s.table.Store(t) }
