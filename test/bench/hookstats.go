// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
)

// hooks are those that pkg/redirect has programs for, by the names that it gives them.
var hooks = map[string]struct {
	program ebpf.ProgramType
	attach  ebpf.AttachType
}{
	"sock_ops":     {ebpf.SockOps, ebpf.AttachCGroupSockOps},
	"connect4":     {ebpf.CGroupSockAddr, ebpf.AttachCGroupInet4Connect},
	"connect6":     {ebpf.CGroupSockAddr, ebpf.AttachCGroupInet6Connect},
	"getpeername4": {ebpf.CGroupSockAddr, ebpf.AttachCgroupInet4GetPeername},
	"getpeername6": {ebpf.CGroupSockAddr, ebpf.AttachCgroupInet6GetPeername},
	"bind4":        {ebpf.CGroupSockAddr, ebpf.AttachCGroupInet4Bind},
	"bind6":        {ebpf.CGroupSockAddr, ebpf.AttachCGroupInet6Bind},
}

// empties are programs that do nothing, attached to every hook. What the kernel says they cost is what its statistics and the call cost.
type empties struct {
	programs map[string]*ebpf.Program
	links    []link.Link
}

func attachEmpties(cgroup string) (_ *empties, err error) {
	dir, err := os.Open(cgroup)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	e := &empties{programs: map[string]*ebpf.Program{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, e.close())
		}
	}()
	for name, h := range hooks {
		program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
			Name: "empty", Type: h.program, AttachType: h.attach, License: "Apache-2.0",
			Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
		})
		if err != nil {
			return nil, fmt.Errorf("load an empty program for %s: %w", name, err)
		}
		e.programs[name] = program
		l, err := link.AttachRawLink(link.RawLinkOptions{Target: int(dir.Fd()), Program: program, Attach: h.attach})
		if err != nil {
			return nil, fmt.Errorf("attach an empty program to %s: %w", name, err)
		}
		e.links = append(e.links, l)
	}
	return e, nil
}

func (e *empties) close() error {
	var errs []error
	for _, l := range e.links {
		errs = append(errs, l.Detach(), l.Close())
	}
	for _, p := range e.programs {
		errs = append(errs, p.Close())
	}
	return errors.Join(errs...)
}

// pair is the program of ours and the empty one at a hook.
type pair struct{ ours, empty *ebpf.Program }

// programs finds what is attached. The caller closes ours.
func (p *probe) programs(empty *empties) (map[string]pair, error) {
	list, err := p.kernel.Programs()
	if err != nil {
		return nil, err
	}
	pairs := map[string]pair{}
	for _, attached := range list {
		if !attached.Ours {
			continue
		}
		ours, err := ebpf.NewProgramFromID(ebpf.ProgramID(attached.ID))
		if err != nil {
			closePrograms(pairs)
			return nil, err
		}
		pairs[attached.Hook] = pair{ours, empty.programs[attached.Hook]}
	}
	return pairs, nil
}

func closePrograms(pairs map[string]pair) {
	for _, p := range pairs {
		p.ours.Close()
	}
}

// runs are how often a program ran, and for how long.
type runs struct {
	count uint64
	took  time.Duration
}

type bothRuns struct{ ours, empty runs }

func readRuns(programs map[string]pair) (map[string]bothRuns, error) {
	all := map[string]bothRuns{}
	for name, p := range programs {
		ours, err1 := p.ours.Stats()
		empty, err2 := p.empty.Stats()
		if err := errors.Join(err1, err2); err != nil {
			return nil, fmt.Errorf("read the statistics of %s: %w", name, err)
		}
		all[name] = bothRuns{runs{ours.RunCount, ours.Runtime}, runs{empty.RunCount, empty.Runtime}}
	}
	return all, nil
}

// since is nanoseconds a run, and runs, between two readings.
func (r runs) since(begin runs) (nanos float64, count uint64) {
	count = r.count - begin.count
	return float64(r.took-begin.took) / float64(count), count
}

// costs collects the rounds of a row.
type costs struct {
	ours, empty, net []float64
	calls            uint64
}

func (c *costs) add(begin, end map[string]bothRuns, name string) error {
	ours, calls := end[name].ours.since(begin[name].ours)
	empty, emptyCalls := end[name].empty.since(begin[name].empty)
	if calls == 0 || emptyCalls == 0 {
		return fmt.Errorf("%s did not run", name)
	}
	c.calls += calls
	c.ours = append(c.ours, ours)
	c.empty = append(c.empty, empty)
	c.net = append(c.net, ours-empty)
	return nil
}
