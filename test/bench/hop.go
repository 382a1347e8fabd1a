// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"strconv"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/identity"
	"github.com/edge-tunnel/edge-tunnel/test/netlab"
)

// Names of the hop suite's paths: the agent's tunnel is to the client's own server, or to another one only.
const (
	ownPath = "own tunnel"
	hopPath = "hop"
)

// hopResult has every sample.
type hopResult struct {
	Run   circumstances `json:"run"`
	Works []measured    `json:"works"`
}

// hopWorks are those of the data path that a further process can slow.
func hopWorks(quick bool) []work {
	var list []work
	for _, w := range works(quick) {
		if w.Conns != 32 {
			list = append(list, w)
		}
	}
	return list
}

// runHop measures as the data path suite does, in turns.
func runHop(ctx context.Context, o options) (_ *hopResult, err error) {
	t := &stage{progress: o.progress}
	defer t.clear(&err)
	result := &hopResult{Run: look(ctx, o)}
	s, err := newHopSite(ctx, t, o.bin)
	if err != nil {
		return nil, err
	}
	result.Works, err = s.rounds(ctx, o, hopWorks(o.quick))
	return result, err
}

// newHopSite starts two servers that are peers, and two edge nodes: the agent of one has a tunnel to the client's server, that of the other
// one to the other server only.
func newHopSite(ctx context.Context, t *stage, bin string, flags ...string) (*site, error) {
	bin, err := filepath.Abs(bin)
	if err != nil {
		return nil, err
	}
	lab := netlab.New(t)
	s := &site{cloud: lab.Cloud("cloud"), edge: lab.Cloud("edge"), dir: filepath.Join(lab.Dir(), "pki"), bin: bin}
	other, far := lab.Cloud("cloud-2"), lab.Cloud("edge-2")
	ca, err := identity.InitCA(s.dir, identity.CAOptions{})
	if err != nil {
		return nil, err
	}
	servers, agents := map[*netlab.Node]*netlab.Process{}, map[*netlab.Node]*netlab.Process{}
	tunnels := func(n *netlab.Node) string { return netip.AddrPortFrom(n.V4, tunnelPort).String() }
	for _, n := range []*netlab.Node{s.cloud, other} {
		if _, err := ca.IssueServer(n.Name, []string{n.V4.String()}); err != nil {
			return nil, err
		}
		if err := n.Do(sparePorts); err != nil {
			return nil, err
		}
		servers[n], err = n.Start(filepath.Join(bin, "tunnel-server"), append(s.daemon(n.Name, flags), "--listen-tunnel", tunnels(n),
			"--cgroup-root", n.Cgroup(), "--peer", tunnels(s.cloud)+","+tunnels(other))...)
		if err != nil {
			return nil, err
		}
		if err := waitReady(ctx, n, servers[n], adminURL(serverAdmin, "healthz")); err != nil {
			return nil, err
		}
	}
	startAgent := func(n, to *netlab.Node) (err error) {
		agents[n], err = n.Start(filepath.Join(bin, "tunnel-agent"), append(s.daemon(n.Name, flags), "--server", tunnels(to))...)
		return errors.Join(err, waitReady(ctx, n, agents[n], adminURL(agentAdmin, "readyz")))
	}
	for _, n := range []*netlab.Node{s.edge, far} {
		if _, err := ca.IssueAgent(n.Name, []netip.Addr{n.V4}, false); err != nil {
			return nil, err
		}
		if err := n.Do(sparePorts); err != nil {
			return nil, err
		}
		if _, err := startRole(ctx, n, "service", ":"+strconv.Itoa(tunneledPort)); err != nil {
			return nil, err
		}
		if err := startAgent(n, s.cloud); err != nil {
			return nil, err
		}
	}
	// Now that the client's server knows both, one of them goes.
	if err := agents[far].Stop(10 * time.Second); err != nil {
		return nil, err
	}
	if err := startAgent(far, other); err != nil {
		return nil, err
	}
	for _, n := range []*netlab.Node{s.edge, far} {
		p := &path{name: ownPath, addr: netip.AddrPortFrom(n.V4, tunneledPort).String(), near: servers[s.cloud], far: agents[n]}
		if n == far {
			p.name, p.between = hopPath, servers[other]
		}
		s.paths = append(s.paths, p)
	}
	s.profiled = []profiled{{"server", s.cloud, serverAdmin}, {"peer", other, serverAdmin}, {"agent", far, agentAdmin}}
	if s.client, err = startClient(ctx, s.cloud); err != nil {
		return nil, err
	}
	t.Cleanup(s.client.stop)
	return s, s.waitFor(ctx, s.paths[1])
}

// waitFor waits until a path leads to its service.
func (s *site) waitFor(ctx context.Context, p *path) error {
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		_, err := s.client.do(task{Work: work{connects, 1, 1}, Addr: p.addr})
		if err == nil || ctx.Err() != nil || time.Now().After(deadline) {
			return err
		}
	}
}

// hopBar is the goal of a work, as a ratio to an own tunnel.
func hopBar(w work) (b bar, ok bool) {
	switch w.Kind {
	case connects:
		return hopConnectBar, true
	case down, up:
		return hopBulkBar, true
	}
	return b, false
}

func (h *hopResult) text() string {
	times := table{{"work", "own tunnel", "hop", "÷ own tunnel", "bar"}}
	cpu := table{{"work", "own tunnel: server + agent", "hop: server + other server + agent", "÷ own tunnel"}}
	for _, m := range h.Works {
		r := ratios(m.values(hopPath), m.values(ownPath))
		verdict := ""
		if b, ok := hopBar(m.Work); ok {
			verdict = b.text() + ": " + b.judge(r)
		}
		times = append(times, []string{m.Work.String(), spreadOf(m.values(ownPath)).text(0), spreadOf(m.values(hopPath)).text(0), spreadOf(r).text(2), verdict})
		ownText, own := m.cpuEach(ownPath)
		hopText, hop := m.cpuEach(hopPath)
		cpu = append(cpu, []string{m.Work.String(), ownText, hopText, number(hop/own, 2)})
	}
	return h.Run.text() + "Connect, request, answer, close and round trips of 64 bytes: µs p50 (range of the rounds). Bulk: MiB a second (range)\n\n" + times.String() +
		"\nCPU time: a connection or round trip in µs, bulk in seconds a GiB\n\n" + cpu.String()
}

// cpuEach adds up all rounds: the kernel counts in hundredths of a second.
func (m measured) cpuEach(path string) (text string, total float64) {
	var near, between, far, amount float64
	for _, s := range m.Paths[path] {
		near, between, far = near+s.Near, between+s.Between, far+s.Far
		amount += float64(s.Ops)/1e6 + float64(s.Bytes)/(1<<30)
	}
	text = number(near/amount, 2)
	if between > 0 {
		text += fmt.Sprintf(" + %s", number(between/amount, 2))
	}
	return text + " + " + number(far/amount, 2), (near + between + far) / amount
}
