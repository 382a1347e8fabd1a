// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf/link"
	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
	"github.com/edge-tunnel/edge-tunnel/test/netlab"
)

// patience is for things that take a moment, on a machine that is busy with other tests.
const patience = 20 * time.Second

// daemon is one run of a server or an agent: after a restart there is another one. It is killed with the world if it still runs.
type daemon struct {
	*netlab.Process
	host    *host
	t       *testing.T
	name    string // of the program
	adminAt string // IP:PORT on the node
	control string // socket, the same path inside and outside
}

// prepareServer is a server's command line on the node: its certificate, cgroup and state folder, JSON logs at level debug. All
// else is default: /sys/fs/bpf, /run and 127.0.0.1 are the node's own. Flags come last and win.
func (h *host) prepareServer(flags ...string) []string {
	args := append(h.tls(), "--log-format", "json", "--log-level", "debug",
		"--cgroup-root", h.Cgroup(), "--state-dir", h.Path("state"))
	return append(append(args, h.flags...), flags...)
}

// prepareAgent is an agent's command line on the node.
func (h *host) prepareAgent(servers []*host, flags ...string) []string {
	args := append(h.tls(), "--log-format", "json", "--log-level", "debug")
	for _, s := range servers {
		args = append(args, "--server", s.at(10262).String())
	}
	return append(append(args, h.flags...), flags...)
}

func (h *host) tls() []string {
	in := func(file string) string { return filepath.Join(h.w.pki, file) }
	return []string{"--ca-cert", in("ca.crt"), "--cert", in(h.cert + ".crt"), "--key", in(h.cert + ".key")}
}

// launch starts a daemon and does not wait for anything.
func (h *host) launch(name string, args []string) *daemon {
	h.t.Helper()
	cmd := h.Command(context.Background(), h.w.program(name), args...)
	cmd.Env = append(cmd.Env, raceVariable)
	p, err := h.StartCmd(cmd)
	if err != nil {
		h.t.Fatalf("start %s on %s: %v", name, h.Name, err)
	}
	d := &daemon{Process: p, host: h, t: h.t, name: name, adminAt: "127.0.0.1:10265", control: h.Path("run", "edge-tunnel", "server.sock")}
	if name == "tunnel-agent" {
		d.adminAt, d.control = "127.0.0.1:10266", h.Path("run", "edge-tunnel", "agent.sock")
	}
	h.w.daemons = append(h.w.daemons, d)
	return d
}

// launchServer starts a server and does not wait for it.
func (h *host) launchServer(flags ...string) *daemon {
	h.t.Helper()
	if err := os.MkdirAll(h.Path("state"), 0o700); err != nil {
		h.t.Fatal(err)
	}
	return h.launch("tunnel-server", h.prepareServer(flags...))
}

// startServer starts a server and waits until it is ready.
func (h *host) startServer(flags ...string) *daemon {
	h.t.Helper()
	d := h.launchServer(flags...)
	d.waitReady()
	return d
}

// launchAgent starts an agent and does not wait for it.
func (h *host) launchAgent(servers []*host, flags ...string) *daemon {
	h.t.Helper()
	return h.launch("tunnel-agent", h.prepareAgent(servers, flags...))
}

// startAgent starts an agent and waits until it has a tunnel to each of the servers. They need a moment more until the targets are
// online: [daemon.waitTarget].
func (h *host) startAgent(servers []*host, flags ...string) *daemon {
	h.t.Helper()
	d := h.launchAgent(servers, flags...)
	d.waitReady()
	d.waitMetric(`edge_tunnel_agent_tunnels{state="up"}`, float64(len(servers)))
	return d
}

// get asks the admin address. The connection is made outside of the node's cgroup, so the kernel's counters do not see it.
func (d *daemon) get(path string) (status int, body string, err error) {
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: d.host.Dial}}
	req, err := http.NewRequestWithContext(context.Background(), http.MethodGet, "http://"+d.adminAt+path, http.NoBody)
	if err != nil {
		return 0, "", err
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	content, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(content), err
}

// waitReady waits for /readyz, and ends the test if the daemon ends.
func (d *daemon) waitReady() {
	d.t.Helper()
	eventually(d.t, patience, func() error {
		select {
		case <-d.Exited():
			d.t.Fatalf("%s on %s ended:\n%s", d.name, d.host.Name, d.Log())
		default:
		}
		status, body, err := d.get("/readyz")
		if err == nil && status != http.StatusOK {
			err = fmt.Errorf("%s on %s is not ready: %s", d.name, d.host.Name, body)
		}
		return err
	})
	d.host.w.noteLinks(d.host)
}

// waitLog waits until the daemon has logged a line that contains the text.
func (d *daemon) waitLog(text string) {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(d.t.Context(), patience)
	defer cancel()
	if err := d.WaitFor(ctx, text); err != nil {
		d.t.Fatalf("%s on %s: %v", d.name, d.host.Name, err)
	}
}

// stop ends the daemon with SIGTERM. It must exit with status 0 within the patience.
func (d *daemon) stop() {
	d.t.Helper()
	if err := d.Stop(patience); err != nil {
		d.t.Fatalf("%s on %s: %v", d.name, d.host.Name, err)
	}
}

// waitExit waits for the end of a daemon that was told to stop, once: a second SIGTERM would end it at once, and badly.
func (d *daemon) waitExit() {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(d.t.Context(), patience)
	defer cancel()
	if err := d.Wait(ctx); err != nil {
		d.t.Fatalf("%s on %s: %v", d.name, d.host.Name, err)
	}
}

// ctl runs tunnelctl on the node and returns its output. Its defaults (sockets in /run, /sys/fs/bpf) are the node's own.
func (h *host) ctl(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := h.Command(ctx, h.w.program("tunnelctl"), args...)
	cmd.Env = append(cmd.Env, raceVariable)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// client asks the control socket.
func (d *daemon) client() *admin.Client { return admin.NewClient(d.control) }

// target is what the server knows about an address; the zero value if that is nothing.
func (d *daemon) target(addr netip.Addr) (admin.Target, error) {
	list, err := d.client().Targets(d.t.Context())
	if err != nil {
		return admin.Target{}, err
	}
	for _, t := range list.Targets {
		if t.Addr == addr {
			return t, nil
		}
	}
	return admin.Target{}, nil
}

// waitTarget waits until the server lists the address in that state.
func (d *daemon) waitTarget(addr netip.Addr, state string) {
	d.t.Helper()
	eventually(d.t, patience, func() error {
		target, err := d.target(addr)
		if err == nil && target.State != state {
			err = fmt.Errorf("target %s is %q (%s), want %q", addr, target.State, target.Reason, state)
		}
		return err
	})
}

// metrics are all samples of /metrics, by name with labels as they are written there: `edge_tunnel_bpf_total{verdict="offline"}`.
type metrics map[string]float64

func (d *daemon) metrics() metrics {
	d.t.Helper()
	m, err := d.tryMetrics()
	if err != nil {
		d.t.Fatalf("metrics of %s on %s: %v", d.name, d.host.Name, err)
	}
	return m
}

func (d *daemon) tryMetrics() (metrics, error) {
	status, body, err := d.get("/metrics")
	if err != nil {
		return nil, err
	}
	if status != http.StatusOK {
		return nil, fmt.Errorf("status %d: %s", status, body)
	}
	m := make(metrics)
	for line := range strings.Lines(body) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		space := strings.LastIndexByte(line, ' ')
		value, err := strconv.ParseFloat(line[space+1:], 64)
		if err != nil {
			return nil, err
		}
		m[line[:space]] = value
	}
	return m, nil
}

// bpf is one of the kernel's counters, as the server shows them.
func (m metrics) bpf(verdict string) float64 {
	return m[fmt.Sprintf("edge_tunnel_bpf_total{verdict=%q}", verdict)]
}

// waitMetric waits until a metric has the value.
func (d *daemon) waitMetric(name string, want float64) {
	d.t.Helper()
	d.waitMetricFor(patience, name, want)
}

func (d *daemon) waitMetricFor(limit time.Duration, name string, want float64) {
	d.t.Helper()
	eventually(d.t, limit, func() error {
		m, err := d.tryMetrics()
		if err != nil {
			return err
		}
		got, ok := m[name]
		if !ok {
			return fmt.Errorf("%s on %s has no metric %s", d.name, d.host.Name, name)
		}
		if got != want {
			return fmt.Errorf("%s on %s: %s is %v, want %v", d.name, d.host.Name, name, got, want)
		}
		return nil
	})
}

// waitEnded waits until so many connections have ended for the reason.
func (d *daemon) waitEnded(reason string, want float64) {
	d.t.Helper()
	name := "edge_tunnel_connections_ended_total"
	if d.name == "tunnel-agent" {
		name = "edge_tunnel_agent_connections_ended_total"
	}
	d.waitMetric(fmt.Sprintf("%s{reason=%q}", name, reason), want)
}

// waitIdle waits until no connection and no stream is open any more: whatever was opened has been closed.
func (d *daemon) waitIdle() {
	d.t.Helper()
	prefix := "edge_tunnel"
	if d.name == "tunnel-agent" {
		prefix = "edge_tunnel_agent"
	}
	eventually(d.t, patience, func() error {
		m, err := d.tryMetrics()
		if err != nil {
			return err
		}
		open, opened, closed := m[prefix+"_connections"], m[prefix+"_streams_opened_total"], m[prefix+"_streams_closed_total"]
		if open != 0 || opened != closed {
			return fmt.Errorf("%s on %s: %v connections open, %v streams opened and %v closed", d.name, d.host.Name, open, opened, closed)
		}
		return nil
	})
}

// record is an access record: one line of the log, at a connection's end. Servers and agents fill different fields.
type record struct {
	Time     time.Time
	Trace    string
	PID      uint32
	Comm     string
	UID      uint32
	Cgroup   uint64
	Netns    uint64
	Src, Dst netip.AddrPort
	Node     string
	Server   string
	Dialed   string
	Sent     int64
	Received int64
	Duration time.Duration
	Reason   string
	Retried  bool
	Detail   string
}

// records are the access records so far, in the order of the connections' ends.
func (d *daemon) records() []record {
	d.t.Helper()
	var list []record
	for _, line := range d.lines() {
		if line["msg"] != "connection" {
			continue
		}
		text, err := json.Marshal(line)
		if err != nil {
			d.t.Fatal(err)
		}
		var r record
		if err := json.Unmarshal(text, &r); err != nil {
			d.t.Fatalf("access record %s: %v", text, err)
		}
		list = append(list, r)
	}
	return list
}

// record waits for the access record of the client at that address: conn.LocalAddr() of what [host.dial] returned.
func (d *daemon) record(client net.Addr) record {
	d.t.Helper()
	src := client.(*net.TCPAddr).AddrPort()
	src = netip.AddrPortFrom(src.Addr().Unmap(), src.Port())
	return d.waitRecord(src.String(), func(r record) bool { return r.Src == src })
}

// recordTo waits for the access record of a connection to that destination.
func (d *daemon) recordTo(dst netip.AddrPort) record {
	d.t.Helper()
	return d.waitRecord(dst.String(), func(r record) bool { return r.Dst == dst })
}

// waitRecord waits for an access record that is the wanted one; if there are several (ports are used again) it is the latest.
func (d *daemon) waitRecord(what string, wanted func(record) bool) record {
	d.t.Helper()
	var found record
	eventually(d.t, patience, func() error {
		records := d.records()
		for i := len(records) - 1; i >= 0; i-- {
			if wanted(records[i]) {
				found = records[i]
				return nil
			}
		}
		return fmt.Errorf("no access record for %s among %d of %s on %s", what, len(records), d.name, d.host.Name)
	})
	return found
}

// lines are the log, decoded. What is not JSON (a usage error, a crash) is left out.
func (d *daemon) lines() []map[string]any {
	var list []map[string]any
	scanner := bufio.NewScanner(strings.NewReader(d.Log()))
	scanner.Buffer(nil, 1<<20)
	for scanner.Scan() {
		var line map[string]any
		decoder := json.NewDecoder(strings.NewReader(scanner.Text()))
		decoder.UseNumber() // ids of cgroups and namespaces do not fit a float
		if decoder.Decode(&line) == nil {
			list = append(list, line)
		}
	}
	return list
}

// linkIDs are the ids of the pinned links of a node's server, by hook.
func (h *host) linkIDs() map[string]uint32 {
	h.t.Helper()
	paths, err := filepath.Glob(filepath.Join(h.BPFFS(), "edge-tunnel", "v1", "links", "*"))
	if err != nil {
		h.t.Fatal(err)
	}
	ids := make(map[string]uint32)
	for _, path := range paths {
		l, err := link.LoadPinnedLink(path, nil)
		if errors.Is(err, os.ErrNotExist) {
			continue // being replaced
		}
		if err != nil {
			h.t.Fatalf("open link %s: %v", path, err)
		}
		info, err := l.Info()
		l.Close()
		if err != nil {
			h.t.Fatalf("ask link %s: %v", path, err)
		}
		ids[filepath.Base(path)] = uint32(info.ID)
	}
	return ids
}
