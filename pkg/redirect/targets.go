// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"
)

// State is what the kernel does with connections to a target.
type State uint32

const (
	// Online targets are redirected.
	Online State = State(kernelTargetStateTARGET_ONLINE)
	// Offline targets have no tunnel: EHOSTUNREACH.
	Offline State = State(kernelTargetStateTARGET_OFFLINE)
	// Ambiguous targets are claimed by two nodes: EHOSTUNREACH.
	Ambiguous State = State(kernelTargetStateTARGET_AMBIGUOUS)
)

func (s State) String() string {
	switch s {
	case Online:
		return "online"
	case Offline:
		return "offline"
	case Ambiguous:
		return "ambiguous"
	}
	return fmt.Sprintf("state(%d)", uint32(s))
}

// A Target is an edge address whose tunneled ports are intercepted.
type Target struct {
	Addr  netip.Addr // unmapped, without zone
	Node  string     // at most 253 bytes; for whoever reads the map
	State State
}

// TooManyTargetsError says that a list of targets was not taken because it is longer than Options.MaxTargets.
type TooManyTargetsError struct{ Targets, Max int }

func (e *TooManyTargetsError) Error() string {
	return fmt.Sprintf("%d targets are more than the limit of %d", e.Targets, e.Max)
}

// Reason is the label for metrics and records.
func (*TooManyTargetsError) Reason() string { return "too_many_targets" }

// batch is how many entries go into one system call.
const batch = 1024

// check says what is wrong with a target.
func (t Target) check() error {
	if err := checkAddr(t.Addr); err != nil {
		return fmt.Errorf("target of node %q: %w", t.Node, err)
	}
	if t.State != Online && t.State != Offline && t.State != Ambiguous {
		return fmt.Errorf("target %s: no such state: %s", t.Addr, t.State)
	}
	if len(t.Node) > maxNode {
		return fmt.Errorf("target %s: node name of %d bytes, at most %d are allowed", t.Addr, len(t.Node), maxNode)
	}
	if err := putString(make([]int8, maxNode+1), t.Node); err != nil {
		return fmt.Errorf("target %s: node name %w", t.Addr, err)
	}
	return nil
}

// The forms that a valid target has in the maps: state and name stand in one each, under the same key.
func (t Target) key() kernelTargetKey { return kernelTargetKey{Addr: to16(t.Addr)} }
func (t Target) state() kernelTarget  { return kernelTarget{State: kernelTargetState(t.State)} }

func (t Target) node() (n kernelTargetNode) {
	_ = putString(n.Node[:], t.Node)
	return n
}

func decodeTarget(key kernelTargetKey, state kernelTarget, node kernelTargetNode) Target {
	return Target{Addr: from16(key.Addr), Node: getString(node.Node[:]), State: State(state.State)}
}

// SetTargets makes the list the whole set of targets; only differences are written. A list with anything invalid in it, with an address
// twice or too long is refused as a whole, and the present one stays in force.
func (k *Kernel) SetTargets(list []Target) error {
	want := make(map[netip.Addr]Target, len(list))
	var invalid []error
	for _, t := range list {
		if err := t.check(); err != nil {
			invalid = append(invalid, err)
		}
		if _, twice := want[t.Addr]; twice {
			invalid = append(invalid, fmt.Errorf("target %s is listed twice", t.Addr))
		}
		want[t.Addr] = t
	}
	if err := errors.Join(invalid...); err != nil {
		return err
	}
	if len(want) > k.opts.MaxTargets {
		return &TooManyTargetsError{len(want), k.opts.MaxTargets}
	}

	k.mu.Lock()
	defer k.mu.Unlock()
	var gone []netip.Addr
	for addr := range k.targets {
		if _, keep := want[addr]; !keep {
			gone = append(gone, addr)
		}
	}
	var changed []Target
	for addr, t := range want {
		if k.targets[addr] != t {
			changed = append(changed, t)
		}
	}
	// Removals first: the map then never holds more than the larger of the two lists.
	if err := k.deleteTargets(gone); err != nil {
		return err
	}
	if err := k.growFor(len(want)); err != nil {
		return err
	}
	// Before the targets themselves. Those that are gone are out of their map already.
	var err error
	if k.filter, err = writeFilter(k.maps, k.filter, maps.Keys(want)); err != nil {
		return err
	}
	return k.putTargets(changed)
}

// SetState changes the state of the targets with these addresses. Addresses that are no targets (any more) are left alone, and so are
// ambiguous ones: which of two claims is right is not for a tunnel to decide.
func (k *Kernel) SetState(addrs []netip.Addr, state State) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	var changed []Target
	for _, addr := range addrs {
		t, known := k.targets[addr]
		if !known || t.State == state || t.State == Ambiguous {
			continue
		}
		t.State = state
		if err := t.check(); err != nil {
			return err
		}
		changed = append(changed, t)
	}
	return k.putTargets(changed)
}

// Targets returns what is in force, sorted by address; right after Open that is what the predecessor left.
func (k *Kernel) Targets() []Target {
	k.mu.Lock()
	defer k.mu.Unlock()
	return sortTargets(slices.Collect(maps.Values(k.targets)))
}

func sortTargets(list []Target) []Target {
	slices.SortFunc(list, func(a, b Target) int { return a.Addr.Compare(b.Addr) })
	return list
}

// putTargets writes into the maps and then into the copy. Called with the lock held and valid targets.
//
// If the daemon dies halfway, its successor finds old and new side by side. So a target has a name before it has a state; and one that several
// nodes claim is ambiguous before its name says so, and until its name says so no longer: a node is never called by a list of names.
func (k *Kernel) putTargets(list []Target) error {
	var disputed, renamed, rest []Target
	for _, t := range list {
		old, known := k.targets[t.Addr]
		if known && t.State == Ambiguous {
			disputed = append(disputed, t)
		} else {
			rest = append(rest, t)
		}
		if !known || old.Node != t.Node {
			renamed = append(renamed, t)
		}
	}
	done, err := writeEach(k.maps[kernelMapTargets], disputed, Target.state)
	for _, t := range disputed[:done] {
		t.Node = k.targets[t.Addr].Node
		k.targets[t.Addr] = t
	}
	if err != nil {
		return err
	}
	done, err = writeEach(k.maps[kernelMapTargetNodes], renamed, Target.node)
	for _, t := range renamed[:done] {
		if old, known := k.targets[t.Addr]; known {
			old.Node = t.Node
			k.targets[t.Addr] = old
		}
	}
	if err != nil {
		return err
	}
	done, err = writeEach(k.maps[kernelMapTargets], rest, Target.state)
	for _, t := range rest[:done] {
		k.targets[t.Addr] = t
	}
	return err
}

// writeEach writes what value says of each target into a map, and says how many it has written.
func writeEach[V any](m *ebpf.Map, list []Target, value func(Target) V) (int, error) {
	written := 0
	for some := range slices.Chunk(list, batch) {
		keys := make([]kernelTargetKey, len(some))
		values := make([]V, len(some))
		for i, t := range some {
			keys[i], values[i] = t.key(), value(t)
		}
		n, err := m.BatchUpdate(keys, values, nil)
		written += min(n, len(some))
		if err != nil {
			return written, explain("write the target maps", err)
		}
	}
	return written, nil
}

// deleteTargets removes addresses from the maps and from the copy. Called with the lock held.
func (k *Kernel) deleteTargets(addrs []netip.Addr) error {
	for _, addr := range addrs {
		for _, name := range targetMaps {
			err := k.maps[name].Delete(Target{Addr: addr}.key())
			if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				return explain("remove from the target maps", err)
			}
		}
		delete(k.targets, addr)
	}
	return nil
}

// readContents fills the copies from the maps.
func (k *Kernel) readContents() error {
	targets, err := readTargets(k.maps[kernelMapTargets], k.maps[kernelMapTargetNodes])
	if err != nil {
		return err
	}
	k.targets = make(map[netip.Addr]Target, len(targets))
	for _, t := range targets {
		k.targets[t.Addr] = t
	}
	if err := k.dropNames(); err != nil {
		return err
	}
	if k.filter, err = writeFilter(k.maps, filter{}, maps.Keys(k.targets)); err != nil {
		return err
	}
	ports, err := readPorts(k.maps[kernelMapPorts])
	if err != nil {
		return err
	}
	k.ports = make(map[uint16]struct{}, len(ports))
	for _, port := range ports {
		k.ports[port] = struct{}{}
	}
	k.optOuts = map[uint64]struct{}{}
	var key kernelCgroupKey
	var value kernelCgroupValue
	entries := k.maps[kernelMapOptOuts].Iterate()
	for entries.Next(&key, &value) {
		k.optOuts[key.Cgroup] = struct{}{}
	}
	if err := entries.Err(); err != nil {
		return explain("read the opted-out cgroups", err)
	}
	if err := k.maps[kernelMapConfig].Lookup(uint32(0), &k.config); err != nil {
		return explain("read the config map", err)
	}
	return nil
}

// readTargets also works while a daemon writes: a state has a name, or was removed meanwhile.
func readTargets(states, nodes *ebpf.Map) ([]Target, error) {
	var list []Target
	var key kernelTargetKey
	var state kernelTarget
	entries := states.Iterate()
	for entries.Next(&key, &state) {
		var node kernelTargetNode
		err := nodes.Lookup(key, &node)
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			err = states.Lookup(key, &state)
			if errors.Is(err, ebpf.ErrKeyNotExist) {
				continue
			}
		}
		if err != nil {
			return nil, explain("read the target maps", err)
		}
		list = append(list, decodeTarget(key, state, node))
	}
	if err := entries.Err(); err != nil {
		return nil, explain("read the target maps", err)
	}
	return sortTargets(list), nil
}

// dropNames removes names without a state: what a predecessor left that died between the two.
func (k *Kernel) dropNames() error {
	m := k.maps[kernelMapTargetNodes]
	var left []kernelTargetKey
	var key kernelTargetKey
	var node kernelTargetNode
	entries := m.Iterate()
	for entries.Next(&key, &node) {
		if _, known := k.targets[from16(key.Addr)]; !known {
			left = append(left, key)
		}
	}
	err := entries.Err()
	for _, key := range left {
		err = errors.Join(err, m.Delete(key))
	}
	if err != nil {
		return explain("tidy the map of names", err)
	}
	return nil
}

// oldTarget is what the target map held when it also had the names.
type oldTarget struct {
	State kernelTarget
	Node  kernelTargetNode
}

// splitTargets copies what a target map of that time holds into the two maps of today. Of another map it copies nothing.
func splitTargets(from, states, nodes *ebpf.Map) error {
	if int(from.KeySize()) != binary.Size(kernelTargetKey{}) || int(from.ValueSize()) != binary.Size(oldTarget{}) {
		return nil
	}
	var key kernelTargetKey
	var old oldTarget
	entries := from.Iterate()
	for entries.Next(&key, &old) {
		if err := errors.Join(nodes.Put(key, old.Node), states.Put(key, old.State)); err != nil {
			return err
		}
	}
	return entries.Err()
}
