// SPDX-License-Identifier: Apache-2.0

// Package netlab makes a whole site out of network namespaces, for tests and for the demo: cloud nodes with pods, edge
// sites behind a NAT router, edge nodes that can dial the cloud and that the cloud cannot dial.
//
//	cloud network 10.80.0.0/24 fd80::/64             site network 10.99.S.0/24 fd99:0:0:S::/64
//	  ┌─────────┐            ┌───────────────┐            ┌────────┐
//	  │ cloud-1 ├── bridge ──┤ router, NAT → ├── bridge ──┤ edge-1 │
//	  └────┬────┘            └───────────────┘            └────────┘
//	     bridge 10.244.N.0/24 fd44:0:0:N::/64
//	  ┌────┴────┐
//	  │   pod   │
//	  └─────────┘
//
// [Node.Emulate] makes the way between a node and its network long, slow or bad: a cloud node's, or a site's uplink.
//
// A [Node] is a network namespace, a mount namespace, a cgroup2 folder and a folder for files. The nodes share one
// kernel, so a program attached to the machine's cgroup2 root would catch every node's connects, the edge agent's own
// included: start a node's processes with its methods and point --cgroup-root at [Node.Cgroup].
//
// Namespaces have no names and live as long as the process that made the lab. Everything is removed when the lab closes,
// and with it every process in the cgroup folders; when the process dies instead, the kernel kills the nodes'
// processes and drops the namespaces, and the next lab sweeps up the folders that are left.
//
// Errors end the test: a lab that is half there is no use. Whoever is not a test (the demo) passes a [T] of its own.
package netlab

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// T is what the lab needs of a *testing.T. Fatalf and Skipf must not return.
type T interface {
	Helper()
	Logf(format string, args ...any)
	Fatalf(format string, args ...any)
	Skipf(format string, args ...any)
	Failed() bool
	Cleanup(f func())
}

// folders of labs are called this and a random end, so that a sweep finds them.
const prefix = "etlab-"

// Lab owns namespaces, cgroup folders, mounts and processes until it is closed, which T's Cleanup does.
// Its methods may be called from several goroutines, but topology is best built by one.
type Lab struct {
	t     T
	dir   string   // everything on disk, for this lab only
	lock  *os.File // held while the lab lives: a sweep leaves its folders alone
	root  string   // mount point of cgroup2
	cloud *Network

	mu       sync.Mutex
	nodes    []*Node
	networks []*Network
	sites    int
	closed   bool
}

// New makes an empty lab. It skips the test without root and fails it without cgroup2.
func New(t T) *Lab {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skipf("network namespaces, mounts and BPF need root")
	}
	if err := Sweep(); err != nil {
		t.Logf("sweep up after dead labs: %v", err)
	}
	root, err := findCgroup2()
	if err != nil {
		t.Fatalf("%v", err)
	}
	dir, lock, err := makeDir()
	if err != nil {
		t.Fatalf("make the lab's folder: %v", err)
	}
	l := &Lab{t: t, dir: dir, lock: lock, root: root}
	t.Cleanup(l.Close)
	l.cloud = l.Network(netip.MustParsePrefix("10.80.0.0/24"), netip.MustParsePrefix("fd80::/64"))
	return l
}

func makeDir() (string, *os.File, error) {
	dir, err := os.MkdirTemp("", prefix)
	if err != nil {
		return "", nil, err
	}
	// sshd and others refuse files below folders that only root may enter with other identities.
	if err := os.Chmod(dir, 0o755); err != nil {
		return "", nil, errors.Join(err, os.RemoveAll(dir))
	}
	// Locked before it has its name: a sweep by another process sees it locked or not at all.
	early := filepath.Join(dir, "lock.new")
	lock, err := os.OpenFile(early, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return "", nil, errors.Join(err, os.RemoveAll(dir))
	}
	err = unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		err = os.Rename(early, filepath.Join(dir, "lock"))
	}
	if err != nil {
		return "", nil, errors.Join(err, lock.Close(), os.RemoveAll(dir))
	}
	return dir, lock, nil
}

// Dir is a folder for the test's own files, removed with the lab. Its path is the same inside the nodes.
func (l *Lab) Dir() string { return filepath.Join(l.dir, "files") }

// Close kills what still runs in the nodes and removes everything. Calling it again does nothing.
func (l *Lab) Close() {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return
	}
	l.closed = true
	nodes, networks := l.nodes, l.networks
	l.mu.Unlock()

	var errs []error
	for i := len(nodes) - 1; i >= 0; i-- {
		if l.t.Failed() {
			nodes[i].logProcesses(l.t)
		}
		errs = append(errs, nodes[i].close())
	}
	for _, n := range networks {
		errs = append(errs, n.close())
	}
	errs = append(errs, removeFolders(l.dir), l.lock.Close())
	if err := errors.Join(errs...); err != nil {
		// Not Fatalf: the clean-up functions after this one still have to run.
		l.t.Logf("close the lab: %v", err)
	}
}

// Sweep removes what labs whose process died have left: cgroup folders, mounts, files. Labs that live are left alone.
func Sweep() error {
	dirs, err := filepath.Glob(filepath.Join(os.TempDir(), prefix+"*"))
	if err != nil {
		return err
	}
	var errs []error
	for _, dir := range dirs {
		errs = append(errs, sweepOne(dir))
	}
	return errors.Join(errs...)
}

func sweepOne(dir string) error {
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR, 0)
	if err != nil {
		return nil // being made, or being removed, by somebody else
	}
	defer lock.Close()
	if unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
		return nil // alive
	}
	root, err := findCgroup2()
	if err != nil {
		return err
	}
	groups, err := filepath.Glob(filepath.Join(root, filepath.Base(dir)+"-*"))
	if err != nil {
		return err
	}
	errs := make([]error, 0, len(groups)+2)
	for _, group := range groups {
		errs = append(errs, removeCgroup(group))
	}
	errs = append(errs, removeCgroup1(filepath.Base(dir)+"-*"))
	return errors.Join(append(errs, removeFolders(dir))...)
}

// removeFolders takes away a lab's folder and the mounts in it.
func removeFolders(dir string) error {
	mounts, err := filepath.Glob(filepath.Join(dir, "*", "bpf"))
	if err != nil {
		return err
	}
	for _, mount := range mounts {
		// EINVAL: not mounted in this mount namespace, since the process that did so had one of its own.
		if err := unix.Unmount(mount, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("unmount %s: %w", mount, err)
		}
	}
	return os.RemoveAll(dir)
}
