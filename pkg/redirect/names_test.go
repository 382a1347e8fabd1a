// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"net/netip"
	"os"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
)

// TestTargetsOfOneMap: an older version had state and name in one map. Its successor keeps both.
func TestTargetsOfOneMap(t *testing.T) {
	l := newLab(t)
	k, s := l.ready()
	must(t, k.SetState([]netip.Addr{edge6}, Offline))
	targets := k.Targets()
	s.stop()

	spec := k.spec.Maps[kernelMapTargets].Copy()
	spec.ValueSize, spec.Value = 260, nil
	spec.MaxEntries *= 2
	old, err := ebpf.NewMap(spec)
	must(t, err)
	for _, target := range targets {
		must(t, old.Put(target.key(), oldTarget{target.state(), target.node()}))
	}
	must(t, k.pins.replace(old, k.pins.mapPin(kernelMapTargets)))
	must(t, old.Close())
	must(t, os.Remove(k.pins.mapPin(kernelMapTargetNodes)))
	size := spec.MaxEntries
	must(t, k.Close())
	if _, err := ReadPinned(l.bpffs); err == nil {
		t.Error("ReadPinned read a map without names")
	}

	k = l.open()
	if got := k.Targets(); !slices.Equal(got, targets) {
		t.Errorf("targets: %v, want %v", got, targets)
	}
	for _, name := range targetMaps {
		if n := k.maps[name].MaxEntries(); n != size {
			t.Errorf("map %s has room for %d, want %d", name, n, size)
		}
	}
	l.serve(k)
	must(t, k.Attach())
	if got, err := ask(dialer(), "tcp4", dst4.String()); got != dst4.String() {
		t.Errorf("after Attach: %q (%v)", got, err)
	}
	must(t, k.Close())
	if got := l.open().Targets(); !slices.Equal(got, targets) {
		t.Errorf("targets after a restart: %v, want %v", got, targets)
	}
}

// TestNamesStayInStep: the two maps hold the same addresses, and what a daemon left that died between them does no harm.
func TestNamesStayInStep(t *testing.T) {
	l := newLab(t)
	k, s := l.ready()
	moved := []Target{{edge4, "edge-2", Online}, {edge6, "edge-1,edge-2", Ambiguous}}
	must(t, k.SetTargets(moved))
	if got, err := readTargets(k.maps[kernelMapTargets], k.maps[kernelMapTargetNodes]); err != nil || !slices.Equal(got, moved) {
		t.Errorf("in the maps: %v (%v), want %v", got, err, moved)
	}
	gone := Target{netip.MustParseAddr("10.99.0.77"), "edge-3", Online}
	must(t, k.maps[kernelMapTargetNodes].Put(gone.key(), gone.node()))
	s.stop()
	must(t, k.Close())

	k = l.open()
	if got := k.Targets(); !slices.Equal(got, moved) {
		t.Errorf("after a restart: %v, want %v", got, moved)
	}
	must(t, k.SetTargets(moved[:1]))
	for _, name := range targetMaps {
		var keys []kernelTargetKey
		var key kernelTargetKey
		value := make([]byte, k.maps[name].ValueSize())
		for entries := k.maps[name].Iterate(); entries.Next(&key, &value); {
			keys = append(keys, key)
		}
		if len(keys) != 1 || keys[0] != moved[0].key() {
			t.Errorf("map %s holds %v", name, keys)
		}
	}
}
