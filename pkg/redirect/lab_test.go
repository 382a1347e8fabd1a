// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/edge-tunnel/edge-tunnel/test/netlab"
)

// lab is a cloud node of a test: a network namespace that plays the host's, a bpf filesystem and a cgroup, all its own. The test's
// goroutine is in the namespace, its process in the cgroup.
type lab struct {
	t      *testing.T
	home   netns.NsHandle // where the test came from
	host   netns.NsHandle
	pod    netns.NsHandle // see addPod
	bpffs  string
	cgroup string
}

var (
	node4 = netip.MustParseAddr("10.88.0.1")
	node6 = netip.MustParseAddr("fd88::1")
	pod4  = netip.MustParseAddr("10.88.0.2")
	pod6  = netip.MustParseAddr("fd88::2")

	edge4 = netip.MustParseAddr("10.99.0.5")
	edge6 = netip.MustParseAddr("fd99::5")
)

const edgePort = 10250

func newLab(t *testing.T) *lab {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: loads BPF programs and makes network namespaces")
	}
	l := &lab{t: t, pod: netns.None(), bpffs: t.TempDir()}

	runtime.LockOSThread()
	var err error
	l.home, err = netns.Get()
	must(t, err)
	l.host, err = netns.New()
	must(t, err)
	t.Cleanup(func() {
		must(t, netns.Set(l.home))
		_, _ = l.host.Close(), l.home.Close()
		runtime.UnlockOSThread()
	})
	lo, err := netlink.LinkByName("lo")
	must(t, err)
	must(t, netlink.LinkSetUp(lo))

	must(t, unix.Mount("bpf", l.bpffs, "bpf", 0, ""))
	t.Cleanup(func() { must(t, unix.Unmount(l.bpffs, unix.MNT_DETACH)) })

	mounts, err := os.Open("/proc/self/mountinfo")
	must(t, err)
	root, err := findCgroup2(mounts)
	must(t, errors.Join(err, mounts.Close()))
	home := filepath.Join(root, ownCgroup(t))
	l.cgroup = l.newCgroup(root)
	joinCgroup(t, l.cgroup)
	t.Cleanup(func() {
		joinCgroup(t, home)
		must(t, netlab.RemoveCgroup(l.cgroup))
	})
	return l
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (l *lab) newCgroup(parent string) string {
	l.t.Helper()
	dir, err := os.MkdirTemp(parent, "edge-tunnel-test-")
	must(l.t, err)
	return dir
}

func ownCgroup(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("/proc/self/cgroup")
	must(t, err)
	for line := range strings.Lines(string(text)) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			return path
		}
	}
	t.Fatal("this process has no cgroup2 folder")
	return ""
}

func joinCgroup(t *testing.T, dir string) {
	t.Helper()
	must(t, os.WriteFile(filepath.Join(dir, "cgroup.procs"), fmt.Append(nil, os.Getpid()), 0))
}

// in runs a function in a namespace, on a thread that ends with it.
func in(ns netns.NsHandle, do func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if err := netns.Set(ns); err != nil {
			panic(err)
		}
		do()
	}()
	<-done
}

// newPod makes another namespace.
func (l *lab) newPod() netns.NsHandle {
	l.t.Helper()
	pod := netns.None()
	in(l.host, func() {
		var err error
		pod, err = netns.New()
		must(l.t, err)
	})
	l.t.Cleanup(func() { _ = pod.Close() })
	return pod
}

// addPod makes a pod, joined to the host's namespace by a veth pair.
func (l *lab) addPod() {
	l.t.Helper()
	l.pod = l.newPod()
	l.join(l.pod, "pod", []netip.Addr{node4, node6}, []netip.Addr{pod4, pod6})
}

// addNeighbour makes a second pod, with another address and IPv4 only.
func (l *lab) addNeighbour() netns.NsHandle {
	l.t.Helper()
	pod := l.newPod()
	gateway := netip.MustParseAddr("10.88.1.1")
	l.join(pod, "neighbour", []netip.Addr{gateway}, []netip.Addr{gateway.Next()})
	in(pod, func() { must(l.t, netlink.RouteAdd(&netlink.Route{Gw: gateway.AsSlice()})) })
	return pod
}

func (l *lab) join(pod netns.NsHandle, device string, hostAddrs, podAddrs []netip.Addr) {
	t := l.t
	t.Helper()
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: device}, PeerName: "eth0", PeerNamespace: netlink.NsFd(pod)}))
	configure(t, device, hostAddrs...)
	in(pod, func() {
		configure(t, "lo")
		configure(t, "eth0", podAddrs...)
	})
}

func configure(t *testing.T, device string, addrs ...netip.Addr) {
	t.Helper()
	link, err := netlink.LinkByName(device)
	must(t, err)
	must(t, netlink.LinkSetUp(link))
	for _, a := range addrs {
		bits := 24
		if a.Is6() {
			bits = 64
		}
		addr := &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(bits, a.BitLen())}, Flags: unix.IFA_F_NODAD}
		must(t, netlink.AddrAdd(link, addr))
	}
}

func (l *lab) options() Options {
	return Options{BPFFS: l.bpffs, CgroupRoot: l.cgroup}
}

// open opens the kernel with both edge addresses online.
func (l *lab) open(change ...func(*Options)) *Kernel {
	l.t.Helper()
	opts := l.options()
	for _, c := range change {
		c(&opts)
	}
	k, err := Open(l.t.Context(), opts)
	must(l.t, err)
	l.t.Cleanup(func() { must(l.t, k.Close()) })
	return k
}

func (l *lab) fill(k *Kernel) {
	l.t.Helper()
	must(l.t, k.SetPorts([]uint16{edgePort}))
	must(l.t, k.SetTargets([]Target{{edge4, "edge-1", Online}, {edge6, "edge-1", Online}}))
}

// server accepts on all redirect listeners and answers each intercepted connection with its origin.
type server struct {
	k         *Kernel
	listeners []*net.TCPListener
	wg        sync.WaitGroup
	unknown   atomic.Int64 // connections without origin
	origins   sync.Map     // netip.AddrPort of the client → Origin
}

// serve starts a server on the host's addresses and the given ones.
func (l *lab) serve(k *Kernel, more ...netip.Addr) *server {
	l.t.Helper()
	s := &server{k: k}
	for _, addr := range append(k.HostAddrs(), more...) {
		for _, port := range k.RedirectPorts() {
			listener, err := k.Listen(l.t.Context(), netip.AddrPortFrom(addr, port))
			must(l.t, err)
			s.listeners = append(s.listeners, listener)
		}
	}
	for _, listener := range s.listeners {
		s.wg.Go(func() {
			for {
				conn, err := listener.AcceptTCP()
				if err != nil {
					return
				}
				s.wg.Go(func() { s.answer(conn) })
			}
		})
	}
	l.t.Cleanup(s.stop)
	return s
}

func (s *server) stop() {
	for _, listener := range s.listeners {
		_ = listener.Close()
	}
	s.wg.Wait()
}

func (s *server) answer(conn *net.TCPConn) {
	defer func() { _ = conn.Close() }()
	o, err := s.k.Origin(conn)
	if err != nil {
		s.unknown.Add(1)
		_ = conn.SetLinger(0)
		return
	}
	client, _ := conn.RemoteAddr().(*net.TCPAddr)
	s.origins.Store(client.AddrPort(), o)
	_, _ = fmt.Fprintln(conn, o.Dst)
	_ = conn.CloseWrite()
	_ = conn.SetReadDeadline(time.Now().Add(5 * time.Second))
	_, _ = io.Copy(io.Discard, conn) // to close with unread bytes would be a reset
}

// ready is what most tests start with: everything attached and served.
func (l *lab) ready(change ...func(*Options)) (*Kernel, *server) {
	l.t.Helper()
	k := l.open(change...)
	l.fill(k)
	var s *server
	if l.pod.IsOpen() {
		s = l.serve(k, node4, node6)
		must(l.t, k.SetNodeAddrs(node4, node6))
	} else {
		s = l.serve(k)
	}
	must(l.t, k.Attach())
	return k, s
}

// dialer is for clients of the tests: plain TCP.
func dialer() *net.Dialer {
	d := &net.Dialer{Timeout: 5 * time.Second}
	d.SetMultipathTCP(false)
	return d
}

// ask connects and returns what the server took for the destination.
func ask(d *net.Dialer, network, addr string) (string, error) {
	conn, err := d.DialContext(context.Background(), network, addr)
	if err != nil {
		return "", err
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	return answer(conn)
}

func answer(r io.Reader) (string, error) {
	line, err := bufio.NewReader(r).ReadString('\n')
	return strings.TrimSpace(line), err
}

// canRefuse tells whether this kernel lets connect() fail with an error of ours.
func canRefuse(t *testing.T, k *Kernel) bool {
	t.Helper()
	var have uint8
	must(t, k.spec.Variables[kernelVarHaveSetRetval].Get(&have))
	return have == 1
}

// refusal is the error of a call that a program refuses: before Linux 5.18 always EPERM.
func refusal(t *testing.T, k *Kernel, errno unix.Errno) unix.Errno {
	t.Helper()
	if canRefuse(t, k) {
		return errno
	}
	return unix.EPERM
}

// offlineUnserved is the error of a connect() to an offline target while no daemon listens: what cannot be refused goes to where the daemon
// would reset it.
func offlineUnserved(t *testing.T, k *Kernel) unix.Errno {
	t.Helper()
	if canRefuse(t, k) {
		return unix.EHOSTUNREACH
	}
	return unix.ECONNREFUSED
}

func haveMPTCP() bool {
	s, err := newSocket(unix.AF_INET, unix.IPPROTO_MPTCP)
	if err != nil {
		return false
	}
	s.close()
	return true
}

func stats(t *testing.T, k *Kernel) Counters {
	t.Helper()
	c, err := k.Stats()
	must(t, err)
	return c
}
