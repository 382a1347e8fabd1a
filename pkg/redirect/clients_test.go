// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"errors"
	"net"
	"net/netip"
	"testing"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

var (
	dst4 = netip.AddrPortFrom(edge4, edgePort)
	dst6 = netip.AddrPortFrom(edge6, edgePort)
)

// TestClients is the matrix of what a client can do before and with connect().
func TestClients(t *testing.T) {
	l := newLab(t)
	l.addPod()
	_, s := l.ready()

	set := func(level, option, value int) func(socket) error {
		return func(s socket) error { return unix.SetsockoptInt(int(s), level, option, value) }
	}
	bind := func(family int, addr string) func(socket) error {
		return func(s socket) error { return unix.Bind(int(s), sockaddr(family, netip.MustParseAddrPort(addr))) }
	}
	fastOpen := func(family int) func(socket, netip.AddrPort) error {
		return func(s socket, dst netip.AddrPort) error {
			return unix.Sendto(int(s), []byte("GET"), unix.MSG_FASTOPEN, sockaddr(family, dst))
		}
	}
	const inHost, inPod, everywhere = 1, 2, 3
	for _, c := range []struct {
		name     string
		where    int
		family   int
		protocol int
		dst      netip.AddrPort
		setup    func(socket) error
		connect  func(socket, netip.AddrPort) error
		deferred bool // the first write connects
		noPeer   bool // getpeername() is known to show the redirect address
	}{
		{name: "IPv4", where: everywhere, family: unix.AF_INET, dst: dst4},
		{name: "IPv6", where: everywhere, family: unix.AF_INET6, dst: dst6},
		{name: "v4-mapped", where: everywhere, family: unix.AF_INET6, dst: dst4},
		{name: "IPv4 non-blocking", where: everywhere, family: unix.AF_INET, dst: dst4, setup: func(s socket) error { return unix.SetNonblock(int(s), true) }},
		{name: "IPv6 non-blocking", where: everywhere, family: unix.AF_INET6, dst: dst6, setup: func(s socket) error { return unix.SetNonblock(int(s), true) }},
		{name: "IPv6 only", where: everywhere, family: unix.AF_INET6, dst: dst6, setup: set(unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)},
		{name: "bound to loopback", where: inHost, family: unix.AF_INET, dst: dst4, setup: bind(unix.AF_INET, "127.0.0.1:0")},
		{name: "bound to the node's address", where: inHost, family: unix.AF_INET, dst: dst4, setup: bind(unix.AF_INET, "10.88.0.1:0")},
		{name: "bound to the node's address and a port", where: inHost, family: unix.AF_INET, dst: dst4, setup: bind(unix.AF_INET, "10.88.0.1:5555")},
		{name: "bound to the node's IPv6 address", where: inHost, family: unix.AF_INET6, dst: dst6, setup: bind(unix.AF_INET6, "[fd88::1]:0")},
		{name: "v4-mapped, bound", where: inHost, family: unix.AF_INET6, dst: dst4, setup: bind(unix.AF_INET6, "[::ffff:10.88.0.1]:0")},
		{name: "bound to the pod's address", where: inPod, family: unix.AF_INET, dst: dst4, setup: bind(unix.AF_INET, "10.88.0.2:0")},
		{name: "bound to the pod's IPv6 address and a port", where: inPod, family: unix.AF_INET6, dst: dst6, setup: bind(unix.AF_INET6, "[fd88::2]:5555")},
		{name: "bound to a device", where: inPod, family: unix.AF_INET, dst: dst4, setup: func(s socket) error { return unix.BindToDevice(int(s), "eth0") }},
		{name: "IPv4 MPTCP", where: everywhere, family: unix.AF_INET, protocol: unix.IPPROTO_MPTCP, dst: dst4, noPeer: true},
		{name: "IPv6 MPTCP", where: everywhere, family: unix.AF_INET6, protocol: unix.IPPROTO_MPTCP, dst: dst6, noPeer: true},
		{name: "IPv4 fast open by sendmsg", where: everywhere, family: unix.AF_INET, dst: dst4, connect: fastOpen(unix.AF_INET)},
		{name: "IPv6 fast open by sendmsg", where: everywhere, family: unix.AF_INET6, dst: dst6, connect: fastOpen(unix.AF_INET6)},
		{name: "IPv4 fast open by connect", where: everywhere, family: unix.AF_INET, dst: dst4, setup: set(unix.IPPROTO_TCP, unix.TCP_FASTOPEN_CONNECT, 1), deferred: true},
	} {
		for _, place := range []struct {
			name string
			bit  int
			ns   netns.NsHandle
		}{{"host", inHost, l.host}, {"pod", inPod, l.pod}} {
			if c.where&place.bit == 0 {
				continue
			}
			t.Run(place.name+"/"+c.name, func(t *testing.T) {
				if c.protocol == unix.IPPROTO_MPTCP && !haveMPTCP() {
					t.Skip("this kernel has no MPTCP")
				}
				in(place.ns, func() {
					client, err := newSocket(c.family, c.protocol)
					if err != nil {
						t.Error(err)
						return
					}
					defer client.close()
					if c.setup != nil {
						err = c.setup(client)
					}
					if err == nil && c.connect != nil {
						err = c.connect(client, c.dst)
					} else if err == nil {
						err = client.connect(c.family, c.dst)
					}
					if err == nil && c.deferred {
						_, err = unix.Write(int(client), []byte("GET"))
					}
					if err != nil {
						t.Error("connect:", err)
						return
					}
					if got, err := client.answer(); err != nil || got != c.dst.String() {
						t.Errorf("the server saw %q (%v), want %s", got, err, c.dst)
					}
					if got, err := client.peer(); !c.noPeer && (err != nil || got != c.dst) {
						t.Errorf("getpeername() says %s (%v), want %s", got, err, c.dst)
					}
				})
			})
		}
	}
	if n := s.unknown.Load(); n != 0 {
		t.Errorf("%d connections arrived without an origin", n)
	}
}

// TestUntouched connects to what must not be intercepted, and to real servers there.
func TestUntouched(t *testing.T) {
	l := newLab(t)
	stranger := netip.MustParseAddr("10.99.0.6")
	configure(t, "lo", edge4, stranger)
	k, s := l.ready()

	for _, addr := range []string{"10.99.0.5:10251", "10.99.0.6:10250"} {
		listener, err := net.Listen("tcp4", addr)
		must(t, err)
		go func() {
			if conn, err := listener.Accept(); err == nil {
				_, _ = conn.Write([]byte("direct\n"))
				_ = conn.Close()
			}
		}()
		if got, err := ask(dialer(), "tcp4", addr); got != "direct" {
			t.Errorf("%s: %q (%v), want the real server", addr, got, err)
		}
		_ = listener.Close()
	}

	packets, err := net.ListenPacket("udp4", dst4.String())
	must(t, err)
	defer packets.Close()
	conn, err := net.Dial("udp4", dst4.String())
	must(t, err)
	defer conn.Close()
	if got := conn.RemoteAddr().String(); got != dst4.String() {
		t.Errorf("UDP peer is %s", got)
	}
	_, err = conn.Write([]byte("x"))
	must(t, err)
	if _, _, err := packets.ReadFrom(make([]byte, 8)); err != nil {
		t.Error("UDP:", err)
	}

	if c := stats(t, k); c.RedirectedHost4 != 0 || c.Missed < 2 {
		t.Errorf("redirected %d, missed %d", c.RedirectedHost4, c.Missed)
	}
	if n := s.unknown.Load(); n != 0 {
		t.Errorf("%d connections reached a redirect listener", n)
	}
}

func TestRefusedStates(t *testing.T) {
	l := newLab(t)
	k, _ := l.ready()
	if !canRefuse(t, k) {
		t.Skip("before Linux 5.18 these connections arrive: TestOldKernelLetsThrough")
	}
	clash := netip.MustParseAddr("10.99.0.7")
	must(t, k.SetTargets([]Target{{edge4, "edge-1", Online}, {edge6, "edge-1", Offline}, {clash, "edge-1, edge-2", Ambiguous}}))

	dial := func(addr netip.Addr) error {
		conn, err := dialer().Dial("tcp", hostport(addr))
		if err == nil {
			_ = conn.Close()
		}
		return err
	}
	for _, addr := range []netip.Addr{edge6, clash} {
		if err := dial(addr); !errors.Is(err, unix.EHOSTUNREACH) {
			t.Errorf("%s: %v, want EHOSTUNREACH", addr, err)
		}
	}
	must(t, k.SetState([]netip.Addr{edge4, edge6, clash, netip.MustParseAddr("10.99.0.8")}, Online))
	must(t, dial(edge6))
	if err := dial(clash); !errors.Is(err, unix.EHOSTUNREACH) {
		t.Errorf("ambiguous target after SetState: %v", err)
	}
	must(t, k.SetState([]netip.Addr{edge4}, Offline))
	if err := dial(edge4); !errors.Is(err, unix.EHOSTUNREACH) {
		t.Errorf("target gone offline: %v", err)
	}
	if c := stats(t, k); c.Offline != 2 || c.Ambiguous != 2 {
		t.Errorf("counted %d offline, %d ambiguous, want 2 and 2", c.Offline, c.Ambiguous)
	}

	// A socket that was refused can be used for another address, and is intercepted there.
	client, err := newSocket(unix.AF_INET, 0)
	must(t, err)
	defer client.close()
	if err := client.connect(unix.AF_INET, dst4); !errors.Is(err, unix.EHOSTUNREACH) {
		t.Errorf("refused socket: %v", err)
	}
	must(t, k.SetState([]netip.Addr{edge4}, Online))
	must(t, client.connect(unix.AF_INET, dst4))
	if got, err := client.answer(); got != dst4.String() {
		t.Errorf("reused socket: %q (%v)", got, err)
	}
}

// TestOldKernelLetsThrough: without bpf_set_retval() offline targets reach the daemon, which knows the destination and resets.
func TestOldKernelLetsThrough(t *testing.T) {
	l := newLab(t)
	k, _ := l.ready(func(o *Options) { o.noSetRetval = true })
	must(t, k.SetState([]netip.Addr{edge4}, Offline))
	if got, err := ask(dialer(), "tcp4", dst4.String()); got != dst4.String() {
		t.Errorf("the server saw %q (%v)", got, err)
	}
	if c := stats(t, k); c.Offline != 1 || c.RedirectedHost4 != 1 {
		t.Errorf("counted offline %d, redirected %d", c.Offline, c.RedirectedHost4)
	}
}

// TestOldKernelLearnsNamespace: without SO_NETNS_COOKIE the cookie is learnt from a connect() of the daemon's own.
func TestOldKernelLearnsNamespace(t *testing.T) {
	l := newLab(t)
	old := func(o *Options) { o.noNetnsCookie = true }
	k, s := l.ready(old)
	want, err := hostNetns(Options{})
	must(t, err)
	if want == 0 { // a kernel that cannot tell
		want = k.netns.Load()
	}
	if k.netns.Load() != want || want == 0 {
		t.Errorf("learnt %d, the kernel says %d", k.netns.Load(), want)
	}
	if got, err := ask(dialer(), "tcp4", dst4.String()); got != dst4.String() {
		t.Errorf("the server saw %q (%v)", got, err)
	}

	// A successor that has not learnt it yet takes its predecessor's: the connections are intercepted, and have to be told apart.
	s.stop()
	must(t, k.Close())
	k = l.open(old)
	s = l.serve(k)
	if got, err := ask(dialer(), "tcp4", dst4.String()); got != dst4.String() {
		t.Errorf("before Attach the server saw %q (%v)", got, err)
	}
	arrived := 0
	for _, origin := range s.origins.Range {
		arrived++
		if o := origin.(Origin); !o.Host || o.Netns != want {
			t.Errorf("before Attach: %+v", o)
		}
	}
	if arrived != 1 {
		t.Errorf("%d connections arrived", arrived)
	}
	must(t, k.Attach())
	if k.netns.Load() != want {
		t.Errorf("learnt %d the second time, the kernel says %d", k.netns.Load(), want)
	}
}

func TestNoOrigin(t *testing.T) {
	l := newLab(t)
	k, s := l.ready()

	reset := func(what string, client socket, port uint16) {
		t.Helper()
		if got, err := client.ask(unix.AF_INET, netip.AddrPortFrom(loopback4, port)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("%s: %q (%v), want a reset", what, got, err)
		}
	}
	direct, err := newSocket(unix.AF_INET, 0)
	must(t, err)
	defer direct.close()
	reset("direct", direct, DefaultPort)

	// All eight ports: the record's own must be among them.
	for i := range uint16(Ports) {
		client, err := newSocket(unix.AF_INET, 0)
		must(t, err)
		if got, err := client.ask(unix.AF_INET, dst4); got != dst4.String() {
			t.Errorf("%q (%v)", got, err)
		}
		must(t, client.dissolve())
		reset("dissolved", client, DefaultPort+i)
		client.close()
	}

	// A record that was never handed over, because nobody listened.
	s.stop()
	client, err := newSocket(unix.AF_INET, 0)
	must(t, err)
	defer client.close()
	if err := client.connect(unix.AF_INET, dst4); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("without a daemon: %v, want ECONNREFUSED", err)
	}
	again := l.serve(k)
	for i := range uint16(Ports) {
		// The hook does not look at sockets that go elsewhere: this one leaves the record armed.
		if err := client.connect(unix.AF_INET, netip.AddrPortFrom(loopback4, 9)); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("port 9: %v, want ECONNREFUSED", err)
		}
		reset("armed", client, DefaultPort+i)
		must(t, client.dissolve())
	}
	if n := again.unknown.Load(); n != Ports {
		t.Errorf("%d connections without an origin, want %d", n, Ports)
	}
	if c := stats(t, k); c.AcceptedUnknown != 1+2*Ports {
		t.Errorf("counted %d, want %d", c.AcceptedUnknown, 1+2*Ports)
	}
}

// TestFamilies: which redirect address a socket gets when the node lacks a family.
func TestFamilies(t *testing.T) {
	l := newLab(t)
	l.addPod()
	k, _ := l.ready()

	try := func(family int, dst netip.AddrPort, setup func(socket) error) (answer string, err error) {
		in(l.pod, func() {
			var client socket
			if client, err = newSocket(family, 0); err != nil {
				return
			}
			defer client.close()
			if setup != nil {
				if err = setup(client); err != nil {
					return
				}
			}
			if err = client.connect(family, dst); err != nil {
				return
			}
			answer, err = client.answer()
		})
		return answer, err
	}

	unreachable := refusal(t, k, unix.EHOSTUNREACH)
	must(t, k.SetNodeAddrs(node4, netip.Addr{}))
	if got, err := try(unix.AF_INET6, dst6, nil); got != dst6.String() {
		t.Errorf("IPv6 over the node's IPv4 address: %q (%v)", got, err)
	}
	bound := func(s socket) error {
		return unix.Bind(int(s), sockaddr(unix.AF_INET6, netip.AddrPortFrom(pod6, 0)))
	}
	if _, err := try(unix.AF_INET6, dst6, bound); !errors.Is(err, unreachable) {
		t.Errorf("bound IPv6 socket: %v, want %v", err, unreachable)
	}
	only := func(s socket) error { return unix.SetsockoptInt(int(s), unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1) }
	if _, err := try(unix.AF_INET6, dst6, only); err == nil {
		t.Error("V6ONLY socket was connected over IPv4")
	} else {
		t.Log("V6ONLY:", err)
	}

	must(t, k.SetNodeAddrs(netip.Addr{}, node6))
	for family, name := range map[int]string{unix.AF_INET: "IPv4", unix.AF_INET6: "v4-mapped"} {
		if _, err := try(family, dst4, nil); !errors.Is(err, unreachable) {
			t.Errorf("%s without a node address: %v, want %v", name, err, unreachable)
		}
	}
	if got, err := try(unix.AF_INET6, dst6, nil); got != dst6.String() {
		t.Errorf("IPv6: %q (%v)", got, err)
	}
	if c := stats(t, k); c.NoFamily < 3 {
		t.Errorf("counted %d without a family, want 3 at least", c.NoFamily)
	}
}

func TestDeviceBoundGoesDirect(t *testing.T) {
	l := newLab(t)
	k, _ := l.ready()
	client, err := newSocket(unix.AF_INET, 0)
	must(t, err)
	defer client.close()
	must(t, unix.BindToDevice(int(client), "lo"))
	// It would hang, as it would without us.
	must(t, unix.SetNonblock(int(client), true))
	if err := unix.Connect(int(client), sockaddr(unix.AF_INET, dst4)); !errors.Is(err, unix.EINPROGRESS) {
		t.Error("connect:", err)
	}
	if c := stats(t, k); c.DeviceBound != 1 || c.RedirectedHost4 != 0 {
		t.Errorf("counted %d bound to a device, %d redirected", c.DeviceBound, c.RedirectedHost4)
	}
}
