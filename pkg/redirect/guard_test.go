// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/edge-tunnel/edge-tunnel/test/netlab"
)

func TestBindGuard(t *testing.T) {
	l := newLab(t)
	l.addPod()
	k, s := l.ready()
	s.stop() // the daemon is away

	try := func(family, kind, protocol int, addr string) error {
		fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC, protocol)
		must(t, err)
		defer unix.Close(fd)
		return unix.Bind(fd, sockaddr(family, netip.MustParseAddrPort(addr)))
	}
	denied := refusal(t, k, unix.EACCES)
	refused := []func() error{
		func() error { return try(unix.AF_INET, unix.SOCK_STREAM, 0, "127.0.0.1:10270") },
		func() error { return try(unix.AF_INET, unix.SOCK_STREAM, 0, "0.0.0.0:10277") },
		func() error { return try(unix.AF_INET6, unix.SOCK_STREAM, 0, "[::]:10273") },
		func() error { return try(unix.AF_INET6, unix.SOCK_STREAM, 0, "[::ffff:127.0.0.1]:10273") },
	}
	if haveMPTCP() {
		refused = append(refused, func() error { return try(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_MPTCP, "127.0.0.1:10270") })
	}
	for i, bind := range refused {
		if err := bind(); !errors.Is(err, denied) {
			t.Errorf("as root, %d: %v, want %v", i, err, denied)
		}
	}
	in(l.host, func() {
		// Without package syscall's help: for this thread only, which ends with the function.
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, 65534, 65534, 65534); errno != 0 {
			t.Error("setresuid:", errno)
			return
		}
		if err := refused[0](); !errors.Is(err, denied) {
			t.Errorf("as nobody: %v, want %v", err, denied)
		}
	})
	if c := stats(t, k); c.BindRefused != uint64(len(refused)+1) {
		t.Errorf("counted %d, want %d", c.BindRefused, len(refused)+1)
	}

	for _, addr := range []string{"127.0.0.1:10269", "127.0.0.1:10278", "127.0.0.1:0"} {
		must(t, try(unix.AF_INET, unix.SOCK_STREAM, 0, addr))
	}
	must(t, try(unix.AF_INET, unix.SOCK_DGRAM, 0, "127.0.0.1:10270"))
	in(l.pod, func() {
		if err := try(unix.AF_INET, unix.SOCK_STREAM, 0, "127.0.0.1:10270"); err != nil {
			t.Error("in a pod:", err)
		}
	})
	l.serve(k) // the daemon itself
}

func TestListenRefuses(t *testing.T) {
	l := newLab(t)
	k, _ := l.ready()
	for _, addr := range []string{"0.0.0.0:10270", "[::]:10270", "127.0.0.1:10278", "127.0.0.1:0"} {
		if _, err := k.Listen(t.Context(), netip.MustParseAddrPort(addr)); err == nil {
			t.Errorf("listened on %s", addr)
		}
	}
	_, err := k.Listen(t.Context(), netip.MustParseAddrPort("127.0.0.1:10270"))
	var hinted interface{ Hint() string }
	if !errors.Is(err, unix.EADDRINUSE) || !errors.As(err, &hinted) || hinted.Hint() == "" {
		t.Errorf("port in use: %v, want EADDRINUSE with a hint", err)
	}
}

func TestBypass(t *testing.T) {
	l := newLab(t)
	configure(t, "lo", edge4)
	k, _ := l.ready()
	listener, err := net.Listen("tcp4", dst4.String())
	must(t, err)
	defer listener.Close()

	before := stats(t, k).Bypassed // a kernel that cannot tell its cookie made one
	d := dialer()
	d.Control = k.Bypass
	conn, err := d.Dial("tcp4", dst4.String())
	must(t, err)
	_ = conn.Close()
	direct, err := listener.Accept()
	must(t, err)
	_ = direct.Close()
	if c := stats(t, k); c.Bypassed != before+1 {
		t.Errorf("counted %d bypassed", c.Bypassed-before)
	}

	// A dialer that was left at MPTCP: its first socket is refused the record, and package net goes on with a plain one.
	d.SetMultipathTCP(true)
	conn, err = d.Dial("tcp4", dst4.String())
	must(t, err)
	_ = conn.Close()
	if c := stats(t, k); c.Bypassed != before+2 || c.RedirectedHost4 != 0 {
		t.Errorf("MPTCP dialer: counted %d bypassed, %d redirected", c.Bypassed-before, c.RedirectedHost4)
	}

	if haveMPTCP() {
		mptcp, err := newSocket(unix.AF_INET, unix.IPPROTO_MPTCP)
		must(t, err)
		defer mptcp.close()
		if err := k.GuardListener(int(mptcp)); err == nil {
			t.Error("an MPTCP socket was marked, which has no effect")
		}
	}

	// A dial that is under way when the kernel's state is let go fails; it is neither redirected nor a crash.
	d = dialer()
	d.Control = k.Bypass
	over := make(chan error)
	go in(l.host, func() {
		for {
			conn, err := d.Dial("tcp4", dst4.String())
			if err != nil {
				over <- err
				return
			}
			_ = conn.Close()
		}
	})
	time.Sleep(10 * time.Millisecond)
	must(t, k.Close())
	if err := <-over; !errors.Is(err, net.ErrClosed) {
		t.Errorf("a dial after the end: %v", err)
	}
}

func TestOptOut(t *testing.T) {
	l := newLab(t)
	configure(t, "lo", edge4)
	k, _ := l.ready()
	listener, err := net.Listen("tcp4", dst4.String())
	must(t, err)
	defer listener.Close()

	out := l.newCgroup(l.cgroup)
	inner := l.newCgroup(out)
	t.Cleanup(func() {
		joinCgroup(t, l.cgroup)
		must(t, errors.Join(netlab.RemoveCgroup(inner), netlab.RemoveCgroup(out)))
	})
	group, err := openCgroup(out)
	must(t, err)
	must(t, group.Close())
	must(t, k.SetOptOut([]uint64{group.id}))

	for dir, want := range map[string]bool{l.cgroup: true, out: false, inner: false} {
		joinCgroup(t, dir)
		conn, err := dialer().Dial("tcp4", dst4.String())
		must(t, err)
		if !want {
			direct, err := listener.Accept()
			must(t, err)
			_ = direct.Close()
		} else if got, err := answer(conn); got != dst4.String() {
			t.Errorf("in %s: %q (%v)", dir, got, err)
		}
		_ = conn.Close()
	}
	if c := stats(t, k); c.OptedOut != 2 || c.RedirectedHost4 != 1 {
		t.Errorf("counted %d opted out, %d redirected", c.OptedOut, c.RedirectedHost4)
	}
	// Opted in again, in a cgroup below the one that is attached to.
	must(t, k.SetOptOut(nil))
	joinCgroup(t, inner)
	if got, err := ask(dialer(), "tcp4", dst4.String()); got != dst4.String() {
		t.Errorf("opted in again: %q (%v)", got, err)
	}
}

func TestHostOnly(t *testing.T) {
	l := newLab(t)
	l.addPod()
	k, _ := l.ready(func(o *Options) { o.HostOnly = true })
	in(l.pod, func() {
		configure(t, "lo", edge4)
		listener, err := net.Listen("tcp4", dst4.String())
		if err != nil {
			t.Error(err)
			return
		}
		defer listener.Close()
		conn, err := dialer().Dial("tcp4", dst4.String())
		if err != nil {
			t.Error(err)
			return
		}
		_ = conn.Close()
	})
	if got, err := ask(dialer(), "tcp4", dst4.String()); got != dst4.String() {
		t.Errorf("host: %q (%v)", got, err)
	}
	if c := stats(t, k); c.PodSkipped != 1 || c.RedirectedHost4 != 1 {
		t.Errorf("counted %d skipped, %d redirected", c.PodSkipped, c.RedirectedHost4)
	}
}
