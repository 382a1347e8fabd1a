// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
	"github.com/edge-tunnel/edge-tunnel/pkg/deliver"
	"github.com/edge-tunnel/edge-tunnel/pkg/identity"
	"github.com/edge-tunnel/edge-tunnel/pkg/redirect"
	"github.com/edge-tunnel/edge-tunnel/pkg/tunnel"
	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

// edge4 and edge6 are edge-1's addresses. No machine has them, and there is no way to them.
var (
	edge4 = netip.MustParseAddr("10.99.0.5")
	edge6 = netip.MustParseAddr("fd99::5")
)

// pki is a folder with a CA and the certificates of cloud-1 and edge-1.
type pki struct{ dir string }

func newPKI(t testing.TB) pki { return newPKIAt(t, time.Now()) }

func newPKIAt(t testing.TB, now time.Time) pki {
	t.Helper()
	p := pki{filepath.Join(t.TempDir(), "pki")}
	ca, err := identity.InitCA(p.dir, identity.CAOptions{Clock: func() time.Time { return now }})
	must(t, err)
	_, err = ca.IssueServer("cloud-1", []string{"127.0.0.1"})
	must(t, err)
	_, err = ca.IssueAgent("edge-1", []netip.Addr{edge4, edge6}, false)
	must(t, err)
	return p
}

func (p pki) file(name string) string { return filepath.Join(p.dir, name) }

func (p pki) files(name string) identity.Files {
	return identity.Files{CA: p.file("ca.crt"), Cert: p.file(name + ".crt"), Key: p.file(name + ".key")}
}

// node is what one machine keeps for its tunnel-server, from start to start.
type node struct {
	t     *testing.T
	pki   pki
	bpffs string
	dir   string // control socket and whatever a test puts there
}

func newNode(t *testing.T) *node {
	t.Helper()
	needsRoot(t)
	n := &node{t: t, pki: newPKI(t), bpffs: t.TempDir(), dir: t.TempDir()}
	must(t, unix.Mount("bpf", n.bpffs, "bpf", 0, ""))
	t.Cleanup(func() {
		must(t, redirect.Cleanup(n.bpffs))
		must(t, unix.Unmount(n.bpffs, unix.MNT_DETACH))
	})
	return n
}

func (n *node) socket() string { return filepath.Join(n.dir, "server.sock") }

// args are those that every start needs; a later flag wins.
func (n *node) args(more ...string) []string {
	f := n.pki.files("cloud-1")
	return append([]string{
		"--ca-cert", f.CA, "--cert", f.Cert, "--key", f.Key, "--bpffs", n.bpffs, "--cgroup-root", os.Getenv(cgroupVar),
		"--control", n.socket(), "--log-format", "json",
	}, more...)
}

// attached are the programs on the hooks of the node's cgroup, anybody's.
func (n *node) attached() (count int) {
	n.t.Helper()
	group, err := os.Open(os.Getenv(cgroupVar))
	must(n.t, err)
	defer group.Close()
	for _, hook := range []ebpf.AttachType{
		ebpf.AttachCGroupSockOps, ebpf.AttachCgroupInet4GetPeername, ebpf.AttachCgroupInet6GetPeername,
		ebpf.AttachCGroupInet4Bind, ebpf.AttachCGroupInet6Bind, ebpf.AttachCGroupInet4Connect, ebpf.AttachCGroupInet6Connect,
	} {
		list, err := link.QueryPrograms(link.QueryOptions{Target: int(group.Fd()), Attach: hook})
		must(n.t, err)
		count += len(list.Programs)
	}
	return count
}

// wantNothingLeft is what a first start that failed has to leave.
func (n *node) wantNothingLeft() {
	n.t.Helper()
	if _, err := os.Lstat(filepath.Join(n.bpffs, "edge-tunnel")); !errors.Is(err, fs.ErrNotExist) {
		n.t.Errorf("pins are left (%v)", err)
	}
	if count := n.attached(); count != 0 {
		n.t.Errorf("%d programs are left", count)
	}
	if _, err := os.Lstat(n.socket()); !errors.Is(err, fs.ErrNotExist) {
		n.t.Errorf("the control socket is left (%v)", err)
	}
}

// proc is a running run.
type proc struct {
	t       *testing.T
	stop    context.CancelFunc
	status  chan int
	stderr  *lockedBuffer
	control *admin.Client
	sighup  chan struct{}
}

// launch runs the program, and does not wait for anything.
func (n *node) launch(flags ...string) *proc {
	t := n.t
	t.Helper()
	p := &proc{t: t, status: make(chan int, 1), stderr: &lockedBuffer{}, control: admin.NewClient(n.socket()), sighup: make(chan struct{})}
	ctx, stop := context.WithCancel(context.Background())
	p.stop = stop
	env := cli.Env{
		Name: "tunnel-server", Args: n.args(flags...), Stdin: strings.NewReader(""), Stdout: io.Discard, Stderr: p.stderr, Reload: p.sighup,
		Getenv: func(string) string { return "" },
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		p.status <- cli.Run(ctx, env, run)
	}()
	t.Cleanup(func() {
		stop()
		<-done
		if t.Failed() {
			t.Logf("the server's log:\n%s", p.stderr)
		}
	})
	return p
}

// start runs it until it is ready.
func (n *node) start(flags ...string) *proc {
	n.t.Helper()
	p := n.launch(flags...)
	eventually(n.t, "ready", func() bool {
		if len(p.status) > 0 {
			n.t.Fatal("the server has ended")
		}
		return p.logged("started") != nil && p.ready() == ""
	})
	return p
}

// ready is empty, or why it is not.
func (p *proc) ready() string {
	code, body := get(p.t, "/readyz")
	if code == http.StatusOK {
		return ""
	}
	return body
}

func get(t *testing.T, path string) (code int, body string) {
	t.Helper()
	client := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get("http://127.0.0.1:10265" + path)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	must(t, err)
	return resp.StatusCode, string(raw)
}

// logged is the last log record with this message.
func (p *proc) logged(msg string) (found map[string]any) {
	for line := range strings.Lines(p.stderr.String()) {
		var r map[string]any
		if json.Unmarshal([]byte(line), &r) == nil && r["msg"] == msg {
			found = r
		}
	}
	return found
}

// ended waits for the exit status.
func (p *proc) ended() int {
	p.t.Helper()
	select {
	case status := <-p.status:
		return status
	case <-time.After(20 * time.Second):
		p.t.Fatal("the server does not end")
		return -1
	}
}

func (p *proc) wantEnd(status int) {
	p.t.Helper()
	if got := p.ended(); got != status {
		p.t.Errorf("exit status %d, want %d", got, status)
	}
}

// startAgent runs edge-1's agent, and an echo on the ports that it delivers to.
func (n *node) startAgent() {
	t := n.t
	t.Helper()
	var wg sync.WaitGroup
	ctx, stop := context.WithCancel(context.Background())
	for _, addr := range []string{"127.0.0.1:10250", "[::1]:10250"} {
		var config net.ListenConfig
		config.SetMultipathTCP(false)
		ln, err := config.Listen(ctx, "tcp", addr)
		must(t, err)
		context.AfterFunc(ctx, func() { ln.Close() })
		wg.Go(func() {
			for {
				conn, err := ln.Accept()
				if err != nil {
					return
				}
				wg.Go(func() {
					defer conn.Close()
					io.Copy(conn, conn)
				})
			}
		})
	}
	store, err := identity.Open(n.pki.files("edge-1"), identity.Options{Role: identity.RoleAgent})
	must(t, err)
	handler, err := deliver.New(deliver.Config{Policy: deliver.Policy{Own: func(netip.Addr) bool { return false }, Loopback: func(port uint16) bool { return port == 10250 }}})
	must(t, err)
	agent, err := tunnel.NewAgent(tunnel.AgentConfig{
		Servers: []string{"127.0.0.1:10262"},
		TLS:     func(string) *tls.Config { return store.ClientTLS("127.0.0.1", wire.ALPNAgent) },
		Verify: func(state tls.ConnectionState) error {
			_, err := store.Peer(state)
			return err
		},
		Handle:   func(ctx context.Context, s *tunnel.Stream, h wire.Header) { handler.Handle(ctx, "cloud-1", s, h) },
		Software: "test",
	})
	must(t, err)
	wg.Go(func() {
		if err := agent.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		handler.Close()
		stop()
		wg.Wait()
	})
}

// online waits until edge-1's addresses are redirected.
func (n *node) online() {
	n.t.Helper()
	eventually(n.t, "edge-1 online", func() bool {
		pinned, err := redirect.ReadPinned(n.bpffs)
		must(n.t, err)
		return len(pinned.Targets) == 2 && !slices.ContainsFunc(pinned.Targets, func(t redirect.Target) bool { return t.State != redirect.Online })
	})
}

// client is a connection to an edge address.
type client struct {
	net.Conn
	t *testing.T
	r *bufio.Reader
}

func dial(addr netip.Addr) (net.Conn, error) {
	d := net.Dialer{Timeout: 5 * time.Second}
	d.SetMultipathTCP(false)
	return d.Dial("tcp", netip.AddrPortFrom(addr, 10250).String())
}

func connect(t *testing.T, addr netip.Addr) *client {
	t.Helper()
	conn, err := dial(addr)
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	must(t, conn.SetDeadline(time.Now().Add(20*time.Second)))
	return &client{conn, t, bufio.NewReader(conn)}
}

// talk sends a line, and wants it back.
func (c *client) talk() {
	c.t.Helper()
	_, err := fmt.Fprintln(c, "hello")
	must(c.t, err)
	if line, err := c.r.ReadString('\n'); line != "hello\n" {
		c.t.Fatalf("%q, %v", line, err)
	}
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
