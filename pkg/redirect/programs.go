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
		list = append(list, HookProgram{Hook: h.name, ID: uint32(p.ID), Name: programName(p.ID), Ours: p.ID == id})
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

// Health reports hooks on which the programs are not in force any more, although Attach put them there: the cgroup was removed, or
// somebody detached the link. Attach repairs it.
func (k *Kernel) Health() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	var all []error
	for _, h := range hooks() {
		l := k.links[h.name]
		if l == nil {
			all = append(all, fmt.Errorf("%s is not attached", h.name))
			continue
		}
		if err := alive(l); err != nil {
			all = append(all, fmt.Errorf("%s: %w", h.name, err))
		}
	}
	return errors.Join(all...)
}

var errDetached = errors.New("the link was detached, or its cgroup removed")

// alive asks the link itself: one on a cgroup that is gone answers, too, but knows no cgroup.
func alive(l link.Link) error {
	info, err := l.Info()
	if err != nil {
		return err
	}
	if info.Cgroup() == nil || info.Cgroup().CgroupId == 0 {
		return errDetached
	}
	return nil
}
