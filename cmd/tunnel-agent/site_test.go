// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
	"github.com/edge-tunnel/edge-tunnel/pkg/identity"
	"github.com/edge-tunnel/edge-tunnel/pkg/intercept"
	"github.com/edge-tunnel/edge-tunnel/pkg/tunnel"
	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// pki makes a CA with the certificates of cloud-1, at 127.0.0.1 and as if it were behind 10.96.0.77, and edge-1.
func pki(t *testing.T) (dir string) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "pki")
	ca, err := identity.InitCA(dir, identity.CAOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ca.IssueServer("cloud-1", []string{"127.0.0.1", "10.96.0.77"}); err != nil {
		t.Fatal(err)
	}
	if _, err := ca.IssueAgent("edge-1", nil, false); err != nil {
		t.Fatal(err)
	}
	return dir
}

func files(dir, name string) identity.Files {
	return identity.Files{CA: filepath.Join(dir, "ca.crt"), Cert: filepath.Join(dir, name+".crt"), Key: filepath.Join(dir, name+".key")}
}

// cloud is a server without a kernel: whoever connects to it is taken to have connected to dst.
type cloud struct {
	tunnels *tunnel.Server
	conns   *intercept.Server
	addr    string // where agents log in
	entry   string // where clients connect

	mu  sync.Mutex
	dst netip.AddrPort
}

func startCloud(t *testing.T, dir string) *cloud {
	t.Helper()
	store, err := identity.Open(files(dir, "cloud-1"), identity.Options{Role: identity.RoleServer})
	if err != nil {
		t.Fatal(err)
	}
	c := &cloud{}
	c.tunnels, err = tunnel.NewServer(tunnel.ServerConfig{
		ID:  "cloud-1",
		TLS: store.ServerTLS(map[string]identity.Role{wire.ALPNAgent: identity.RoleAgent}),
		Authorize: func(state tls.ConnectionState) (tunnel.Identity, error) {
			peer, err := store.Peer(state)
			return tunnel.Identity{Name: peer.Name, Serial: peer.Serial, NotAfter: peer.NotAfter}, err
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	c.conns, err = intercept.New(intercept.Config{
		Origin: func(*net.TCPConn) (intercept.Origin, error) {
			c.mu.Lock()
			defer c.mu.Unlock()
			return intercept.Origin{Dst: c.dst, Comm: "test"}, nil
		},
		Lookup: func(netip.Addr) (string, bool) { return "edge-1", true },
		Open: func(ctx context.Context, node string, h wire.Header, _ intercept.Stream) (intercept.Stream, error) {
			s, err := c.tunnels.Open(ctx, node)
			if err != nil {
				return nil, err
			}
			return s, intercept.WriteHeader(ctx, s, h)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	logins, clients := listen(t), listen(t)
	c.addr, c.entry = logins.Addr().String(), clients.Addr().String()
	if err := c.conns.Add(clients); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := c.tunnels.Serve(ctx, logins); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		c.conns.Close()
		stop()
		wg.Wait()
	})
	return c
}

// aim makes dst what the next clients connected to.
func (c *cloud) aim(dst netip.AddrPort) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dst = dst
}

// dial connects a client to dst, through the tunnel. Its service must be the next to accept.
func (c *cloud) dial(t *testing.T, dst netip.AddrPort) *net.TCPConn {
	t.Helper()
	c.aim(dst)
	conn, err := net.Dial("tcp", c.entry)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	return conn.(*net.TCPConn)
}

// dialReset connects to dst and expects a reset, which may come before connect has returned.
func (c *cloud) dialReset(t *testing.T, dst netip.AddrPort) {
	t.Helper()
	c.aim(dst)
	conn, err := net.Dial("tcp", c.entry)
	if errors.Is(err, syscall.ECONNRESET) {
		return
	} else if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	expectReset(t, conn)
}

// agent is a running run.
type agent struct {
	t       *testing.T
	stop    context.CancelFunc
	status  chan int
	stderr  *lockedBuffer
	admin   string
	control *admin.Client
	sighup  chan struct{}
}

// startAgent runs the program with these flags, beside those it needs.
func startAgent(t *testing.T, dir, server string, flags ...string) *agent {
	t.Helper()
	f := files(dir, "edge-1")
	socket := filepath.Join(t.TempDir(), "agent.sock")
	a := &agent{t: t, status: make(chan int, 1), stderr: &lockedBuffer{}, control: admin.NewClient(socket), sighup: make(chan struct{})}
	ctx, stop := context.WithCancel(context.Background())
	a.stop = stop
	env := cli.Env{
		Name: "tunnel-agent", Stdout: io.Discard, Stderr: a.stderr, Getenv: func(string) string { return "" }, Reload: a.sighup,
		Args: append([]string{
			"--server", server, "--ca-cert", f.CA, "--cert", f.Cert, "--key", f.Key,
			"--admin", "127.0.0.1:0", "--control", socket, "--log-format", "json",
		}, flags...),
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		a.status <- cli.Run(ctx, env, run)
	}()
	t.Cleanup(func() {
		stop()
		<-done
		if t.Failed() {
			t.Logf("the agent's log:\n%s", a.stderr)
		}
	})
	eventually(t, "agent started", func() bool {
		r := a.logged("started")
		if r != nil {
			a.admin, _ = r["admin"].(string)
		}
		return r != nil
	})
	return a
}

// logged is the last log record with this message.
func (a *agent) logged(msg string) (found map[string]any) {
	for line := range strings.Lines(a.stderr.String()) {
		var r map[string]any
		if json.Unmarshal([]byte(line), &r) == nil && r["msg"] == msg {
			found = r
		}
	}
	return found
}

// get is an answer of the admin address.
func (a *agent) get(path string) (status int, body string) {
	a.t.Helper()
	client := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get(fmt.Sprintf("http://%s%s", a.admin, path))
	if err != nil {
		a.t.Fatal(err)
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		a.t.Fatal(err)
	}
	return resp.StatusCode, string(raw)
}

func (a *agent) waitReady() {
	a.t.Helper()
	eventually(a.t, "ready", func() bool {
		status, _ := a.get("/readyz")
		return status == http.StatusOK
	})
}

// ended waits for the exit status.
func (a *agent) ended() int {
	a.t.Helper()
	select {
	case status := <-a.status:
		return status
	case <-time.After(20 * time.Second):
		a.t.Fatal("the agent does not end")
		return -1
	}
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for range 2000 {
		if ok() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("%s: did not happen", what)
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func writeFile(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}
