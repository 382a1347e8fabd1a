// SPDX-License-Identifier: Apache-2.0

package netlab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/edge-tunnel/edge-tunnel/test/linkemu"
)

// Node is a machine, a router or a pod. It is closed with its lab.
type Node struct {
	Name string
	V4   netip.Addr // its address in its own network; zero if the network lacks the family
	V6   netip.Addr

	lab    *Lab
	dir    string
	cgroup string
	within string // folder below cgroup in which its processes start
	ns     netns.NsHandle
	link   *netlink.Handle
	thread *thread
	pods   *Network // made with the first pod
	number int      // of a cloud node, for its pods' network

	port     port
	emulated *linkemu.Link

	mu        sync.Mutex
	processes []*Process
}

// newNode makes a node without interfaces but lo. The parent of a pod is its node; its cgroup lies below the node's,
// as the kubelet has it.
func (l *Lab) newNode(name string, parent *Node, bpffs bool) (_ *Node, err error) {
	n := &Node{Name: name, lab: l, ns: netns.None(), dir: filepath.Join(l.dir, name)}
	n.cgroup = filepath.Join(l.root, filepath.Base(l.dir)+"-"+name)
	if parent != nil {
		n.cgroup = filepath.Join(parent.cgroup, "kubepods", name)
	}
	if err := l.add(n); err != nil {
		return nil, err
	}
	if err := errors.Join(os.MkdirAll(l.Dir(), 0o755), fillDir(n.dir, bpffs), os.MkdirAll(n.cgroup, 0o755)); err != nil {
		return nil, err
	}
	if n.ns, err = newNetns(); err != nil {
		return nil, err
	}
	if n.link, err = netlink.NewHandleAt(n.ns); err != nil {
		return nil, err
	}
	n.thread, err = newThread(func() error {
		return errors.Join(netns.Set(n.ns), enterMounts(n.dir))
	})
	if err != nil {
		return nil, err
	}
	if err := n.Do(func() error {
		return errors.Join(sysctl("ipv6/conf/all/accept_dad", "0"), sysctl("ipv6/conf/default/accept_dad", "0"),
			sysctl("ipv6/conf/all/accept_ra", "0"), sysctl("ipv6/conf/default/accept_ra", "0"))
	}); err != nil {
		return nil, err
	}
	lo, err := n.link.LinkByName("lo")
	if err != nil {
		return nil, err
	}
	return n, n.link.LinkSetUp(lo)
}

// add makes a node known to the lab: whatever exists of it is removed at the end.
func (l *Lab) add(n *Node) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, other := range l.nodes {
		if other.Name == n.Name {
			return fmt.Errorf("there is a node %s already", n.Name)
		}
	}
	l.nodes = append(l.nodes, n)
	return nil
}

// Host makes a node of the machine itself: its network and its files are the machine's, but its processes are in a cgroup folder
// of their own and end with the lab. It is for programs that a test talks to over the machine's own loopback.
func (l *Lab) Host(name string) *Node {
	l.t.Helper()
	n := &Node{Name: name, lab: l, ns: netns.None(), dir: filepath.Join(l.dir, name)}
	n.cgroup = filepath.Join(l.root, filepath.Base(l.dir)+"-"+name)
	if err := l.add(n); err != nil {
		l.t.Fatalf("%v", err)
	}
	err := errors.Join(os.MkdirAll(l.Dir(), 0o755), fillDir(n.dir, false), os.MkdirAll(n.cgroup, 0o755))
	if err == nil {
		n.ns, err = netns.Get()
	}
	if err == nil {
		n.link, err = netlink.NewHandleAt(n.ns)
	}
	if err == nil {
		n.thread, err = newThread(func() error { return nil })
	}
	if err != nil {
		l.t.Fatalf("make host node %s: %v", name, err)
	}
	return n
}

// attach joins a network; the first one gives the node its addresses.
func (n *Node) attach(network *Network, ifname string) error {
	addrs, err := network.join(n, ifname)
	if err != nil {
		return err
	}
	for _, a := range addrs {
		switch {
		case a.Addr().Is4() && !n.V4.IsValid():
			n.V4 = a.Addr()
		case a.Addr().Is6() && !n.V6.IsValid():
			n.V6 = a.Addr()
		}
	}
	return nil
}

// Cgroup is the absolute path of the node's cgroup2 folder, for --cgroup-root. Its processes and its pods are below.
func (n *Node) Cgroup() string { return n.cgroup }

// BPFFS is where the node's own bpffs is mounted, for --bpffs: the same path inside and outside of the node. Inside it is also
// /sys/fs/bpf. Pods and routers have none.
func (n *Node) BPFFS() string { return filepath.Join(n.dir, "bpf") }

// Kubelet readies the node for a kubelet with the cgroupRoot that it returns. There is such a folder in every hierarchy then, and the
// node's processes start in a child of it, since cgroup2 hands controllers to the children of folders without processes only. What is mounted
// on the node is seen by those of its containers that ask for it, as on a machine with systemd.
func (n *Node) Kubelet() (cgroupRoot string, err error) {
	name := filepath.Base(n.cgroup)
	n.within = "system"
	return "/" + name, errors.Join(os.MkdirAll(filepath.Join(n.cgroup, n.within), 0o755), makeCgroup1(name),
		n.mount("", "/", "", unix.MS_SHARED|unix.MS_REC, ""))
}

// Overlay lays a folder of the node's own over one of the machine, as the node sees it: what is there can be read, what is written
// there goes with the lab.
func (n *Node) Overlay(path string) error {
	dirs := n.Path("overlays", strings.ReplaceAll(path, "/", "-"))
	upper, work := filepath.Join(dirs, "upper"), filepath.Join(dirs, "work")
	if err := errors.Join(os.MkdirAll(upper, 0o755), os.MkdirAll(work, 0o755)); err != nil {
		return err
	}
	return n.mount("edge-tunnel", path, "overlay", 0, fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", path, upper, work))
}

// Mask lays a file of the node's own with the same content over one of the machine, as the node sees it: a setting in /proc, say, that is the
// whole machine's.
func (n *Node) Mask(path string) error {
	content, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	own := n.Path("masks", strings.ReplaceAll(path, "/", "-"))
	if err := errors.Join(os.MkdirAll(filepath.Dir(own), 0o755), os.WriteFile(own, content, 0o644)); err != nil {
		return err
	}
	return n.mount(own, path, "", unix.MS_BIND, "")
}

func (n *Node) mount(source, target, kind string, flags uintptr, data string) (err error) {
	n.thread.do(func() { err = unix.Mount(source, target, kind, flags, data) })
	if err != nil {
		return fmt.Errorf("mount over %s on %s: %w", target, n.Name, err)
	}
	return nil
}

// Path is a path in the node's own folder, the same inside and outside. "run" is its /run.
func (n *Node) Path(elem ...string) string {
	return filepath.Join(append([]string{n.dir}, elem...)...)
}

// Netlink changes the node's interfaces, addresses and routes. It belongs to the node.
func (n *Node) Netlink() *netlink.Handle { return n.link }

// SetLink takes an interface down or up, as pulling and plugging a cable does.
func (n *Node) SetLink(name string, up bool) error {
	link, err := n.link.LinkByName(name)
	if err != nil {
		return err
	}
	if up {
		return n.link.LinkSetUp(link)
	}
	return n.link.LinkSetDown(link)
}

// AddAddr adds an address, usable at once.
func (n *Node) AddAddr(ifname string, addr netip.Prefix) error {
	link, err := n.link.LinkByName(ifname)
	if err != nil {
		return err
	}
	return addAddr(n.link, link, addr)
}

// DelAddr removes an address.
func (n *Node) DelAddr(ifname string, addr netip.Prefix) error {
	link, err := n.link.LinkByName(ifname)
	if err != nil {
		return err
	}
	return n.link.AddrDel(link, &netlink.Addr{IPNet: ipNet(addr)})
}

// Do runs f on a thread in the node's network namespace, so that sockets which f makes itself belong to the node.
// Goroutines that f starts are elsewhere. The cgroup stays the caller's: a connect from here is not seen by programs on
// the node's cgroup; use [Node.Helper] or [Node.Command] for those.
func (n *Node) Do(f func() error) error {
	var err error
	t, enterErr := newThread(func() error { return netns.Set(n.ns) })
	if enterErr != nil {
		return fmt.Errorf("enter %s: %w", n.Name, enterErr)
	}
	defer t.close()
	t.do(func() { err = f() })
	return err
}

// Dial connects from the node's network namespace (see [Node.Do]); the address must be an IP address and port.
func (n *Node) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	if _, err := netip.ParseAddrPort(addr); err != nil {
		return nil, fmt.Errorf("dial from %s: %w", n.Name, err)
	}
	var conn net.Conn
	err := n.Do(func() (err error) {
		conn, err = new(net.Dialer).DialContext(ctx, network, addr)
		return err
	})
	return conn, err
}

// Listen listens in the node's network namespace (see [Node.Do]).
func (n *Node) Listen(ctx context.Context, network, addr string) (net.Listener, error) {
	var listener net.Listener
	err := n.Do(func() (err error) {
		listener, err = new(net.ListenConfig).Listen(ctx, network, addr)
		return err
	})
	return listener, err
}

// close undoes newNode, as far as it came.
func (n *Node) close() error {
	var errs []error
	// First the processes that are known, which are waited for; then what they have started.
	n.mu.Lock()
	processes := n.processes
	n.mu.Unlock()
	for _, p := range processes {
		p.Kill()
	}
	if exists(n.cgroup) {
		errs = append(errs, removeCgroup(n.cgroup))
	}
	if n.within != "" {
		errs = append(errs, removeCgroup1(filepath.Base(n.cgroup)))
	}
	if n.pods != nil {
		errs = append(errs, n.pods.close())
	}
	if n.emulated != nil {
		errs = append(errs, n.emulated.Close())
	}
	if n.thread != nil {
		n.thread.close()
	}
	if n.link != nil {
		n.link.Close()
	}
	if n.ns.IsOpen() {
		errs = append(errs, n.ns.Close())
	}
	return errors.Join(errs...)
}
