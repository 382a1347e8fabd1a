// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"
)

// load brings maps and programs into the kernel. A pinned map is reused if its shape and layout are those that the programs
// expect. Otherwise a new one takes over its contents where the bytes still mean the same.
func (k *Kernel) load() error {
	// First, because without them the kernel refuses the library's probes, too, and the error would speak of missing features.
	if len(missingCapabilities()) > 0 {
		return explain("load the programs", unix.EPERM)
	}
	// Before 5.11 maps count against the limit on locked memory; later kernels need nothing here.
	if err := rlimit.RemoveMemlock(); err != nil {
		return explain("raise the limit on locked memory", err)
	}
	spec, err := loadKernel()
	if err != nil {
		return fail("read the embedded programs", err, "")
	}
	k.spec = spec
	if err := k.setFeatures(); err != nil {
		return err
	}
	if err := sizeLRU(spec); err != nil {
		return err
	}

	pinned, err := k.openPinned()
	defer func() { closeAll(pinned) }()
	if err != nil {
		return err
	}
	if err := sizeTargets(spec, pinned, uint32(k.opts.Capacity)); err != nil {
		return err
	}
	sameLayout, err := k.sameLayout(pinned)
	if err != nil {
		return err
	}
	reused := map[string]*ebpf.Map{}
	for name, m := range pinned {
		want := spec.Maps[name]
		switch err := want.Compatible(m); {
		case !sameLayout:
			k.log.Warn("Replacing a pinned map of another layout, its contents are lost", "map", name)
		case err != nil:
			k.log.Warn("Replacing a pinned map that is not compatible", "map", name, "difference", err)
		default:
			reused[name] = m
		}
	}
	if reused[kernelMapTargets] == nil {
		for _, name := range filterMaps {
			delete(reused, name) // until Attach the former programs look for their targets behind it
		}
	}
	loaded, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: reused})
	if err != nil {
		return explain("load the programs", err)
	}
	k.maps, k.programs = loaded.Maps, loaded.Programs
	k.sockets, k.counters = k.maps[kernelMapSockets], k.maps[kernelMapCounters]
	for name := range pinned.names(spec) {
		if reused[name] != nil {
			continue
		}
		k.unpinned[name] = true
		if old := pinned[name]; old != nil && sameLayout && !slices.Contains(filterMaps, name) {
			if err := carryOver(old, k.maps[name]); err != nil {
				return fail("carry over the contents of "+name, err, "")
			}
		}
	}
	if old := pinned[kernelMapTargets]; old != nil && sameLayout {
		if err := splitTargets(old, k.maps[kernelMapTargets], k.maps[kernelMapTargetNodes]); err != nil {
			return fail("carry over the targets of an older version", err, "")
		}
	}
	if k.unpinned[kernelMapSockets] && pinned[kernelMapSockets] != nil {
		k.formerMap = pinned[kernelMapSockets]
		k.former.Store(k.formerMap)
		delete(pinned, kernelMapSockets)
	}
	return nil
}

// targetMaps have the same keys, and the same size.
var targetMaps = []string{kernelMapTargets, kernelMapTargetNodes}

// sizeTargets makes both as large as the larger of those that are there, and the filter accordingly.
func sizeTargets(spec *ebpf.CollectionSpec, pinned mapSet, size uint32) error {
	for _, name := range targetMaps {
		if m := pinned[name]; m != nil {
			size = max(size, m.MaxEntries())
		}
	}
	for _, name := range targetMaps {
		spec.Maps[name].MaxEntries = size
	}
	return sizeFilter(spec)
}

// sizeLRU makes room in the maps that evict: before 6.16 each CPU takes 128 free entries for itself, and where nothing is left for a CPU it
// evicts what another has just put in.
func sizeLRU(spec *ebpf.CollectionSpec) error {
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return explain("count the CPUs", err)
	}
	for _, m := range spec.Maps {
		if m.Type == ebpf.LRUHash {
			m.MaxEntries = max(m.MaxEntries, 512*uint32(cpus))
		}
	}
	return nil
}

// mapSet is some of the maps by name.
type mapSet map[string]*ebpf.Map

// names are those that get pinned: all but the constants of the programs.
func (mapSet) names(spec *ebpf.CollectionSpec) map[string]struct{} {
	names := map[string]struct{}{}
	for name := range spec.Maps {
		if name[0] != '.' {
			names[name] = struct{}{}
		}
	}
	return names
}

func closeAll(maps mapSet) {
	for _, m := range maps {
		_ = m.Close()
	}
}

// openPinned opens the pinned maps that are there. What it returns is to be closed, also with an error.
func (k *Kernel) openPinned() (mapSet, error) {
	pinned := mapSet{}
	for name := range pinned.names(k.spec) {
		m, err := ebpf.LoadPinnedMap(k.pins.mapPin(name), nil)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return pinned, fail("open the pinned map "+name, err, hintOr(err, "tunnelctl cleanup removes what is pinned"))
		}
		pinned[name] = m
	}
	return pinned, nil
}

func hintOr(err error, otherwise string) string {
	if hint := hintFor(err); hint != "" {
		return hint
	}
	return otherwise
}

// sameLayout tells whether the bytes in the pinned maps mean what this program takes them for.
func (k *Kernel) sameLayout(pinned mapSet) (bool, error) {
	m := pinned[kernelMapConfig]
	if m == nil || m.ValueSize() != k.spec.Maps[kernelMapConfig].ValueSize {
		return m == nil && len(pinned) == 0, nil
	}
	var cfg kernelConfig
	if err := m.Lookup(uint32(0), &cfg); err != nil {
		return false, explain("read the pinned config", err)
	}
	layout, err := k.layout()
	return cfg.Layout == layout, err
}

// layout is LAYOUT of bpf/types.h.
func (k *Kernel) layout() (layout uint16, err error) {
	if err := k.spec.Variables[kernelVarLayout].Get(&layout); err != nil {
		return 0, fail("read the layout of the embedded programs", err, "")
	}
	return layout, nil
}

// carryOver copies what a map of the old shape holds. Socket records, hand-overs and counters stay behind: the first two cannot
// be listed or are gone in microseconds, and counters may start anew.
func carryOver(from, to *ebpf.Map) error {
	switch from.Type() {
	case ebpf.Hash, ebpf.Array:
	default:
		return nil
	}
	if from.KeySize() != to.KeySize() || from.ValueSize() != to.ValueSize() {
		return nil
	}
	var key, value []byte
	entries := from.Iterate()
	for entries.Next(&key, &value) {
		if err := to.Put(key, value); err != nil {
			return err
		}
	}
	return entries.Err()
}

// setFeatures sets the programs' constants to what this kernel can do.
func (k *Kernel) setFeatures() error {
	for _, feature := range []struct {
		variable string
		program  ebpf.ProgramType
		helper   asm.BuiltinFunc
		off      bool
	}{
		{kernelVarHaveSetRetval, ebpf.CGroupSockAddr, asm.FnSetRetval, k.opts.noSetRetval},
		{kernelVarHaveSockOpsNetns, ebpf.SockOps, asm.FnGetNetnsCookie, k.opts.noNetnsCookie},
	} {
		have := uint8(0)
		err := features.HaveProgramHelper(feature.program, feature.helper)
		switch {
		case err == nil && !feature.off:
			have = 1
		case err != nil && !errors.Is(err, ebpf.ErrNotSupported):
			return explain(fmt.Sprintf("ask the kernel for %s", feature.variable), err)
		}
		if err := k.spec.Variables[feature.variable].Set(have); err != nil {
			return fail("set "+feature.variable, err, "")
		}
	}
	return nil
}
