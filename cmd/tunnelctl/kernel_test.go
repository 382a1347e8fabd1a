// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
	"github.com/edge-tunnel/edge-tunnel/pkg/redirect"
)

// called runs tunnelctl in this process.
func called(t *testing.T, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	status = cli.Run(t.Context(), cli.Env{Name: "tunnelctl", Args: args, Stdin: strings.NewReader(""), Stdout: &out, Stderr: &errs}, run)
	return status, out.String(), errs.String()
}

// While no server runs, targets come from the kernel, and cleanup takes them out; while one runs, it does not.
func TestWithoutAServer(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount a bpf filesystem")
	}
	bpffs, absent := t.TempDir(), t.TempDir()+"/absent.sock"
	status, out, errs := called(t, "mount-bpffs", "--bpffs", bpffs)
	if status != 0 || out != "mounted a bpf filesystem at "+bpffs+"\n" {
		t.Fatalf("mount-bpffs: %d %s%s", status, out, errs)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(bpffs, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	status, out, errs = called(t, "mount-bpffs", "--bpffs", bpffs)
	if status != 0 || out != bpffs+" is a bpf filesystem already\n" {
		t.Errorf("mount-bpffs once more: %d %s%s", status, out, errs)
	}

	status, out, errs = called(t, "cleanup", "--bpffs", bpffs)
	if status != 0 || out != "nothing of edge-tunnel is left in "+bpffs+"\n" {
		t.Errorf("cleanup of nothing: %d %s%s", status, out, errs)
	}
	status, _, errs = called(t, "targets", "--bpffs", bpffs, "--control", absent)
	if status != 1 || !strings.Contains(errs, "no daemon is running") || !strings.Contains(errs, "not installed") {
		t.Errorf("targets of nothing: %d %s", status, errs)
	}

	kernel, err := redirect.Open(t.Context(), redirect.Options{BPFFS: bpffs, CgroupRoot: emptyCgroup(t)})
	if err != nil {
		t.Fatal(err)
	}
	if err := kernel.SetTargets([]redirect.Target{
		{Addr: netip.MustParseAddr("2001:db8::1"), Node: "edge-2", State: redirect.Ambiguous},
		{Addr: netip.MustParseAddr("10.99.1.10"), Node: "edge-1", State: redirect.Offline},
	}); err != nil {
		t.Fatal(err)
	}
	if err := kernel.Attach(); err != nil {
		t.Fatal(err)
	}
	status, _, errs = called(t, "cleanup", "--bpffs", bpffs)
	if status != 1 || !strings.Contains(errs, "error: ") || !strings.Contains(errs, "hint: ") {
		t.Errorf("cleanup beside a server: %d %s", status, errs)
	}
	if err := kernel.Close(); err != nil {
		t.Fatal(err)
	}

	status, out, errs = called(t, "targets", "--bpffs", bpffs, "--control", absent)
	want := "ADDRESS      NODE    STATE      REASON\n10.99.1.10   edge-1  offline    -\n2001:db8::1  edge-2  ambiguous  -\n"
	if status != 0 || out != want || !strings.HasPrefix(errs, "note: no tunnel-server is running; ") || !strings.Contains(errs, "are refused") {
		t.Errorf("targets: %d, stderr %sgot:\n%swant:\n%s", status, errs, out, want)
	}
	status, out, _ = called(t, "targets", "--bpffs", bpffs, "--control", absent, "-o", "json")
	if status != 0 || !strings.Contains(out, `"source": "kernel"`) || !strings.Contains(out, `"state": "ambiguous"`) {
		t.Errorf("targets: %d %s", status, out)
	}

	for range 2 {
		if status, out, errs := called(t, "cleanup", "--bpffs", bpffs); status != 0 {
			t.Errorf("cleanup: %d %s%s", status, out, errs)
		}
	}
	if _, err := os.Lstat(filepath.Join(bpffs, "edge-tunnel")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the pins are left behind: %v", err)
	}
}

// cleanup --leave has a server go first, and takes what it remembers if told where that is.
func TestCleanupHasServerLeave(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount a bpf filesystem")
	}
	bpffs, state, socket := t.TempDir(), t.TempDir(), filepath.Join(t.TempDir(), "server.sock")
	if status, _, errs := called(t, "mount-bpffs", "--bpffs", bpffs); status != 0 {
		t.Fatal(errs)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(bpffs, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	kernel, err := redirect.Open(t.Context(), redirect.Options{BPFFS: bpffs, CgroupRoot: emptyCgroup(t)})
	if err != nil {
		t.Fatal(err)
	}
	if err := kernel.Attach(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ln, err := admin.ListenControl(ctx, socket)
	if err != nil {
		t.Fatal(err)
	}
	left, served := make(chan error, 1), make(chan error, 1)
	control := admin.Control{
		Status: func() admin.Status { return admin.Status{} }, Tunnels: func() []admin.Tunnel { return nil }, Connections: func() []admin.Connection { return nil },
		Leave: func(context.Context) error {
			go func() { left <- errors.Join(kernel.Leave(), kernel.Close()) }()
			return nil
		},
	}
	go func() { served <- control.Serve(ctx, ln) }()
	for _, name := range []string{"targets.json", "targets.json.corrupt-1", "ports.json", "mine"} {
		if err := os.WriteFile(filepath.Join(state, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}

	status, _, errs := called(t, "cleanup", "--bpffs", bpffs, "--control", socket, "--state-dir", state)
	if status != 1 || !strings.Contains(errs, "hint: ") {
		t.Errorf("beside a server: %d %s", status, errs)
	}
	status, out, errs := called(t, "cleanup", "--leave", "--bpffs", bpffs, "--control", socket, "--state-dir", state)
	if status != 0 || out != "nothing of edge-tunnel is left in "+bpffs+"\nnothing is remembered in "+state+"\n" {
		t.Errorf("%d %s%s", status, out, errs)
	}
	if err := <-left; err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(filepath.Join(bpffs, "edge-tunnel")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the pins are left behind: %v", err)
	}
	if files, err := os.ReadDir(state); err != nil || len(files) != 1 || files[0].Name() != "mine" {
		t.Errorf("%v, %v", files, err)
	}
	cancel()
	if err := <-served; err != nil {
		t.Error(err)
	}
	if status, _, errs := called(t, "cleanup", "--leave", "--bpffs", bpffs, "--control", socket); status != 0 { // nobody there
		t.Errorf("%d %s", status, errs)
	}
}

// emptyCgroup makes a cgroup without processes: what is attached there sees nobody's connections.
func emptyCgroup(t *testing.T) string {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		fields := strings.Fields(line)
		if len(fields) < 3 || fields[2] != "cgroup2" {
			continue
		}
		dir, err := os.MkdirTemp(fields[1], "tunnelctl-test-")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := os.Remove(dir); err != nil {
				t.Error(err)
			}
		})
		return dir
	}
	t.Skip("needs a cgroup2 mount")
	return ""
}
