// SPDX-License-Identifier: Apache-2.0

package redirect

import (
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

// encode gives a target the form it has in the map.
func (t Target) encode() (kernelTargetKey, kernelTarget, error) {
	key := kernelTargetKey{Addr: to16(t.Addr)}
	value := kernelTarget{State: kernelTargetState(t.State)}
	if err := checkAddr(t.Addr); err != nil {
		return key, value, fmt.Errorf("target of node %q: %w", t.Node, err)
	}
	if t.State != Online && t.State != Offline && t.State != Ambiguous {
		return key, value, fmt.Errorf("target %s: no such state: %s", t.Addr, t.State)
	}
	if len(t.Node) > maxNode {
		return key, value, fmt.Errorf("target %s: node name of %d bytes, at most %d are allowed", t.Addr, len(t.Node), maxNode)
	}
	if err := putString(value.Node[:], t.Node); err != nil {
		return key, value, fmt.Errorf("target %s: node name %w", t.Addr, err)
	}
	return key, value, nil
}

func decodeTarget(key kernelTargetKey, value kernelTarget) Target {
	return Target{Addr: from16(key.Addr), Node: getString(value.Node[:]), State: State(value.State)}
}

// SetTargets makes the list the whole set of targets; only differences are written. A list with anything invalid in it, with an address
// twice or too long is refused as a whole, and the present one stays in force.
func (k *Kernel) SetTargets(list []Target) error {
	want := make(map[netip.Addr]Target, len(list))
	var invalid []error
	for _, t := range list {
		if _, _, err := t.encode(); err != nil {
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
		if _, _, err := t.encode(); err != nil {
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

// putTargets writes into the map and then into the copy. Called with the lock held and valid targets.
func (k *Kernel) putTargets(list []Target) error {
	done, err := writeTargets(k.maps[kernelMapTargets], list)
	for _, t := range list[:done] {
		k.targets[t.Addr] = t
	}
	return err
}

// writeTargets writes valid targets into a map and says how many of them it has written.
func writeTargets(m *ebpf.Map, list []Target) (int, error) {
	written := 0
	for some := range slices.Chunk(list, batch) {
		keys := make([]kernelTargetKey, len(some))
		values := make([]kernelTarget, len(some))
		for i, t := range some {
			keys[i], values[i], _ = t.encode()
		}
		n, err := m.BatchUpdate(keys, values, nil)
		written += min(n, len(some))
		if err != nil {
			return written, explain("write the target map", err)
		}
	}
	return written, nil
}

// deleteTargets removes addresses from the map and then from the copy. Called with the lock held.
func (k *Kernel) deleteTargets(addrs []netip.Addr) error {
	for _, addr := range addrs {
		err := k.maps[kernelMapTargets].Delete(kernelTargetKey{Addr: to16(addr)})
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return explain("remove from the target map", err)
		}
		delete(k.targets, addr)
	}
	return nil
}

// readContents fills the copies from the maps.
func (k *Kernel) readContents() error {
	targets, err := readTargets(k.maps[kernelMapTargets])
	if err != nil {
		return err
	}
	k.targets = make(map[netip.Addr]Target, len(targets))
	for _, t := range targets {
		k.targets[t.Addr] = t
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

func readTargets(m *ebpf.Map) ([]Target, error) {
	var list []Target
	var key kernelTargetKey
	var value kernelTarget
	entries := m.Iterate()
	for entries.Next(&key, &value) {
		list = append(list, decodeTarget(key, value))
	}
	if err := entries.Err(); err != nil {
		return nil, explain("read the target map", err)
	}
	return sortTargets(list), nil
}
