// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
	"github.com/edge-tunnel/edge-tunnel/pkg/deliver"
	"github.com/edge-tunnel/edge-tunnel/pkg/identity"
	"github.com/edge-tunnel/edge-tunnel/pkg/tunnel"
	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

// natAddr is an address that the cloud knows the node by, and that no machine has.
var natAddr = netip.MustParseAddr("198.51.100.7")

func port(ln net.Listener) uint16 { return ln.Addr().(*net.TCPAddr).AddrPort().Port() }

func accept(t *testing.T, ln net.Listener) *net.TCPConn {
	t.Helper()
	ln.(*net.TCPListener).SetDeadline(time.Now().Add(10 * time.Second))
	conn, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	return conn.(*net.TCPConn)
}

func expect(t *testing.T, r io.Reader, want string) {
	t.Helper()
	buf := make([]byte, len(want))
	if n, err := io.ReadFull(r, buf); err != nil || string(buf) != want {
		t.Fatalf("read %q, %v, want %q", buf[:n], err, want)
	}
}

func expectReset(t *testing.T, r io.Reader) {
	t.Helper()
	if _, err := io.Copy(io.Discard, r); !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("read ended with %v, want a reset", err)
	}
}

func send(t *testing.T, w io.Writer, text string) {
	t.Helper()
	if _, err := io.WriteString(w, text); err != nil {
		t.Fatal(err)
	}
}

// The whole path: client, intercept, a real tunnel with real certificates, the agent, its service.
func TestDelivers(t *testing.T) {
	dir := pki(t)
	cloud := startCloud(t, dir)
	service := listen(t)
	a := startAgent(t, dir, cloud.addr, "--localhost-proxy-ports", fmt.Sprint(port(service)))
	a.waitReady()

	dst := netip.AddrPortFrom(natAddr, port(service))
	client := cloud.dial(t, dst)
	far := accept(t, service)
	send(t, far, "220 server first\r\n")
	expect(t, client, "220 server first\r\n")
	send(t, client, "hello")
	expect(t, far, "hello")

	list, err := a.control.Connections(context.Background())
	if err != nil || len(list.Connections) != 1 {
		t.Fatal(list, err)
	}
	if c := list.Connections[0]; c.Node != "edge-1" || c.Destination != dst.String() || c.Dialed != service.Addr().String() ||
		c.Source != client.LocalAddr().String() || c.Trace != cloud.conns.Connections()[0].Trace {
		t.Errorf("connection %+v", c)
	}

	client.CloseWrite()
	if n, err := far.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Fatal("half-close did not arrive", n, err)
	}
	send(t, far, "late")
	far.Close()
	expect(t, client, "late")
	if n, err := client.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Fatal("end of data did not arrive", n, err)
	}
	eventually(t, "access record", func() bool { return a.logged("connection") != nil })
	if r := a.logged("connection"); r["reason"] != "closed" || r["sent"] != 5.0 || r["received"] != 22.0 || r["dialed"] != service.Addr().String() ||
		r["server"] != cloud.addr {
		t.Errorf("record %v", r)
	}

	// A client that resets, then a service that does, then a port that is closed, then one that is not allowed.
	client = cloud.dial(t, dst)
	far = accept(t, service)
	send(t, far, "x")
	expect(t, client, "x")
	client.SetLinger(0)
	client.Close()
	expectReset(t, far)
	client = cloud.dial(t, dst)
	far = accept(t, service)
	send(t, far, "x") // a reset may overtake the status that goes before it
	expect(t, client, "x")
	far.SetLinger(0)
	far.Close()
	expectReset(t, client)
	cloud.dialReset(t, netip.AddrPortFrom(natAddr, port(service)+1))
	service.Close()
	cloud.dialReset(t, dst)
	eventually(t, "all ended", func() bool { return cloud.conns.Stats().Open == 0 })
	for reason, want := range map[string]uint64{"closed": 1, "client_reset": 1, "remote_reset": 1, "refused": 1, "not_allowed": 1} {
		if got := cloud.conns.Stats().Ended[reason]; got != want {
			t.Errorf("%s: %d connections, want %d", reason, got, want)
		}
	}
	for _, line := range []string{
		`edge_tunnel_agent_connections_ended_total{reason="refused"} 1`, `edge_tunnel_agent_tunnels{state="up"} 1`,
		`edge_tunnel_agent_connections 0`,
	} {
		eventually(t, line, func() bool {
			_, metrics := a.get("/metrics")
			return strings.Contains(metrics, line+"\n")
		})
	}
}

func TestReadiness(t *testing.T) {
	dir := pki(t)
	refusing := listen(t)
	refusing.Close()
	a := startAgent(t, dir, refusing.Addr().String())
	eventually(t, "reason named", func() bool {
		status, body := a.get("/readyz")
		return status == http.StatusServiceUnavailable && strings.Contains(body, "[-]tunnel: no tunnel is up ("+refusing.Addr().String()) &&
			strings.Contains(body, "connection refused") && strings.Contains(body, "[+]certificate ok")
	})
	if status, _ := a.get("/healthz"); status != http.StatusOK {
		t.Errorf("healthz is %d", status)
	}
	s, err := a.control.Status(context.Background())
	if err != nil || s.Ready || s.Name != "edge-1" || s.Role != admin.RoleAgent || s.Agent == nil || s.Tunnels != 0 {
		t.Errorf("status %+v, %v", s, err)
	}
	tunnels, err := a.control.Tunnels(context.Background())
	if err != nil || len(tunnels.Tunnels) != 2 || !strings.Contains(tunnels.Tunnels[0].Error+tunnels.Tunnels[1].Error, "refused") {
		t.Errorf("tunnels %+v, %v", tunnels, err)
	}
}

func TestStop(t *testing.T) {
	dir := pki(t)
	cloud := startCloud(t, dir)
	service := listen(t)
	dst := netip.AddrPortFrom(natAddr, port(service))

	t.Run("open connections finish", func(t *testing.T) {
		a := startAgent(t, dir, cloud.addr, "--localhost-proxy-ports", fmt.Sprint(port(service)))
		a.waitReady()
		client := cloud.dial(t, dst)
		far := accept(t, service)
		a.stop()
		eventually(t, "not ready", func() bool {
			status, body := a.get("/readyz")
			return status == http.StatusServiceUnavailable && strings.Contains(body, "[-]accepting")
		})
		cloud.dialReset(t, dst) // no new ones
		send(t, client, "goes on")
		expect(t, far, "goes on")
		client.Close()
		far.Close()
		if status := a.ended(); status != cli.StatusOK {
			t.Errorf("exit status %d", status)
		}
		if r := a.logged("stopped"); r["reset"] != 0.0 {
			t.Errorf("log %v", r)
		}
	})
	t.Run("as far as there is time", func(t *testing.T) {
		a := startAgent(t, dir, cloud.addr, "--localhost-proxy-ports", fmt.Sprint(port(service)), "--drain-timeout", "50ms")
		a.waitReady()
		eventually(t, "the new agent's tunnel", func() bool { return a.logged("tunnel up") != nil })
		client := cloud.dial(t, dst)
		far := accept(t, service)
		if err := a.control.Drain(context.Background()); err != nil {
			t.Fatal(err)
		}
		if status := a.ended(); status != cli.StatusOK {
			t.Errorf("exit status %d", status)
		}
		expectReset(t, client)
		expectReset(t, far)
		if r := a.logged("stopped"); r["reset"] != 1.0 {
			t.Errorf("log %v", r)
		}
	})
}

// A server that gets into the deny file loses its tunnel; one that leaves it gets it back.
func TestDenyFileIsObeyed(t *testing.T) {
	dir := pki(t)
	cloud := startCloud(t, dir)
	deny := filepath.Join(dir, "deny")
	writeFile(t, deny, "# nobody\n")
	service := listen(t)
	a := startAgent(t, dir, cloud.addr, "--deny-file", deny, "--localhost-proxy-ports", fmt.Sprint(port(service)))
	a.waitReady()
	client := cloud.dial(t, netip.AddrPortFrom(natAddr, port(service)))
	far := accept(t, service)
	send(t, far, "x")
	expect(t, client, "x")
	writeFile(t, deny, "cloud-1\n")
	a.sighup <- struct{}{}
	eventually(t, "tunnel dropped", func() bool {
		status, body := a.get("/readyz")
		return status == http.StatusServiceUnavailable && strings.Contains(body, "denied")
	})
	expectReset(t, client)
	expectReset(t, far)
	eventually(t, "both ends say why", func() bool {
		return cloud.conns.Stats().Ended["tunnel_lost"] == 1 && a.logged("connection")["reason"] == "tunnel_lost"
	})
	writeFile(t, deny, "# nobody\n")
	a.sighup <- struct{}{}
	a.waitReady()

	writeFile(t, deny, "not a name!\n")
	a.sighup <- struct{}{}
	eventually(t, "bad file reported", func() bool {
		s, err := a.control.Status(context.Background())
		return err == nil && strings.Contains(s.Certificate.Error, "deny file") && s.Ready
	})
}

func TestMetricsAreNamedWell(t *testing.T) {
	dir := pki(t)
	store, err := identity.Open(files(dir, "edge-1"), identity.Options{Role: identity.RoleAgent})
	if err != nil {
		t.Fatal(err)
	}
	handler, err := deliver.New(deliver.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer handler.Close()
	tunnels, err := tunnel.NewAgent(tunnel.AgentConfig{
		Servers: []string{"127.0.0.1:1"},
		TLS:     func(string) *tls.Config { return nil },
		Handle:  func(context.Context, *tunnel.Stream, wire.Header) {},
	})
	if err != nil {
		t.Fatal(err)
	}
	a := &app{store: store, handler: handler, agent: tunnels, network: newNetwork(slog.New(slog.DiscardHandler)),
		loopback: newLoopback(nil, t.TempDir(), slog.New(slog.DiscardHandler))}
	for _, m := range a.metrics() {
		if err := m.Validate(); err != nil {
			t.Error(err)
		}
	}
}

func TestBadStarts(t *testing.T) {
	dir := pki(t)
	f := files(dir, "edge-1")
	taken := listen(t)
	good := func(more ...string) []string {
		return append([]string{"--server", "127.0.0.1:1", "--ca-cert", f.CA, "--cert", f.Cert, "--key", f.Key,
			"--admin", "127.0.0.1:0", "--control", filepath.Join(dir, "agent.sock")}, more...)
	}
	socket := filepath.Join(t.TempDir(), "busy.sock")
	busy, err := admin.ListenControl(context.Background(), socket)
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	for _, c := range []struct {
		args   []string
		status int
		want   string // in the message
	}{
		{nil, cli.StatusUsage, "--server is required"},
		{good("--allow", "printer:80"), cli.StatusUsage, "names are not looked up"},
		{good("--allow", "10.0.0.1"), cli.StatusUsage, "expected ADDR-OR-CIDR:PORTS"},
		{good("--tunnels", "0"), cli.StatusUsage, "not between 1 and 16"},
		{good("--drain-timeout", "-1s"), cli.StatusUsage, "is negative"},
		{good("--localhost-proxy-ports", "http"), cli.StatusUsage, "--localhost-proxy-ports"},
		{good("--server-service", "a/b"), cli.StatusUsage, "cannot be given with --server"},
		{[]string{"--kubeconfig", "none", "--ca-cert", f.CA, "--cert", f.Cert, "--key", f.Key, "--server-service", "x-tunnel-server-svc"}, cli.StatusUsage, "is not NAMESPACE/NAME"},
		{[]string{"--kubeconfig", "none", "--ca-cert", f.CA, "--cert", f.Cert, "--key", f.Key, "--state-dir", "x"}, cli.StatusUsage, "--state-dir: \"x\" is relative"},
		{[]string{"--kubeconfig", "none", "--ca-cert", f.CA, "--cert", f.Cert, "--key", f.Key}, cli.StatusFailed, "hint: outside of a pod"},
		{good("--config-dir", "config"), cli.StatusUsage, "is relative"},
		{good("--server", "not a host"), cli.StatusUsage, "--server"},
		{good("--cert", filepath.Join(dir, "missing.crt")), cli.StatusFailed, "no such file"},
		{good("--cert", filepath.Join(dir, "cloud-1.crt"), "--key", filepath.Join(dir, "cloud-1.key")), cli.StatusFailed, "error: "},
		{[]string{"--server", "127.0.0.1:1", "--ca-cert", f.CA}, cli.StatusUsage, "--cert is required"},
		{good("--certificate-from", "kubernetes", "--node-name", "edge-1"), cli.StatusUsage, "--cert and --key cannot be given"},
		{[]string{"--server", "127.0.0.1:1", "--ca-cert", f.CA, "--certificate-from", "kubernetes"}, cli.StatusUsage, "--node-name"},
		{[]string{"--server", "127.0.0.1:1", "--ca-cert", f.CA, "--certificate-from", "kubernetes", "--node-name", "a", "--certificate-dir", "x"}, cli.StatusUsage,
			"is relative"},
		{[]string{"--server", "127.0.0.1:1", "--ca-cert", f.CA, "--certificate-from", "kubernetes", "--node-name", "a"}, cli.StatusFailed, "hint: outside of a pod"},
		{good("--admin", taken.Addr().String()), cli.StatusFailed, "--admin chooses another"},
		{good("--admin", "192.0.2.1:10266"), cli.StatusFailed, "needs an address of this host"},
		{good("--control", socket), cli.StatusFailed, "hint: "},
	} {
		var stderr lockedBuffer
		env := cli.Env{Name: "tunnel-agent", Args: c.args, Stdout: io.Discard, Stderr: &stderr, Getenv: func(string) string { return "" }}
		status := cli.Run(context.Background(), env, run)
		if out := stderr.String(); status != c.status || !strings.Contains(out, c.want) || !strings.Contains(out, "error: ") {
			t.Errorf("%q: status %d and\n%swant status %d and %q", c.args, status, out, c.status, c.want)
		}
	}
}
