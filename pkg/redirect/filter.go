// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"encoding/binary"
	"iter"
	"math/bits"
	"net/netip"

	"github.com/cilium/ebpf"
)

// sizeFilter makes the filter fit the target map: a power of two, and eight bits at least for each target that there is room for.
func sizeFilter(spec *ebpf.CollectionSpec) error {
	words := uint32(1) << bits.Len32((spec.Maps[kernelMapTargets].MaxEntries-1)/8)
	spec.Maps[kernelMapTargetFilter].MaxEntries = words
	if err := spec.Variables[kernelVarFilterBits].Set(uint8(filterBits(words))); err != nil {
		return fail("set "+kernelVarFilterBits, err, "")
	}
	return nil
}

func filterBits(words uint32) int { return bits.TrailingZeros32(words) + 6 }

// filterMaps are what may_be_target() of bpf/filter.h looks at: the networks of targets, then the targets.
var filterMaps = []string{kernelMapTargetNetworks, kernelMapTargetFilter}

// filter is what the filterMaps hold.
type filter [2][]uint64

// place is a bit of a map.
type place struct {
	word int
	bit  uint64
}

// places are the bits that stand for an address, one in each map.
func (f filter) places(addr netip.Addr) (in [2]place) {
	mix := func(x uint64) uint64 { return (x ^ x>>32) * 0x9e3779b97f4a7c15 }
	b := to16(addr)
	for i := len(f) - 1; i >= 0; i-- {
		hash := mix(mix(mix(binary.LittleEndian.Uint64(b[:8]))^binary.LittleEndian.Uint64(b[8:]))) >> (64 - filterBits(uint32(len(f[i]))))
		in[i] = place{int(hash / 64), 1 << (hash % 64)}
		b[15] = 0 // the rest is the network
	}
	return in
}

// writeFilter makes the filter the one of these targets, and of the canary's destinations, which are no targets. It is computed anew each time,
// because several targets can have one bit, and only words are written that differ from former, what the maps hold; empty if that is not
// known, as after an error. Whatever part of it the programs see, a target of both lists has its bits.
func writeFilter(maps map[string]*ebpf.Map, former filter, targets iter.Seq[netip.Addr]) (filter, error) {
	var f filter
	for i, name := range filterMaps {
		f[i] = make([]uint64, maps[name].MaxEntries())
	}
	add := func(addr netip.Addr) {
		for i, at := range f.places(addr) {
			f[i][at.word] |= at.bit
		}
	}
	for addr := range targets {
		add(addr)
	}
	for _, addr := range canaryAddrs() {
		add(addr)
	}
	for i, name := range filterMaps {
		var at []uint32
		var words []uint64
		for j, word := range f[i] {
			if former[i] == nil || former[i][j] != word {
				at, words = append(at, uint32(j)), append(words, word)
			}
		}
		if len(at) == 0 {
			continue
		}
		if _, err := maps[name].BatchUpdate(at, words, nil); err != nil {
			return filter{}, explain("write the filter of targets", err)
		}
	}
	return f, nil
}
