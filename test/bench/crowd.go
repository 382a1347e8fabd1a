// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/identity"
	"github.com/edge-tunnel/edge-tunnel/test/netlab"
)

// Processes that share the agents, so that none needs more descriptors than it may have.
const fleets = 4

// cause makes all agents log in at once and says since when their logins count.
type cause struct {
	name string
	make func(context.Context) (time.Time, error)
}

// crowd is a server, an agent that stays with its service, and the simulated agents.
type crowd struct {
	t                  *stage
	dir                string // certificates
	flags              []string
	bin, profile       string
	cloud, edge, field *netlab.Node
	server             *netlab.Process
	client             *client
	fleets             []*servant
	tunnel, beside     *servant // probes
	count              int
	dials, failures    uint64
	bare               float64
}

// prepare makes nodes and certificates and starts everything but the crowd.
func (c *crowd) prepare(ctx context.Context) (err error) {
	if c.bin, err = filepath.Abs(c.bin); err != nil {
		return err
	}
	lab := netlab.New(c.t)
	c.cloud, c.edge, c.field, c.dir = lab.Cloud("cloud"), lab.Cloud("edge"), lab.Cloud("field"), filepath.Join(lab.Dir(), "pki")
	for _, n := range []*netlab.Node{c.cloud, c.edge, c.field} {
		if err := n.Do(sparePorts); err != nil {
			return err
		}
	}
	ca, err := identity.InitCA(c.dir, identity.CAOptions{})
	if err != nil {
		return err
	}
	_, err1 := ca.IssueServer(nearName, []string{c.cloud.V4.String()})
	_, err2 := ca.IssueAgent("edge", []netip.Addr{c.edge.V4}, false)
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	c.flags = []string{"--listen-tunnel", c.listen(), "--cgroup-root", c.cloud.Cgroup(), "--state-dir", filepath.Join(lab.Dir(), "state")}
	if c.profile != "" {
		c.flags = append(c.flags, "--pprof")
	}
	if err := c.startServer(ctx); err != nil {
		return err
	}
	if _, err := startRole(ctx, c.edge, "service", ":"+strconv.Itoa(directPort), ":"+strconv.Itoa(tunneledPort)); err != nil {
		return err
	}
	agent, err := c.edge.Start(filepath.Join(c.bin, "tunnel-agent"), append(c.files("edge"), "--server", c.listen())...)
	if err != nil {
		return err
	}
	if err := waitReady(ctx, c.edge, agent, adminURL(agentAdmin, "readyz")); err != nil {
		return err
	}
	if err := c.await(ctx, `edge_tunnel_targets{state="online"}`, 1); err != nil {
		return err
	}
	c.bare, err = c.memory("VmRSS")
	return err
}

func (c *crowd) listen() string { return netip.AddrPortFrom(c.cloud.V4, tunnelPort).String() }

func (c *crowd) files(name string) []string {
	in := func(file string) string { return filepath.Join(c.dir, file) }
	return []string{"--ca-cert", in("ca.crt"), "--cert", in(name + ".crt"), "--key", in(name + ".key")}
}

func (c *crowd) startServer(ctx context.Context) (err error) {
	if c.server, err = c.cloud.Start(filepath.Join(c.bin, "tunnel-server"), append(c.files(nearName), c.flags...)...); err != nil {
		return err
	}
	return waitReady(ctx, c.cloud, c.server, adminURL(serverAdmin, "healthz"))
}

// gather starts the processes that stand around the server.
func (c *crowd) gather(ctx context.Context) (err error) {
	if c.client, err = startClient(ctx, c.cloud); err != nil {
		return err
	}
	c.t.Cleanup(c.client.stop)
	for _, probe := range []struct {
		s    **servant
		port uint16
	}{{&c.tunnel, tunneledPort}, {&c.beside, directPort}} {
		if *probe.s, err = startServant(ctx, c.cloud, "prober", netip.AddrPortFrom(c.edge.V4, probe.port).String()); err != nil {
			return err
		}
		c.t.Cleanup((*probe.s).stop)
	}
	for i := range fleets {
		first, end := c.count*i/fleets, c.count*(i+1)/fleets
		told, err := json.Marshal(fleet{Server: c.listen(), Dir: c.dir, First: first, Count: end - first})
		if err != nil {
			return err
		}
		f, err := startServant(ctx, c.field, "fleet", string(told))
		if err != nil {
			return err
		}
		c.t.Cleanup(f.stop)
		c.fleets = append(c.fleets, f)
	}
	_, err = c.tell(order{Do: "ready"})
	return err
}

// tell gives all fleets an order, at once, and returns when the last has answered.
func (c *crowd) tell(o order) (muster, error) {
	musters, errs := make([]muster, len(c.fleets)), make([]error, len(c.fleets))
	var wg sync.WaitGroup
	for i, f := range c.fleets {
		wg.Go(func() {
			if errs[i] = f.ask(o, &musters[i]); errs[i] == nil && musters[i].Error != "" {
				errs[i] = errors.New(musters[i].Error)
			}
		})
	}
	wg.Wait()
	all := musters[0]
	for _, m := range musters[1:] {
		if m.At.Before(all.At) {
			all.At = m.At
		}
		all.Seconds = append(all.Seconds, m.Seconds...)
		all.Dials += m.Dials
		all.Failures += m.Failures
	}
	return all, errors.Join(errs...)
}

func (c *crowd) start(context.Context) (time.Time, error) {
	m, err := c.tell(order{Do: "start"})
	return m.At, err
}

func (c *crowd) cut(context.Context) (time.Time, error) {
	m, err := c.tell(order{Do: "cut"})
	return m.At, err
}

// restart counts from when the new server can be reached.
func (c *crowd) restart(ctx context.Context) (time.Time, error) {
	c.server.Kill()
	c.tunnel.stop()
	c.beside.stop()
	c.tunnel, c.beside = nil, nil
	err := c.startServer(ctx)
	return time.Now(), err
}

// storm has something happen and waits until everybody is back.
func (c *crowd) storm(ctx context.Context, why cause) (storm, error) {
	s := storm{What: why.name}
	if err := c.look(nil); err != nil {
		return s, err
	}
	before, err := c.metrics(ctx)
	if err != nil {
		return s, err
	}
	fleetsBefore, err := c.fleetsCPU()
	if err != nil {
		return s, err
	}
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", c.server.PID()), []byte("5"), 0o200); err != nil { // forget the peak
		return s, err
	}
	server, err := cpuOf(c.server)
	if err != nil {
		return s, err
	}
	old := c.server
	profiled := c.profileCPU(ctx, why.name, 10*time.Second)
	since, err := why.make(ctx)
	if err != nil {
		return s, err
	}
	if c.server != old { // it counts from zero
		before, server = map[string]float64{}, 0
	}
	m, err := c.tell(order{Do: "await", Since: since})
	if err != nil {
		return s, fmt.Errorf("%w; the server refused: %v", err, c.refusals(ctx, before))
	}
	if err := c.look(&s); err != nil {
		return s, err
	}
	slices.Sort(m.Seconds)
	s.P50, s.P99, s.Last = m.Seconds[len(m.Seconds)/2], m.Seconds[len(m.Seconds)*99/100], m.Seconds[len(m.Seconds)-1]
	s.Dials, s.Failures = m.Dials-c.dials, m.Failures-c.failures
	c.dials, c.failures = m.Dials, m.Failures
	if err := c.await(ctx, `edge_tunnel_targets{state="online"}`, float64(c.count)+1); err != nil {
		return s, err
	}
	s.Targets = time.Since(since).Seconds()
	s.Refused = c.refusals(ctx, before)
	serverAfter, err1 := cpuOf(c.server)
	fleetsAfter, err2 := c.fleetsCPU()
	s.Server, s.Fleets = serverAfter-server, fleetsAfter-fleetsBefore
	var err3 error
	s.Peak, err3 = c.memory("VmHWM")
	return s, errors.Join(err1, err2, err3, <-profiled)
}

// look asks the probes what they saw since the last time; s is where it goes.
func (c *crowd) look(s *storm) error {
	if c.tunnel == nil {
		return nil
	}
	var tunnel, beside lag
	if err := errors.Join(c.tunnel.ask("look", &tunnel), c.beside.ask("look", &beside)); err != nil {
		return err
	}
	for name, l := range map[string]lag{"tunnel": tunnel, "beside": beside} {
		if l.Error != "" {
			return fmt.Errorf("the probe %s failed: %s", name, l.Error)
		}
	}
	if s != nil {
		s.Tunnel, s.Beside = &tunnel, &beside
	}
	return nil
}

func (c *crowd) refusals(ctx context.Context, before map[string]float64) map[string]float64 {
	now, err := c.metrics(ctx)
	if err != nil {
		return nil
	}
	refused := make(map[string]float64)
	for name, value := range now {
		reason, ok := strings.CutPrefix(name, `edge_tunnel_logins_refused_total{reason="`)
		if more := value - before[name]; ok && more > 0 {
			refused[strings.TrimSuffix(reason, `"}`)] = more
		}
	}
	return refused
}

// repose lets the server settle for a while and then watches it for as long.
func (c *crowd) repose(ctx context.Context, after string, quiet time.Duration) (repose, error) {
	r := repose{After: after, Bare: c.bare}
	if err := wait(ctx, quiet); err != nil {
		return r, err
	}
	before, err := c.metrics(ctx)
	if err != nil {
		return r, err
	}
	cpu, err := cpuOf(c.server)
	if err != nil {
		return r, err
	}
	begin := time.Now()
	profiled := c.profileCPU(ctx, "idle after "+after, quiet-time.Second)
	if err := wait(ctx, quiet); err != nil {
		return r, err
	}
	r.Seconds = time.Since(begin).Seconds()
	cpuAfter, err1 := cpuOf(c.server)
	r.Cores = (cpuAfter - cpu) / r.Seconds
	var err2 error
	r.RSS, err2 = c.memory("VmRSS")
	r.Each = r.RSS / float64(c.count)
	now, err3 := c.metrics(ctx)
	r.Heap, r.Stacks = now["go_memstats_heap_alloc_bytes"]/1024, now["go_memstats_stack_inuse_bytes"]/1024
	r.Routine = now["go_goroutines"]
	const attempts = "edge_tunnel_tunnel_connections_total"
	r.Logins = now[attempts] - before[attempts]
	return r, errors.Join(err1, err2, err3, <-profiled, c.saveProfile(ctx, "heap after "+after, "heap"))
}

func wait(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
	return ctx.Err()
}

// await polls a metric of the server until it has a value.
func (c *crowd) await(ctx context.Context, name string, value float64) error {
	ctx, cancel := context.WithTimeout(ctx, awaitLimit)
	defer cancel()
	for {
		m, err := c.metrics(ctx)
		if err == nil && m[name] == value {
			return nil
		}
		if wait(ctx, 100*time.Millisecond) != nil {
			return fmt.Errorf("%s is %v, not %v: %w", name, m[name], value, errors.Join(err, ctx.Err()))
		}
	}
}

func (c *crowd) metrics(ctx context.Context) (map[string]float64, error) {
	page, err := get(ctx, c.cloud, adminURL(serverAdmin, "metrics"))
	if err != nil {
		return nil, err
	}
	all := make(map[string]float64)
	for line := range bytes.Lines(page) {
		name, text, _ := strings.Cut(strings.TrimSpace(string(line)), " ")
		if value, err := strconv.ParseFloat(text, 64); err == nil {
			all[name] = value
		}
	}
	return all, nil
}

// memory reads a line of the server's /proc/PID/status, in KiB.
func (c *crowd) memory(field string) (float64, error) { return memoryOf(c.server, field) }

// memoryOf is a line of a process's status, in KiB.
func memoryOf(p *netlab.Process, field string) (float64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID()))
	if err != nil {
		return 0, fmt.Errorf("a process is gone: %w; it wrote:\n%s", err, p.Log())
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, field+":"); ok {
			return strconv.ParseFloat(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")), 64)
		}
	}
	return 0, fmt.Errorf("no %s in %q", field, text)
}

func (c *crowd) fleetsCPU() (sum float64, err error) {
	for _, f := range c.fleets {
		cpu, err := cpuOfPID(f.cmd.Process.Pid)
		if err != nil {
			return 0, err
		}
		sum += cpu
	}
	return sum, nil
}

// profileCPU records a profile meanwhile, if profiles are wanted. The channel gets the outcome.
func (c *crowd) profileCPU(ctx context.Context, name string, d time.Duration) <-chan error {
	done := make(chan error, 1)
	if c.profile == "" {
		close(done)
		return done
	}
	go func() { done <- c.saveProfile(ctx, name, fmt.Sprintf("profile?seconds=%d", max(1, int(d.Seconds())))) }()
	return done
}

func (c *crowd) saveProfile(ctx context.Context, name, what string) error {
	if c.profile == "" {
		return nil
	}
	content, err := get(ctx, c.cloud, adminURL(serverAdmin, "debug/pprof/"+what))
	if err != nil {
		return nil // the server was killed meanwhile
	}
	name = strings.ReplaceAll(name, " ", "-") + ".server.pprof"
	return errors.Join(os.MkdirAll(c.profile, 0o755), os.WriteFile(filepath.Join(c.profile, name), content, 0o644))
}
