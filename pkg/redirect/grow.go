// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"errors"
	"maps"
	"slices"

	"github.com/cilium/ebpf"
)

// growFor makes sure that the target maps have room for n targets, and a quarter to spare: an address that does not fit would be a miss,
// and go direct. The kernel cannot resize a map, so larger ones are filled and the programs that read them are swapped; connections
// that are being made meanwhile find their target in the one or the other. Called with the lock held.
func (k *Kernel) growFor(n int) error {
	old := k.maps[kernelMapTargets]
	size := int(old.MaxEntries())
	if n <= size/4*3 {
		return nil
	}
	for n > size/4*3 {
		size *= 2
	}

	spec := k.spec.Copy()
	if err := sizeTargets(spec, nil, uint32(size)); err != nil {
		return err
	}
	replaced := slices.Concat(filterMaps, targetMaps)
	readers := readersOfTargets(spec)
	maps.DeleteFunc(spec.Programs, func(name string, _ *ebpf.ProgramSpec) bool { return !slices.Contains(readers, name) })
	shared := map[string]*ebpf.Map{}
	for name := range mapSet(k.maps).names(spec) {
		if !slices.Contains(replaced, name) {
			shared[name] = k.maps[name]
		}
	}
	loaded, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: shared})
	if err != nil {
		return explain("make a larger target map", err)
	}
	defer loaded.Close() // what is left in it
	list := slices.Collect(maps.Values(k.targets))
	if _, err := writeEach(loaded.Maps[kernelMapTargetNodes], list, Target.node); err != nil {
		return err
	}
	if _, err := writeEach(loaded.Maps[kernelMapTargets], list, Target.state); err != nil {
		return err
	}
	filter, err := writeFilter(loaded.Maps, filter{}, maps.Keys(k.targets))
	if err != nil {
		return err
	}
	if err := k.swap(readers, loaded.Programs); err != nil {
		return err
	}
	for _, name := range readers {
		_ = k.programs[name].Close()
		k.programs[name] = loaded.DetachProgram(name)
	}
	k.log.Info("Replaced the target map by a larger one", "from", old.MaxEntries(), "to", size)
	k.filter = filter
	var all []error
	for _, name := range replaced {
		_ = k.maps[name].Close()
		k.maps[name] = loaded.DetachMap(name)
		if len(k.links) == 0 {
			k.unpinned[name] = true // Attach puts it into force
			continue
		}
		all = append(all, k.pins.replace(k.maps[name], k.pins.mapPin(name)))
	}
	return errors.Join(all...)
}

// swap gives attached links new programs, all or none.
func (k *Kernel) swap(names []string, programs map[string]*ebpf.Program) error {
	if len(k.links) == 0 {
		return nil
	}
	for i, name := range names {
		if err := k.links[name].Update(programs[name]); err != nil {
			err = explain("swap the program of "+name, err)
			for _, done := range names[:i] {
				err = errors.Join(err, k.links[done].Update(k.programs[done]))
			}
			return err
		}
	}
	return nil
}

// readersOfTargets are the programs that use the target map.
func readersOfTargets(spec *ebpf.CollectionSpec) []string {
	var names []string
	for name, program := range spec.Programs {
		for _, ins := range program.Instructions {
			if ins.IsLoadFromMap() && ins.Reference() == kernelMapTargets {
				names = append(names, name)
				break
			}
		}
	}
	slices.Sort(names)
	return names
}
