// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/edge-tunnel/edge-tunnel/test/netlab"
)

// datapathResult has every sample, so that a reader can judge for himself.
type datapathResult struct {
	Run   circumstances `json:"run"`
	Works []measured    `json:"works"`
}

// measured is one work: a sample of each path and round.
type measured struct {
	Work  work                `json:"work"`
	Paths map[string][]sample `json:"paths"`
}

// values are the main numbers of a path, round by round.
func (m measured) values(path string) []float64 { return each(m.Paths[path], m.Work.value) }

// runDatapath measures in rounds, in each of them every work on every path in turn, beginning with another path each time: what
// slows the machine for a while slows all paths alike.
func runDatapath(ctx context.Context, o options) (_ *datapathResult, err error) {
	t := &stage{progress: o.progress}
	defer t.clear(&err)
	result := &datapathResult{Run: look(ctx, o)}
	s, err := newSite(ctx, t, o.bin, nil)
	if err != nil {
		return nil, err
	}
	result.Works, err = s.rounds(ctx, o, works(o.quick))
	return result, err
}

// rounds does the works as runDatapath says.
func (s *site) rounds(ctx context.Context, o options, works []work) (list []measured, err error) {
	for _, w := range works {
		if o.only.work(w) {
			list = append(list, measured{w, map[string][]sample{}})
		}
	}
	s.paths = slices.DeleteFunc(s.paths, func(p *path) bool { return !o.only.path(p.name) })
	for round := range o.rounds {
		for _, m := range list {
			for i := range s.paths {
				p := s.paths[(round+i)%len(s.paths)]
				got, err := s.sample(ctx, p, m.Work)
				if err != nil {
					return nil, fmt.Errorf("%s: %w", p.name, err)
				}
				m.Paths[p.name] = append(m.Paths[p.name], got)
			}
		}
		o.say("round %d of %d", round+1, o.rounds)
	}
	return list, nil
}

// rest is how long a path has to finish what a task left behind: connections that end, buffers that are freed.
const rest = 30 * time.Millisecond

// sample does a work once on one path.
func (s *site) sample(ctx context.Context, p *path, w work) (sample, error) {
	if err := ctx.Err(); err != nil {
		return sample{}, err
	}
	if _, err := s.client.do(task{Work: w.warmUp(), Addr: p.addr}); err != nil {
		return sample{}, err
	}
	time.Sleep(rest)
	before, err := p.cpu()
	if err != nil {
		return sample{}, err
	}
	got, err := s.client.do(task{Work: w, Addr: p.addr})
	if err != nil {
		return sample{}, err
	}
	time.Sleep(rest)
	after, err := p.cpu()
	got.Near, got.Between, got.Far = after[0]-before[0], after[1]-before[1], after[2]-before[2]
	return got, err
}

// cpu is what the path's processes, those that there are, have used so far, in seconds.
func (p *path) cpu() (used [3]float64, err error) {
	for i, process := range []*netlab.Process{p.near, p.between, p.far} {
		if process == nil {
			continue
		}
		if used[i], err = cpuOf(process); err != nil {
			return used, err
		}
	}
	return used, nil
}

// cpuOf reads user and system time of a process; the kernel tells it in hundredths of a second.
func cpuOf(p *netlab.Process) (float64, error) {
	cpu, err := cpuOfPID(p.PID())
	if err != nil {
		return 0, fmt.Errorf("%w; it wrote:\n%s", err, p.Log())
	}
	return cpu, nil
}

func cpuOfPID(pid int) (float64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, fmt.Errorf("a process is gone: %w", err)
	}
	// The name, in parentheses, may have blanks. utime and stime are fields 14 and 15.
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	if len(fields) < 13 {
		return 0, fmt.Errorf("unexpected %q", text)
	}
	user, err1 := strconv.ParseFloat(fields[11], 64)
	system, err2 := strconv.ParseFloat(fields[12], 64)
	if err1 != nil || err2 != nil {
		return 0, fmt.Errorf("unexpected %q", text)
	}
	return (user + system) / 100, nil
}
