// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

var loopback4 = netip.AddrFrom4([4]byte{127, 0, 0, 1})

// armed is the record of a socket that connect() has redirected to a listener.
func armed(kind kernelSockKind, listener netip.AddrPort) kernelSockRecord {
	return kernelSockRecord{
		Kind: kind, RedirectAddr: to16(listener.Addr()), RedirectPort: listener.Port(),
		Origin: kernelOrigin{Addr: to16(edge4), Port: edgePort},
	}
}

// TestStaleRecords puts records where they must have no effect. The hook on connect() is away, because it would disarm them: a record has to
// be safe by itself.
func TestStaleRecords(t *testing.T) {
	l := newLab(t)
	k, _ := l.ready()
	listener := netip.AddrPortFrom(loopback4, DefaultPort)
	other := netip.AddrPortFrom(loopback4, DefaultPort+1)
	client := func() socket {
		s, err := newSocket(unix.AF_INET, 0)
		must(t, err)
		t.Cleanup(s.close)
		return s
	}

	// The socket of a connection that was handed over, while the hook was there.
	used := client()
	must(t, used.connect(unix.AF_INET, dst4))
	if got, err := used.answer(); got != dst4.String() {
		t.Fatalf("%q (%v)", got, err)
	}
	rec, err := k.record(int(used))
	must(t, err)
	must(t, used.dissolve())
	must(t, k.links[kernelProgConnect4].Detach())

	if _, err := used.ask(unix.AF_INET, netip.AddrPortFrom(loopback4, rec.RedirectPort)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("a record was handed over twice (%v)", err)
	}

	right := client()
	must(t, k.mark(int(right), armed(kernelSockKindSOCK_ARMED, listener)))
	must(t, right.connect(unix.AF_INET, listener))
	if got, err := right.answer(); got != dst4.String() {
		t.Errorf("the record of this very listener: %q (%v)", got, err)
	}
	if got, err := right.peer(); got != dst4 {
		t.Errorf("getpeername() says %s (%v)", got, err)
	}

	wrong := client()
	must(t, k.mark(int(wrong), armed(kernelSockKindSOCK_ARMED, other)))
	err = wrong.connect(unix.AF_INET, listener)
	if got, _ := wrong.peer(); got == dst4 {
		t.Error("getpeername() told of a connection that is not the record's")
	}
	if err == nil {
		_, err = wrong.answer()
	}
	if !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the record of another listener was handed over (%v)", err)
	}
}

// TestStaleHandOver: what an aborted handshake left behind is not for the next connection with its addresses and ports.
func TestStaleHandOver(t *testing.T) {
	l := newLab(t)
	k, _ := l.ready()
	from, to := netip.AddrPortFrom(loopback4, 23456), netip.AddrPortFrom(loopback4, DefaultPort)
	flow := kernelFlow{ClientAddr: to16(from.Addr()), ServerAddr: to16(to.Addr()), ClientPort: from.Port(), ServerPort: to.Port()}
	must(t, k.maps[kernelMapInFlightHost].Put(flow, kernelOrigin{Addr: to16(edge4), Port: edgePort}))

	client, err := newSocket(unix.AF_INET, 0)
	must(t, err)
	defer client.close()
	must(t, unix.Bind(int(client), sockaddr(unix.AF_INET, from)))
	if got, err := client.ask(unix.AF_INET, to); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("got the destination of an earlier connection: %q (%v)", got, err)
	}
}

// TestTwiceAttached is the moment in which a hook moves: its program runs twice for one call.
func TestTwiceAttached(t *testing.T) {
	l := newLab(t)
	k, s := l.ready()
	group, err := openCgroup(l.cgroup)
	must(t, err)
	defer group.Close()
	for _, h := range hooks() {
		c, err := k.attachNew(group, h, nil)
		must(t, err)
		defer func() { must(t, c.undo()) }()
	}
	for _, moving := range []uint8{1, 0} {
		k.config.Moving = moving
		must(t, k.writeConfig())
		got, err := ask(dialer(), "tcp4", dst4.String())
		if ok := got == dst4.String(); ok != (moving == 1) {
			t.Errorf("moving %d: %q (%v)", moving, got, err)
		}
	}
	if c := stats(t, k); s.unknown.Load() != 1 || c.AcceptedUnknown != 2 { // the one that ran twice without the switch
		t.Errorf("%d connections without an origin, counted %d", s.unknown.Load(), c.AcceptedUnknown)
	}
}

// TestSysctls: settings of the machine that change how connections are made.
func TestSysctls(t *testing.T) {
	for name, setting := range map[string]struct{ path, value string }{
		"SYN cookies always":             {"tcp_syncookies", "2"},
		"fast open, also without cookie": {"tcp_fastopen", "1543"}, // client, server, data without cookie, all listeners
		"no timestamps":                  {"tcp_timestamps", "0"},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			path := "/proc/sys/net/ipv4/" + setting.path // of this network namespace
			before, err := os.ReadFile(path)
			must(t, err)
			must(t, os.WriteFile(path, []byte(setting.value), 0))
			defer func() { must(t, os.WriteFile(path, before, 0)) }()
			_, s := l.ready()
			for _, flags := range []int{0, unix.MSG_FASTOPEN} {
				for family, dst := range map[int]netip.AddrPort{unix.AF_INET: dst4, unix.AF_INET6: dst6} {
					client, err := newSocket(family, 0)
					must(t, err)
					if flags == 0 {
						err = client.connect(family, dst)
					} else {
						err = unix.Sendto(int(client), []byte("GET"), flags, sockaddr(family, dst))
					}
					must(t, err)
					if got, err := client.answer(); got != dst.String() {
						t.Errorf("flags %#x: %q (%v), want %s", flags, got, err, dst)
					}
					client.close()
				}
			}
			if n := s.unknown.Load(); n != 0 {
				t.Errorf("%d connections without an origin", n)
			}
		})
	}
}

// TestProcessIsNamed: who connected.
func TestProcessIsNamed(t *testing.T) {
	l := newLab(t)
	l.addPod()
	k, s := l.ready()
	group, err := openCgroup(l.cgroup)
	must(t, err)
	must(t, group.Close())
	var client netip.AddrPort
	in(l.pod, func() {
		conn, err := dialer().Dial("tcp4", dst4.String())
		if err != nil {
			t.Error(err)
			return
		}
		client = conn.LocalAddr().(*net.TCPAddr).AddrPort()
		_, _ = answer(conn)
		_ = conn.Close()
	})
	found, ok := s.origins.Load(client)
	if !ok {
		t.Fatal("the connection did not arrive")
	}
	o := found.(Origin)
	comm, err := os.ReadFile("/proc/self/comm")
	must(t, err)
	if o.PID != uint32(os.Getpid()) || o.UID != 0 || o.GID != 0 || o.Comm+"\n" != string(comm) || o.Cgroup != group.id || o.Host || o.Netns == k.netns.Load() || o.Netns == 0 {
		t.Errorf("origin %+v", o)
	}
}

// TestFastOpenWithCookie: a client that has another server's cookie for the listener's address sends its first bytes with the SYN.
func TestFastOpenWithCookie(t *testing.T) {
	l := newLab(t)
	sysctl(t, "tcp_fastopen", "3") // clients and servers
	_, s := l.ready()
	var plain net.ListenConfig
	plain.SetMultipathTCP(false)
	other, err := plain.Listen(t.Context(), "tcp4", "127.0.0.1:0")
	must(t, err)
	defer other.Close()
	raw, err := other.(*net.TCPListener).SyscallConn()
	must(t, err)
	must(t, control(raw, func(fd int) error { return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_FASTOPEN, 16) }))

	send := func(to netip.AddrPort) socket {
		client, err := newSocket(unix.AF_INET, 0)
		must(t, err)
		t.Cleanup(client.close)
		must(t, unix.Sendto(int(client), []byte("GET"), unix.MSG_FASTOPEN, sockaddr(unix.AF_INET, to)))
		return client
	}
	for range 2 { // asks for the cookie, has it
		send(other.Addr().(*net.TCPAddr).AddrPort())
		conn, err := other.Accept()
		must(t, err)
		must(t, conn.Close())
	}
	if n := netstat(t, "TCPFastOpenActive"); n != 1 {
		t.Fatalf("%d connections began with data: the client has no cookie", n)
	}
	if got, err := send(dst4).answer(); got != dst4.String() {
		t.Errorf("the server saw %q (%v)", got, err)
	}
	if n := netstat(t, "TCPFastOpenActiveFail"); n != 1 {
		t.Errorf("%d connections sent data that was not taken, want the intercepted one", n)
	}
	if n := s.unknown.Load(); n != 0 {
		t.Errorf("%d connections without an origin", n)
	}
}
