// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// HookProgram is one of the programs on a hook. Another agent's (a Service load balancer's, say) may share it.
type HookProgram struct {
	Hook string // "connect4"
	ID   uint32
	Name string // at most 15 bytes; empty if this process may not ask
	Ours bool
	Link uint32 // id, for ours
}

// Programs lists what is attached beside the programs of this process and itself, hook by hook, in the order in which they run.
// Programs on child cgroups run before all of them and are not listed.
func (k *Kernel) Programs() ([]HookProgram, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	group, err := openCgroup(k.opts.CgroupRoot)
	if err != nil {
		return nil, err
	}
	defer func() { _ = group.Close() }()
	var all []HookProgram
	for _, h := range hooks() {
		list, err := k.programsOn(group, h)
		if err != nil {
			return nil, err
		}
		all = append(all, list...)
	}
	return all, nil
}

func (k *Kernel) programsOn(group *cgroup, h hook) ([]HookProgram, error) {
	attached, err := link.QueryPrograms(link.QueryOptions{Target: int(group.Fd()), Attach: h.attach})
	if err != nil {
		return nil, explain("list the programs on "+h.name, err)
	}
	ours, err := k.programs[h.name].Info()
	if err != nil {
		return nil, explain("describe "+h.name, err)
	}
	id, _ := ours.ID()
	var list []HookProgram
	for _, p := range attached.Programs {
		program := HookProgram{Hook: h.name, ID: uint32(p.ID), Name: programName(p.ID), Ours: p.ID == id}
		if l := k.links[h.name]; l != nil && program.Ours {
			if info, err := l.Info(); err == nil {
				program.Link = uint32(info.ID)
			}
		}
		list = append(list, program)
	}
	return list, nil
}

func programName(id ebpf.ProgramID) string {
	p, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return ""
	}
	defer func() { _ = p.Close() }()
	info, err := p.Info()
	if err != nil {
		return ""
	}
	return info.Name
}

// Health reports hooks on which the programs are not in force any more, although Attach put them there: somebody detached a link, or the
// cgroup was removed and perhaps made anew. Attach repairs it; listeners that were opened in a removed cgroup have to be opened
// again after that, by this process in its new one, because the programs for accepted connections run in their listener's cgroup.
func (k *Kernel) Health() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	group, err := openCgroup(k.opts.CgroupRoot)
	if err != nil {
		return err
	}
	defer func() { _ = group.Close() }()
	var all []error
	for _, h := range hooks() {
		l := k.links[h.name]
		if l == nil {
			all = append(all, fmt.Errorf("%s is not attached", h.name))
			continue
		}
		on, err := cgroupOf(l)
		switch {
		case err != nil:
			all = append(all, fmt.Errorf("%s: %w", h.name, err))
		case on == 0:
			all = append(all, fmt.Errorf("%s: the link was detached, or its cgroup removed", h.name))
		case on != group.id:
			all = append(all, fmt.Errorf("%s: the link is on a cgroup that is not %s", h.name, group.Name()))
		}
	}
	return errors.Join(all...)
}

// cgroupOf returns the id of the cgroup that a link is on, 0 if on none any more. A link never becomes invalid by that.
func cgroupOf(l link.Link) (uint64, error) {
	info, err := l.Info()
	if err != nil {
		return 0, err
	}
	if info.Cgroup() == nil {
		return 0, nil
	}
	return info.Cgroup().CgroupId, nil
}
