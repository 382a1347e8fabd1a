// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
	"github.com/edge-tunnel/edge-tunnel/pkg/redirect"
	"github.com/edge-tunnel/edge-tunnel/test/netlab"
)

func TestServes(t *testing.T) {
	n := newNode(t)
	state, deny := t.TempDir(), writeFile(t, filepath.Join(n.dir, "deny"), "# nobody\n", 0o600)
	p := n.start("--state-dir", state, "--deny-file", deny)
	n.startAgent()
	n.online()
	for _, addr := range []netip.Addr{edge4, edge6} {
		c := connect(t, addr)
		c.talk()
		if got := c.RemoteAddr().String(); got != netip.AddrPortFrom(addr, 10250).String() {
			t.Errorf("getpeername says %s", got)
		}
		list, err := p.control.Connections(t.Context())
		if err != nil || len(list.Connections) != 1 || list.Connections[0].Node != "edge-1" || list.Connections[0].PID != uint32(os.Getpid()) {
			t.Errorf("%+v, %v", list, err)
		}
		c.Close()
		eventually(t, "access record", func() bool {
			r := p.logged("connection")
			return r != nil && r["dst"] == netip.AddrPortFrom(addr, 10250).String() && r["reason"] == "closed"
		})
	}

	s, err := p.control.Status(t.Context())
	if err != nil || !s.Ready || s.Tunnels != 1 || s.Server.Targets.Online != 2 || len(s.Server.NodeAddrs) != 2 || len(s.Server.Hooks) != 7 {
		t.Errorf("%+v, %v", s, err)
	}
	for _, h := range s.Server.Hooks {
		if !h.Attached || h.Program == 0 || h.Link == 0 {
			t.Errorf("hook %+v", h)
		}
	}
	_, metrics := get(t, "/metrics")
	for _, line := range []string{
		`edge_tunnel_bpf_total{verdict="accepted_host"} `, `edge_tunnel_targets{state="online"} 2`, `edge_tunnel_ready{condition="canary"} 1`,
		`edge_tunnel_connections_ended_total{reason="closed"} 2`, `edge_tunnel_node_connections_ended_total{node="edge-1"} 2`,
		`edge_tunnel_redirect_listeners 32`, `edge_tunnel_tunnels{state="up"} 1`,
	} {
		if !strings.Contains(metrics, line) {
			t.Errorf("no metric %s", line)
		}
	}

	// A node in the deny file loses its tunnel at once, and its targets are refused; out of it, it comes back.
	c := connect(t, edge4)
	c.talk()
	writeFile(t, deny, "edge-1\n", 0o600)
	p.sighup <- struct{}{}
	eventually(t, "offline", func() bool {
		conn, err := dial(edge4)
		if err == nil {
			conn.Close()
		}
		return errors.Is(err, unix.EHOSTUNREACH)
	})
	if _, err := c.r.ReadByte(); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("an open connection ended with %v", err)
	}
	if p.logged("reloaded") == nil {
		t.Error("the reload is not in the log")
	}
	writeFile(t, deny, "# nobody\n", 0o600)
	p.sighup <- struct{}{}
	n.online()

	// Forgotten and alive, it is back at once; the file knows.
	if gone, err := p.control.Forget(t.Context(), "edge-1"); err != nil || gone.Targets != 2 {
		t.Errorf("%+v, %v", gone, err)
	}
	if _, err := p.control.Forget(t.Context(), "edge-7"); !errors.Is(err, admin.ErrUnknownNode) {
		t.Errorf("%v", err)
	}
	n.online()

	if err := p.control.Drain(t.Context()); err != nil {
		t.Error(err)
	}
	p.wantEnd(cli.StatusOK)
	if text, err := os.ReadFile(filepath.Join(state, "targets.json")); err != nil || !strings.Contains(string(text), "edge-1") {
		t.Errorf("%s, %v", text, err)
	}
	if r := p.logged("stopping"); r == nil || r["why"] != "asked to by the control socket" {
		t.Errorf("%v", r)
	}
}

// What is in the kernel stays in force from end to start, and then offline until the agent is back.
func TestStopsAndStartsAgain(t *testing.T) {
	n := newNode(t)
	p := n.start()
	n.startAgent()
	n.online()
	c := connect(t, edge4)
	c.talk()
	p.stop()
	eventually(t, "listeners closed", func() bool { return p.logged("open connections may finish") != nil })
	if _, err := dial(edge4); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("a connect while nobody serves: %v, want ECONNREFUSED", err)
	}
	c.talk() // open connections go on
	c.Close()
	p.wantEnd(cli.StatusOK)
	if r := p.logged("stopped"); r == nil || r["reset"] != 0.0 {
		t.Errorf("%v", r)
	}
	if _, err := os.Lstat(n.socket()); !os.IsNotExist(err) {
		t.Errorf("control socket: %v", err)
	}
	if count := n.attached(); count != 7 {
		t.Errorf("%d programs after the end, want 7", count)
	}

	before, err := redirect.ReadPinned(n.bpffs)
	must(t, err)
	p = n.start("--admin", "127.0.0.1:10265")
	if r := p.logged("started"); r["known_nodes"] != 1.0 {
		t.Errorf("without --state-dir the kernel remembers: %v", r)
	}
	n.online() // the agent comes again
	connect(t, edge6).talk()
	after, err := redirect.ReadPinned(n.bpffs)
	must(t, err)
	if count := n.attached(); count != 7 || after.Counters.RedirectedHost4 < before.Counters.RedirectedHost4 {
		t.Errorf("%d programs, counters %+v then %+v", count, before.Counters, after.Counters)
	}
}

// The drain has a bound, and what is still open then is reset.
func TestDrainIsBounded(t *testing.T) {
	n := newNode(t)
	p := n.start("--drain-timeout", "100ms")
	n.startAgent()
	n.online()
	c := connect(t, edge4)
	c.talk()
	p.stop()
	p.wantEnd(cli.StatusOK)
	if r := p.logged("stopped"); r == nil || r["reset"] != 1.0 {
		t.Errorf("%v", r)
	}
	if _, err := c.r.ReadByte(); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("%v", err)
	}
}

// While the old server's last connections finish, a successor has everything, and serves.
func TestSuccessorServesDuringTheDrain(t *testing.T) {
	n := newNode(t)
	old := n.start("--drain-timeout", "1m")
	n.startAgent()
	n.online()
	c := connect(t, edge4)
	c.talk()

	successor := n.launch()
	eventually(t, "it waits, and says so", func() bool {
		return successor.logged("Waiting for another tunnel-server to give up the pinned programs") != nil
	})
	old.stop()
	eventually(t, "successor started", func() bool { return successor.logged("started") != nil })
	eventually(t, "ready", func() bool { return successor.ready() == "" })
	eventually(t, "agent at the successor", func() bool {
		s, err := successor.control.Status(t.Context())
		return err == nil && s.Tunnels == 1 && s.Server.Targets.Online == 2
	})
	connect(t, edge4).talk()
	connect(t, edge6).talk()
	if len(old.status) != 0 {
		t.Error("the old server has not waited for its connection")
	}
	c.talk()
	c.Close()
	old.wantEnd(cli.StatusOK)
	connect(t, edge4).talk()
	if count := n.attached(); count != 7 {
		t.Errorf("%d programs, want 7", count)
	}
}

// A server that is told to stop while it waits for another one has nothing to undo, and nothing went wrong.
func TestStopsWhileItWaits(t *testing.T) {
	n := newNode(t)
	n.start()
	p := n.launch()
	eventually(t, "it waits", func() bool { return strings.Contains(p.stderr.String(), "Waiting for another") })
	p.stop()
	p.wantEnd(cli.StatusOK)
	if r := p.logged("stopped before the start"); r == nil {
		t.Error("not in the log")
	}
	if _, err := admin.NewClient(n.socket()).Status(t.Context()); err != nil {
		t.Errorf("the first one: %v", err)
	}
}

// Metrics over TLS have the server's own certificate, and are for whom an API server knows: here there is none.
func TestMetricsOverTLS(t *testing.T) {
	n := newNode(t)
	config := writeFile(t, filepath.Join(n.dir, "kubeconfig"), `{apiVersion: v1, kind: Config, current-context: c, contexts: [{name: c, context: {cluster: c, user: u}}],
clusters: [{name: c, cluster: {server: "http://127.0.0.1:1"}}], users: [{name: u, user: {}}]}`, 0o600)
	p := n.start("--metrics", "127.0.0.1:10278", "--kubeconfig", config)
	ca, err := os.ReadFile(n.pki.file("ca.crt"))
	must(t, err)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	client := http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: roots}}}
	ask := func(token string) (int, string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://127.0.0.1:10278/metrics", http.NoBody)
		must(t, err)
		if token != "" {
			req.Header.Set("Authorization", "Bearer "+token)
		}
		resp, err := client.Do(req)
		must(t, err)
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		must(t, err)
		return resp.StatusCode, string(body)
	}
	if code, body := ask(""); code != http.StatusUnauthorized || !strings.Contains(body, "show a token") {
		t.Errorf("%d %s", code, body)
	}
	if code, body := ask("x"); code != http.StatusServiceUnavailable || !strings.Contains(body, "does not say who has the token") {
		t.Errorf("%d %s", code, body)
	}
	p.stop()
	p.wantEnd(cli.StatusOK)
}

// Listeners and rules follow the node's addresses.
func TestFollowsAddresses(t *testing.T) {
	n := newNode(t)
	p := n.start()
	n.startAgent()
	n.online()
	addrs := func(want ...netip.Addr) {
		t.Helper()
		eventually(t, "node addresses", func() bool {
			v4, v6 := netip.Addr{}, netip.Addr{}
			pinned, err := redirect.ReadPinned(n.bpffs)
			must(t, err)
			for _, a := range pinned.NodeAddrs {
				if a.Is4() {
					v4 = a
				} else {
					v6 = a
				}
			}
			return v4 == want[0] && v6 == want[1]
		})
	}
	addrs(node4.Addr(), node6.Addr())
	must(t, delAddr(node4))
	addrs(netip.Addr{}, node6.Addr())
	moved := netip.MustParsePrefix("10.88.0.9/24")
	must(t, addAddr(moved))
	addrs(moved.Addr(), node6.Addr())
	must(t, delAddr(moved))
	must(t, addAddr(node4))
	addrs(node4.Addr(), node6.Addr())

	// An edge address that becomes the node's own is no target any more.
	own := netip.PrefixFrom(edge4, 32)
	must(t, addAddr(own))
	state := func(want string) {
		t.Helper()
		eventually(t, want, func() bool {
			list, err := p.control.Targets(context.Background())
			must(t, err)
			for _, target := range list.Targets {
				if target.Addr == edge4 {
					return target.State == want
				}
			}
			return false
		})
	}
	state(admin.TargetRefused)
	must(t, delAddr(own))
	state(admin.TargetOnline)
	connect(t, edge4).talk()
}

// The cgroup of --cgroup-root is removed and made anew under a running server, which is moved out for that and in again.
func TestCgroupMadeAnew(t *testing.T) {
	n := newNode(t)
	outer := os.Getenv(cgroupVar)
	root := filepath.Join(outer, "root")
	join := func(dir string) { must(t, os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0)) }
	must(t, os.Mkdir(root, 0o755))
	t.Cleanup(func() {
		join(outer)
		must(t, netlab.RemoveCgroup(root))
	})
	join(root)
	p := n.start("--cgroup-root", root)
	n.startAgent()
	n.online()
	old := connect(t, edge4)
	old.talk()

	join(outer)
	must(t, netlab.RemoveCgroup(root))
	must(t, os.Mkdir(root, 0o755))
	join(root)
	for _, addr := range []netip.Addr{edge4, edge6} {
		eventually(t, "intercepted again", func() bool {
			conn, err := dial(addr)
			if err != nil {
				return false
			}
			defer conn.Close()
			must(t, conn.SetDeadline(time.Now().Add(time.Second)))
			echo := make([]byte, 6)
			_, err = conn.Write([]byte("hello\n"))
			if err == nil {
				_, err = io.ReadFull(conn, echo)
			}
			return err == nil && string(echo) == "hello\n"
		})
	}
	eventually(t, "ready", func() bool { return p.ready() == "" })
	if p.logged("opening the redirect listeners anew") == nil {
		t.Error("not in the log")
	}
	old.talk() // open connections go on
}

func TestOptedOutProcessesGoDirect(t *testing.T) {
	n := newNode(t)
	n.start("--opt-out-cgroup", "private")
	n.startAgent()
	n.online()
	ask := func(folder string) string {
		t.Helper()
		group, err := os.Open(filepath.Join(os.Getenv(cgroupVar), folder))
		must(t, err)
		defer group.Close()
		cmd := exec.Command("bash", "-c", `exec 3<>/dev/tcp/10.99.0.5/10250 && echo hello >&3 && head -n1 <&3`)
		cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(group.Fd())}
		out, _ := cmd.CombinedOutput()
		return string(out)
	}
	for _, folder := range []string{"private", "public"} {
		dir := filepath.Join(os.Getenv(cgroupVar), folder)
		must(t, os.Mkdir(dir, 0o755))
		t.Cleanup(func() { must(t, netlab.RemoveCgroup(dir)) })
	}
	if got := ask("public"); got != "hello\n" {
		t.Errorf("in another cgroup: %s", got)
	}
	// The folder was not there at the start. Direct means what the node's own routes say: there is no way.
	eventually(t, "opted out", func() bool { return strings.Contains(ask("private"), "Network is unreachable") })
}
