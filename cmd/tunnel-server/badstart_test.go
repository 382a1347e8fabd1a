// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
	"github.com/edge-tunnel/edge-tunnel/pkg/redirect"
)

// badStart is a start that has to fail, in one line, with a hint.
type badStart struct {
	what   string
	args   []string
	status int
	want   string // in the line after "error: ", a regular expression
	hint   string // likewise
}

func badStarts(t *testing.T, n *node) []badStart {
	t.Helper()
	file := func(name, text string, mode os.FileMode) string {
		return writeFile(t, filepath.Join(n.dir, name), text, mode)
	}
	read := func(path string) string {
		text, err := os.ReadFile(path)
		must(t, err)
		return string(text)
	}
	key := read(n.pki.file("cloud-1.key"))
	other, old := newPKI(t), newPKIAt(t, time.Now().AddDate(-2, 0, 0))
	listen := func(addr string) string {
		var config net.ListenConfig
		config.SetMultipathTCP(false)
		ln, err := config.Listen(context.Background(), "tcp", addr)
		must(t, err)
		t.Cleanup(func() { ln.Close() })
		return ln.Addr().String()
	}
	taken := listen("127.0.0.1:0")
	listen("127.0.0.1:20003")
	listen(net.JoinHostPort(node6.Addr().String(), "21007"))
	busy, err := admin.ListenControl(t.Context(), filepath.Join(n.dir, "busy.sock"))
	must(t, err)
	t.Cleanup(func() { busy.Close() })

	return []badStart{
		{"unknown flag", []string{"--no-such"}, cli.StatusUsage, `unknown flag --no-such`, `tunnel-server --help`},
		{"no certificate", []string{"--cert", n.pki.file("none.crt")}, cli.StatusFailed, `certificate .*none.crt: no such file`, `.`},
		{"no key", []string{"--key", n.pki.file("none.key")}, cli.StatusFailed, `key .*none.key: no such file`, `.`},
		{"no CA", []string{"--ca-cert", n.pki.file("none.crt")}, cli.StatusFailed, `CA bundle .*none.crt: no such file`, `.`},
		{"CA is garbage", []string{"--ca-cert", file("ca.crt", "garbage", 0o644)}, cli.StatusFailed, `CA bundle .*ca.crt: `, `.`},
		{"key is garbage", []string{"--key", file("garbage.key", "garbage", 0o600)}, cli.StatusFailed, `key .*garbage.key: `, `.`},
		{"key is a folder", []string{"--key", n.dir}, cli.StatusFailed, `key .*: `, `.`},
		{"key is for everybody", []string{"--key", file("open.key", key, 0o644)}, cli.StatusFailed, `open.key: mode 0644 lets others`, `chmod`},
		{"key is another's", []string{"--key", n.pki.file("edge-1.key")}, cli.StatusFailed, `edge-1.key`, `.`},
		{"certificate of an agent", []string{"--cert", n.pki.file("edge-1.crt"), "--key", n.pki.file("edge-1.key")}, cli.StatusFailed, `edge-1.crt: .*edge-tunnel:servers`, `.`},
		{"certificate of another CA", []string{"--ca-cert", other.file("ca.crt")}, cli.StatusFailed, `cloud-1.crt: `, `is the bundle of the CA that issued it`},
		{"certificate has expired", []string{"--ca-cert", old.file("ca.crt"), "--cert", old.file("cloud-1.crt"), "--key", old.file("cloud-1.key")},
			cli.StatusFailed, `cloud-1.crt: expired`, `issue a new one`},
		{"deny file is garbage", []string{"--deny-file", file("deny", "no name!\n", 0o600)}, cli.StatusFailed, `deny file .*deny: `, `.`},
		{"tunnel port in use", []string{"--listen-tunnel", taken}, cli.StatusFailed, `--listen-tunnel: ` + taken + ` is in use`, `ss -ltnp .* --listen-tunnel chooses another`},
		{"tunnel address of another host", []string{"--listen-tunnel", "192.0.2.7:1"}, cli.StatusFailed, `--listen-tunnel: .*cannot assign`, `an address of this host`},
		{"admin port in use", []string{"--admin", taken}, cli.StatusFailed, `--admin: ` + taken + ` is in use`, `--admin chooses another`},
		{"redirect port in use", []string{"--redirect-port", "20000"}, cli.StatusFailed, `listen on 127.0.0.1:20003: .*in use`, `:20003.*--redirect-port`},
		{"redirect port in use on the node's address", []string{"--redirect-port", "21000"}, cli.StatusFailed, `listen on \[fd88::1\]:21007: .*in use`, `--redirect-port`},
		{"control socket in use", []string{"--control", filepath.Join(n.dir, "busy.sock")}, cli.StatusFailed, `busy.sock: another daemon answers`, `stop the other daemon`},
		{"control socket is a file", []string{"--control", file("file.sock", "precious", 0o600)}, cli.StatusFailed, `not a socket`, `remove the file`},
		{"bpffs is not there", []string{"--bpffs", "/none"}, cli.StatusFailed, `use /none: no such file`, `mount -t bpf bpf /none`},
		{"bpffs is not mounted", []string{"--bpffs", n.dir}, cli.StatusFailed, `not a bpf filesystem`, `mount -t bpf bpf ` + n.dir},
		{"cgroup root is not there", []string{"--cgroup-root", "/none"}, cli.StatusFailed, `use the cgroup /none: .*no such file`, `--cgroup-root has to be`},
		{"cgroup root is no cgroup2", []string{"--cgroup-root", n.dir}, cli.StatusFailed, `not a folder of the cgroup2 hierarchy`, `/sys/fs/cgroup/unified`},
		{"state dir cannot be made", []string{"--state-dir", filepath.Join(file("plain", "", 0o600), "state")}, cli.StatusFailed, `make state folder: .*not a directory`, `--state-dir must be`},
		{"node IP of another host", []string{"--node-ip", "192.0.2.7"}, cli.StatusFailed, `192.0.2.7:10270: .*cannot assign`, `check --node-ip`},
	}
}

var oneProblem = regexp.MustCompile(`^error: ([^\n]+)\nhint: ([^\n]+)\n$`)

func TestBadStarts(t *testing.T) {
	n := newNode(t)
	for _, c := range badStarts(t, n) {
		t.Run(c.what, func(t *testing.T) {
			n.t = t
			before := goleak.IgnoreCurrent()
			var stderr bytes.Buffer
			env := cli.Env{Name: "tunnel-server", Args: n.args(c.args...), Stdout: io.Discard, Stderr: &stderr, Getenv: func(string) string { return "" }}
			status := cli.Run(t.Context(), env, run)
			// Before its error the server may have logged something, as JSON.
			said := ""
			for line := range strings.Lines(stderr.String()) {
				if !strings.HasPrefix(line, "{") {
					said += line
				}
			}
			m := oneProblem.FindStringSubmatch(said)
			if status != c.status || m == nil || !regexp.MustCompile(c.want).MatchString(m[1]) || !regexp.MustCompile(c.hint).MatchString(m[2]) {
				t.Errorf("status %d and\n%swant %d, error: %s, hint: %s", status, &stderr, c.status, c.want, c.hint)
			}
			n.wantNothingLeft()
			goleak.VerifyNone(t, before)
		})
	}
	n.t = t
	if text, err := os.ReadFile(filepath.Join(n.dir, "file.sock")); string(text) != "precious" {
		t.Errorf("a file was taken for a socket: %q, %v", text, err)
	}
}

// Where a predecessor's programs are in force they stay so, whatever the successor stumbles over.
func TestBadStartsKeepThePredecessorsPins(t *testing.T) {
	n := newNode(t)
	p := n.start()
	n.startAgent()
	n.online()
	p.stop()
	p.wantEnd(cli.StatusOK)
	before, err := redirect.ReadPinned(n.bpffs)
	must(t, err)
	for _, c := range badStarts(t, n) {
		if c.what == "bpffs is not mounted" || c.what == "control socket is a file" {
			continue
		}
		env := cli.Env{Name: "tunnel-server", Args: n.args(append(c.args, "--tunneled-ports", "9999", "--intercept", "host")...), Stdout: io.Discard, Stderr: io.Discard, Getenv: func(string) string { return "" }}
		if status := cli.Run(t.Context(), env, run); status != c.status {
			t.Errorf("%s: status %d", c.what, status)
		}
		pinned, err := redirect.ReadPinned(n.bpffs)
		must(t, err)
		if len(pinned.Detached) != 0 || len(pinned.Targets) != 2 || n.attached() != 7 {
			t.Fatalf("%s: %+v, %d programs", c.what, pinned, n.attached())
		}
		if pinned.RedirectPort != before.RedirectPort || pinned.HostOnly || !slices.Equal(pinned.Ports, before.Ports) || !slices.Equal(pinned.NodeAddrs, before.NodeAddrs) {
			t.Fatalf("%s: %+v, want the settings of %+v", c.what, pinned, before)
		}
	}
}

// A state folder that cannot be written is no reason not to serve, but it is told.
func TestBadStateDirIsReported(t *testing.T) {
	n := newNode(t)
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "targets.json"), "{broken", 0o600)
	p := n.start("--state-dir", dir)
	if r := p.logged("stored targets are unreadable and were set aside"); r == nil {
		t.Error("a corrupt file is not in the log")
	}
	if kept, _ := filepath.Glob(filepath.Join(dir, "targets.json.corrupt-*")); len(kept) != 1 {
		t.Errorf("kept %v", kept)
	}
	p.stop()
	p.wantEnd(cli.StatusOK)

	dir = t.TempDir()
	must(t, unix.Mount(dir, dir, "", unix.MS_BIND, ""))
	t.Cleanup(func() { must(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	must(t, unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""))
	p = n.start("--state-dir", dir)
	n.startAgent()
	n.online()
	connect(t, edge4).talk()
	eventually(t, "failure in the log", func() bool { return p.logged("cannot save known targets; a reboot now would lose changes") != nil })
	if _, metrics := get(t, "/metrics"); !strings.Contains(metrics, "edge_tunnel_state_unsaved 1\n") {
		t.Error("not in the metrics")
	}
	p.stop()
	p.wantEnd(cli.StatusFailed)
	if !strings.Contains(p.stderr.String(), "error: save known targets: ") {
		t.Error("the end says nothing about it")
	}
}
