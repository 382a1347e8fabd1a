// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/edge-tunnel/edge-tunnel/pkg/redirect"
)

// Ports of the probe: connections to the first are nobody's business, the second is tunneled.
const (
	plainPort = 9001
	hookPort  = 10250
)

// Cases that have bars of their own, and the largest number of targets.
const (
	notTunneled = "miss: port not tunneled"
	hitCase     = "hit"
	maxTargets  = 65536
)

// probe runs in a node of its own and is its only process. Everything happens on one thread, with plain system calls, so
// that neither a scheduler nor a poller is measured.
type probe struct {
	probing
	kernel    *redirect.Kernel
	listeners []*net.TCPListener
	result    hookResult
}

// hookProbeMain PROBING: prints a hookResult.
func hookProbeMain(args []string) int {
	runtime.LockOSThread()
	p := &probe{}
	err := json.Unmarshal([]byte(args[0]), &p.probing)
	if err == nil {
		err = p.run()
	}
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(p.result)
	}
	if err != nil {
		return failRole(err)
	}
	return 0
}

func (p *probe) run() error {
	for _, port := range []int{plainPort, hookPort} {
		ln, err := listen(fmt.Sprintf(":%d", port))
		if err != nil {
			return err
		}
		p.listeners = append(p.listeners, ln)
	}
	if err := p.compareAttached(); err != nil {
		return fmt.Errorf("compare connects: %w", err)
	}
	if err := p.measurePrograms(); err != nil {
		return fmt.Errorf("measure programs: %w", err)
	}
	return nil
}

// openKernel opens the programs and attaches them.
func (p *probe) openKernel() error {
	k, err := redirect.Open(context.Background(), redirect.Options{BPFFS: p.BPFFS, CgroupRoot: p.Cgroup})
	if err != nil {
		return err
	}
	p.kernel = k
	if err := k.SetPorts([]uint16{hookPort}); err != nil {
		return err
	}
	return k.Attach()
}

func (p *probe) closeKernel() error {
	return errors.Join(p.kernel.Close(), redirect.Cleanup(p.BPFFS))
}

// compareAttached measures connect and close of a connection that is nobody's business, with no program, with empty ones and with
// ours, in turns.
func (p *probe) compareAttached() error {
	modes := []struct {
		name         string
		attach, undo func() error
	}{
		{"no program", func() error { return nil }, func() error { return nil }},
		{"empty programs at the same hooks", nil, nil},
		{"ours", p.openKernel, p.closeKernel},
	}
	var empty *empties
	modes[1].attach = func() (err error) { empty, err = attachEmpties(p.Cgroup); return err }
	modes[1].undo = func() error { return empty.close() }

	took := make([][]float64, len(modes))
	for round := range p.Rounds {
		for i := range modes {
			mode := modes[(round+i)%len(modes)]
			if err := mode.attach(); err != nil {
				return fmt.Errorf("attach %s: %w", mode.name, err)
			}
			times, err := p.connectAll(p.Connects, func() netip.AddrPort { return loopback4(plainPort) }, nil)
			if err := errors.Join(err, mode.undo()); err != nil {
				return err
			}
			took[(round+i)%len(modes)] = append(took[(round+i)%len(modes)], micros(percentile(times, 50)))
		}
	}
	for i, mode := range modes {
		p.result.Connects = append(p.result.Connects, connectCost{mode.name, spreadOf(took[i])})
	}
	return nil
}

func (p *probe) measurePrograms() (err error) {
	if err := p.openKernel(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.closeKernel()) }()
	for _, addr := range p.kernel.HostAddrs() {
		for _, port := range p.kernel.RedirectPorts() {
			ln, err := p.kernel.Listen(context.Background(), netip.AddrPortFrom(addr, port))
			if err != nil {
				return err
			}
			p.listeners = append(p.listeners, ln)
		}
	}
	// The time of a refusal is what a user sees, so it is taken without statistics.
	if err := p.measureRefusal(); err != nil {
		return fmt.Errorf("refusal: %w", err)
	}
	empty, err := attachEmpties(p.Cgroup)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, empty.close()) }()
	stats, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	if err != nil {
		return err
	}
	defer stats.Close()
	for _, c := range p.cases() {
		if err := p.measureCase(c, empty); err != nil {
			return fmt.Errorf("%s, %s, %d targets: %w", c.program, c.name, c.targets, err)
		}
	}
	return nil
}

// measureRefusal times connect() to targets without a tunnel.
func (p *probe) measureRefusal() error {
	if _, err := p.setTargets(edge4, 1000, redirect.Offline); err != nil {
		return err
	}
	var p50, p99 []float64
	for range p.Rounds {
		times, err := p.connectAll(p.Connects, func() netip.AddrPort { return netip.AddrPortFrom(edge4(rand.IntN(1000)), hookPort) }, unix.EHOSTUNREACH)
		if err != nil {
			return err
		}
		p50 = append(p50, micros(percentile(times, 50)))
		p99 = append(p99, micros(percentile(times, 99)))
	}
	p.result.Refusal = refusal{spreadOf(p50), spreadOf(p99)}
	return nil
}

// probeCase is something that calls programs.
type probeCase struct {
	program, name string
	miss          bool
	targets       int
	addr          func(i int) netip.Addr // of target i
	state         redirect.State
	dst           func() netip.AddrPort                        // connects there, or
	call          func() error                                 // calls this
	fails         error                                        // what connect returns
	counted       func(before, after redirect.Counters) uint64 // how many of the calls were what the case says
	also          string                                       // another program that the same calls are about
}

func (p *probe) cases() []probeCase {
	missed := func(a, b redirect.Counters) uint64 { return b.Missed - a.Missed }
	hit4 := func(a, b redirect.Counters) uint64 { return b.RedirectedHost4 - a.RedirectedHost4 }
	hit6 := func(a, b redirect.Counters) uint64 { return b.RedirectedHost6 - a.RedirectedHost6 }
	offline := func(a, b redirect.Counters) uint64 { return b.Offline - a.Offline }
	names := func(a, b redirect.Counters) uint64 { return b.PeerNames - a.PeerNames }
	among := func(addr func(int) netip.Addr, n int) func() netip.AddrPort {
		return func() netip.AddrPort { return netip.AddrPortFrom(addr(rand.IntN(n)), hookPort) }
	}
	all := []probeCase{
		{program: "connect4", name: notTunneled, miss: true, targets: 10, addr: edge4, counted: missed, also: "sock_ops",
			dst: func() netip.AddrPort { return loopback4(plainPort) }},
		{program: "connect6", name: notTunneled, miss: true, targets: 10, addr: edge6, counted: missed,
			dst: func() netip.AddrPort { return netip.AddrPortFrom(netip.IPv6Loopback(), plainPort) }},
	}
	for _, n := range []int{10, 100, 1000, 10000, maxTargets} {
		all = append(all,
			probeCase{program: "connect4", name: "miss: one address, no target", miss: true, targets: n, addr: edge4, counted: missed, dst: among(local4, 1)},
			probeCase{program: "connect4", name: "miss: random addresses of 256 networks", miss: true, targets: n, addr: edge4, counted: missed, dst: among(local4, 1<<16)},
			probeCase{program: "connect4", name: "miss: random addresses of 65,536 networks", miss: true, targets: n, addr: edge4, counted: missed, dst: among(anyLocal4, 1<<24)},
			probeCase{program: "connect4", name: hitCase, targets: n, addr: edge4, counted: hit4, dst: among(edge4, n), also: "sock_ops"})
	}
	return append(all,
		probeCase{program: "connect4", name: "refused: offline", targets: 1000, addr: edge4, state: redirect.Offline, counted: offline,
			dst: among(edge4, 1000), fails: unix.EHOSTUNREACH},
		probeCase{program: "connect6", name: "miss: one address, no target", miss: true, targets: 10, addr: edge6, counted: missed,
			dst: func() netip.AddrPort { return netip.AddrPortFrom(netip.IPv6Loopback(), hookPort) }},
		probeCase{program: "connect6", name: hitCase, targets: 10, addr: edge6, counted: hit6, dst: among(edge6, 10)},
		probeCase{program: "connect6", name: hitCase, targets: maxTargets, addr: edge6, counted: hit6, dst: among(edge6, maxTargets)},
		probeCase{program: "bind4", name: "another port", targets: 10, addr: edge4, call: bindSomewhere},
		probeCase{program: "getpeername4", name: "unrelated socket", targets: 10, addr: edge4, call: p.peerName(loopback4(plainPort))},
		probeCase{program: "getpeername4", name: "redirected socket", targets: 10, addr: edge4, counted: names,
			call: p.peerName(netip.AddrPortFrom(edge4(0), hookPort))},
	)
}

// measureCase fills in a row for the case's program, and one for the other program that it is about.
func (p *probe) measureCase(c probeCase, empty *empties) error {
	if c.state == 0 {
		c.state = redirect.Online
	}
	took, err := p.setTargets(c.addr, c.targets, c.state)
	if err != nil {
		return err
	}
	if c.program == "connect4" && c.name == hitCase {
		u, err := p.measureChanges(c.addr)
		if err != nil {
			return err
		}
		u.Targets, u.Millis = c.targets, micros(took)/1e3
		p.result.Updates = append(p.result.Updates, u)
	}
	programs, err := p.programs(empty) // again for each case: a map that grows has its programs loaded anew
	if err != nil {
		return err
	}
	defer closePrograms(programs)
	rows := map[string]*costs{c.program: {}}
	if c.also != "" {
		rows[c.also] = &costs{}
	}
	for range p.Rounds {
		before, err := p.kernel.Stats()
		if err != nil {
			return err
		}
		begin, err := readRuns(programs)
		if err != nil {
			return err
		}
		if err := p.perform(c); err != nil {
			return err
		}
		end, err := readRuns(programs)
		if err != nil {
			return err
		}
		after, err := p.kernel.Stats()
		if err != nil {
			return err
		}
		if c.counted != nil && c.counted(before, after) < uint64(p.Connects) {
			return fmt.Errorf("%d of %d calls were what they should be", c.counted(before, after), p.Connects)
		}
		for name, row := range rows {
			if err := row.add(begin, end, name); err != nil {
				return err
			}
		}
	}
	for _, name := range slices.Backward(slices.Sorted(maps.Keys(rows))) {
		row := rows[name]
		p.result.Programs = append(p.result.Programs, programCost{
			Program: name, Case: c.name, Miss: c.miss && name == c.program, Targets: c.targets,
			Calls: float64(row.calls) / float64(p.Rounds*p.Connects),
			Ours:  spreadOf(row.ours), Empty: spreadOf(row.empty), Net: spreadOf(row.net),
		})
	}
	return nil
}

func (p *probe) perform(c probeCase) error {
	if c.call == nil {
		_, err := p.connectAll(p.Connects, c.dst, c.fails)
		return err
	}
	for range p.Connects {
		if err := c.call(); err != nil {
			return err
		}
	}
	return nil
}

func (p *probe) setTargets(addr func(int) netip.Addr, n int, state redirect.State) (time.Duration, error) {
	if err := p.kernel.SetTargets(nil); err != nil {
		return 0, err
	}
	list := make([]redirect.Target, n)
	for i := range list {
		list[i] = redirect.Target{Addr: addr(i), Node: fmt.Sprintf("edge-%d.example.com", i), State: state}
	}
	begin := time.Now()
	err := p.kernel.SetTargets(list)
	return time.Since(begin), err
}

// measureChanges changes one of the targets that are in force, and changes it back, in each round.
func (p *probe) measureChanges(addr func(int) netip.Addr) (u update, err error) {
	list := p.kernel.Targets()
	var states, addresses []float64
	timed := func(into *[]float64, change func() error) {
		begin := time.Now()
		err = errors.Join(err, change())
		*into = append(*into, micros(time.Since(begin))/1e3)
	}
	for range p.Rounds {
		for _, state := range []redirect.State{redirect.Offline, redirect.Online} {
			timed(&states, func() error { return p.kernel.SetState([]netip.Addr{addr(0)}, state) })
		}
		timed(&addresses, func() error { return p.kernel.SetTargets(list[1:]) })
		timed(&addresses, func() error { return p.kernel.SetTargets(list) })
	}
	return update{State: spreadOf(states), Address: spreadOf(addresses)}, err
}

func loopback4(port uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port)
}

// The addresses of edge nodes, and as many of this node's own; i is below 65,536.
func edge4(i int) netip.Addr  { return netip.AddrFrom4([4]byte{10, 99, byte(i >> 8), byte(i)}) }
func local4(i int) netip.Addr { return netip.AddrFrom4([4]byte{127, 1, byte(i >> 8), byte(i)}) }
func anyLocal4(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{127, byte(i >> 16), byte(i >> 8), byte(i)})
}
func edge6(i int) netip.Addr {
	return netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x99, 14: byte(i >> 8), 15: byte(i)})
}
