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

// filterBit says which bit of which word of a filter stands for an address: may_be_target() of bpf/filter.h.
func filterBit(addr netip.Addr, words int) (word int, bit uint64) {
	mix := func(x uint64) uint64 { return (x ^ x>>32) * 0x9e3779b97f4a7c15 }
	b := to16(addr)
	hash := mix(mix(mix(binary.LittleEndian.Uint64(b[:8]))^binary.LittleEndian.Uint64(b[8:]))) >> (64 - filterBits(uint32(words)))
	return int(hash / 64), 1 << (hash % 64)
}

// writeFilter makes a filter the one of these targets, and of the canary's destinations, which are no targets. It is computed anew each time,
// because several targets can have one bit, and only words are written that differ from former, what the map holds; nil if that is not
// known, as after an error. Whatever part of it the programs see, a target of both lists has its bit.
func writeFilter(m *ebpf.Map, former []uint64, targets iter.Seq[netip.Addr]) ([]uint64, error) {
	filter := make([]uint64, m.MaxEntries())
	add := func(addr netip.Addr) {
		word, bit := filterBit(addr, len(filter))
		filter[word] |= bit
	}
	for addr := range targets {
		add(addr)
	}
	for _, addr := range canaryAddrs() {
		add(addr)
	}
	var at []uint32
	var words []uint64
	for i, word := range filter {
		if former == nil || former[i] != word {
			at, words = append(at, uint32(i)), append(words, word)
		}
	}
	if len(at) == 0 {
		return filter, nil
	}
	if _, err := m.BatchUpdate(at, words, nil); err != nil {
		return nil, explain("write the filter of targets", err)
	}
	return filter, nil
}
