// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/edge-tunnel/edge-tunnel/test/netlab"
)

// cgroupVar tells the process that runs the tests which cgroup it is in.
const cgroupVar = "EDGE_TUNNEL_TEST_CGROUP"

// TestMain runs the tests, as root, in a process that is a cloud node: with a network namespace, a mount namespace and a cgroup of its
// own. A namespace belongs to a thread, and the server has many.
func TestMain(m *testing.M) {
	if os.Geteuid() != 0 {
		goleak.VerifyTestMain(m) // what needs root skips
		return
	}
	if os.Getenv(cgroupVar) == "" {
		status, err := runInNode()
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
		os.Exit(status)
	}
	if err := makeNetwork(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	goleak.VerifyTestMain(m)
}

func runInNode() (status int, err error) {
	root, err := cgroup2()
	if err != nil {
		return 1, err
	}
	dir, err := os.MkdirTemp(root, "edge-tunnel-test-")
	if err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, netlab.RemoveCgroup(dir)) }()
	folder, err := os.Open(dir)
	if err != nil {
		return 1, err
	}
	defer folder.Close()
	runtime.LockOSThread() // Pdeathsig is about the thread
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), cgroupVar+"="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Unshareflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, UseCgroupFD: true, CgroupFD: int(folder.Fd()), Pdeathsig: syscall.SIGKILL,
	}
	err = cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode(), nil
	}
	return cmd.ProcessState.ExitCode(), err
}

func cgroup2() (string, error) {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 2 && f[2] == "cgroup2" {
			return f[1], nil
		}
	}
	return "", errors.New("no cgroup2 hierarchy is mounted")
}

var (
	node4 = netip.MustParsePrefix("10.88.0.1/24")
	node6 = netip.MustParsePrefix("fd88::1/64")
)

// makeNetwork gives the node addresses, and no way to anywhere.
func makeNetwork() error {
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "node"}, PeerName: "nowhere"}); err != nil {
		return err
	}
	for _, name := range []string{"lo", "node", "nowhere"} {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
	}
	return errors.Join(addAddr(node4), addAddr(node6))
}

func addAddr(p netip.Prefix) error { return changeAddr(netlink.AddrAdd, p) }
func delAddr(p netip.Prefix) error { return changeAddr(netlink.AddrDel, p) }

func changeAddr(change func(netlink.Link, *netlink.Addr) error, p netip.Prefix) error {
	link, err := netlink.LinkByName("node")
	if err != nil {
		return err
	}
	ip := &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
	return change(link, &netlink.Addr{IPNet: ip, Flags: unix.IFA_F_NODAD})
}

func needsRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: loads BPF programs")
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func writeFile(t testing.TB, path, text string, mode os.FileMode) string {
	t.Helper()
	must(t, os.MkdirAll(filepath.Dir(path), 0o755))
	must(t, os.WriteFile(path, []byte(text), mode))
	must(t, os.Chmod(path, mode)) // whatever the umask is
	return path
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: did not happen", what)
		}
	}
}

var silent = slog.New(slog.DiscardHandler)
