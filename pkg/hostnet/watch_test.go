// SPDX-License-Identifier: Apache-2.0

package hostnet

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netns"
)

// eth0 is a link whose carrier is the other end, eth0p.
const eth0 = `
link set lo up
link add eth0 type veth peer name eth0p
link set eth0 up
link set eth0p up
`

// noDAD makes new IPv6 addresses usable at once, where the test is not about that.
func noDAD(t *testing.T) { sysctl(t, "ipv6/conf/default/accept_dad", "0") }

func TestWatchAddresses(t *testing.T) {
	ns := enter(t)
	noDAD(t)
	w := watch(t, ns, &Watcher{})
	if gained := w.until(t, "nothing, at first", func(c Change) bool { return len(c.Local) == 0 && !c.V4.IsValid() }); gained {
		t.Error("the first state is no gain")
	}

	ip(t, eth0)
	w.until(t, "loopback", func(c Change) bool { return has(c.Local, "127.0.0.1") && has(c.Local, "::1") && !c.V4.IsValid() })

	ip(t, "addr add 10.0.0.1/24 dev eth0\naddr add 2001:db8::1/64 dev eth0\n")
	gained := w.until(t, "both families", func(c Change) bool {
		return has(c.Local, "10.0.0.1") && has(c.Local, "2001:db8::1") &&
			c.V4 == netip.MustParseAddr("10.0.0.1") && c.V6 == netip.MustParseAddr("2001:db8::1")
	})
	if !gained {
		t.Error("the first global addresses are a gain")
	}

	ip(t, "addr add 10.0.0.2/24 dev eth0\naddr del 10.0.0.1/24 dev eth0\naddr add 10.0.0.2/24 dev eth0\n")
	w.until(t, "another address", func(c Change) bool {
		return !has(c.Local, "10.0.0.1") && has(c.Local, "10.0.0.2") && c.V4 == netip.MustParseAddr("10.0.0.2")
	})

	ip(t, "addr flush dev eth0\n")
	if gained := w.until(t, "no address", func(c Change) bool { return !c.V4.IsValid() && !c.V6.IsValid() }); gained {
		t.Error("a loss is no gain")
	}
	w.quiet(t)
}

func TestWatchDefaultRoute(t *testing.T) {
	ns := enter(t)
	ip(t, eth0+`
link add eth1 type veth peer name eth1p
link set eth1 up
link set eth1p up
addr add 10.0.0.1/24 dev eth0
addr add 10.1.0.1/24 dev eth1
`)
	w := watch(t, ns, &Watcher{})
	source := func(addr string) func(Change) bool {
		return func(c Change) bool { return c.V4 == netip.MustParseAddr(addr) }
	}
	w.until(t, "first address", source("10.0.0.1"))
	ip(t, "route add default via 10.1.0.254\n")
	if !w.until(t, "source of the default route", source("10.1.0.1")) {
		t.Error("a default route is a gain")
	}
	ip(t, "route replace default via 10.0.0.254\n")
	if !w.until(t, "source of the new default route", source("10.0.0.1")) {
		t.Error("another default route is a gain")
	}
	ip(t, "route del default\nroute add default via 10.1.0.254\n") // within one burst
	w.until(t, "source of the first one again", source("10.1.0.1"))
	ip(t, "route del default\n")
	if w.until(t, "first address again", source("10.0.0.1")) {
		t.Error("a loss is no gain")
	}

	// The addresses are as before, but there is a new way out.
	ip(t, "route add 172.16.0.0/12 via 10.0.0.254\n")
	if !w.until(t, "gateway route", source("10.0.0.1")) {
		t.Error("a gateway route is a gain")
	}
	// What a pod's start does is no reason to dial again.
	ip(t, "link add veth1 type veth peer name veth1p\nlink set veth1 addrgenmode none\nlink set veth1p addrgenmode none\nlink set veth1 up\nlink set veth1p up\nroute add 10.244.0.7/32 dev veth1\n")
	w.quiet(t)
}

func TestWatchLink(t *testing.T) {
	ns := enter(t)
	noDAD(t)
	ip(t, eth0+"addr add 10.0.0.1/24 dev eth0\nroute add default via 10.0.0.254\n")
	w := watch(t, ns, &Watcher{})
	up := func(c Change) bool { return c.V4 == netip.MustParseAddr("10.0.0.1") }
	w.until(t, "address", up)

	for _, end := range []string{"eth0p", "eth0"} { // the cable, then the administrator
		ip(t, "link set "+end+" down\n")
		time.Sleep(4 * settle) // a shorter flap may go unseen
		ip(t, "link set "+end+" up\n")
		if !w.until(t, "link up", func(c Change) bool { return up(c) && c.Gained }) {
			t.Error(end, "up again is a gain")
		}
	}

	ip(t, "link del eth0\n")
	w.until(t, "no link", func(c Change) bool { return !c.V4.IsValid() && !has(c.Local, "10.0.0.1") })
}

// An IPv6 address is local at once, but nobody can be sent there before the kernel knows that it is the only one.
func TestWatchDuplicateAddressDetection(t *testing.T) {
	ns := enter(t)
	ip(t, eth0)
	w := watch(t, ns, &Watcher{})
	tentative := false
	ip(t, "addr add 2001:db8::1/64 dev eth0\n")
	w.until(t, "the address, when it is ready", func(c Change) bool {
		tentative = tentative || has(c.Local, "2001:db8::1") && !c.V6.IsValid()
		return c.V6 == netip.MustParseAddr("2001:db8::1")
	})
	if !tentative {
		t.Error("did not see the address before it was ready")
	}
}

func TestDuplicateAddressDetectionFails(t *testing.T) {
	other := enter(t)
	noDAD(t)
	ns := enter(t)
	ip(t, fmt.Sprintf("link add eth0 type veth peer name eth0p netns /proc/%d/fd/%d\nlink set eth0 up\n", os.Getpid(), other))
	if err := netns.Set(other); err != nil {
		t.Fatal(err)
	}
	ip(t, "link set eth0p up\naddr add 2001:db8::1/64 dev eth0p nodad\n")
	if err := netns.Set(ns); err != nil {
		t.Fatal(err)
	}
	time.Sleep(100 * time.Millisecond) // the carrier's

	// accept_dad is still on here: the setting belongs to the other namespace.
	ip(t, "addr add 2001:db8::1/64 dev eth0\n")
	h, err := openHandle()
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		addrs, err := h.AddrList(nil, 10)
		if err != nil {
			t.Fatal(err)
		}
		failed := false
		for _, a := range addrs {
			failed = failed || a.Flags&ifaDADFailed != 0
		}
		if failed {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the kernel did not notice the duplicate")
		}
	}
	if s := read(t); s.V6.IsValid() || !has(s.Local, "2001:db8::1") {
		t.Errorf("a duplicate address was chosen: %+v", s)
	}
}

func TestWatchCoalescesAndSurvivesOverruns(t *testing.T) {
	ns := enter(t)
	ip(t, eth0)
	w := watch(t, ns, &Watcher{receiveBuffer: 1}) // the kernel makes it as small as it can
	w.until(t, "first state", func(c Change) bool { return has(c.Local, "127.0.0.1") })

	var add, del strings.Builder
	for i := range 250 {
		fmt.Fprintf(&add, "addr add 10.0.%d.1/24 dev eth0\n", i)
		fmt.Fprintf(&del, "addr del 10.0.%d.1/24 dev eth0\n", i)
	}
	for round := 0; w.Stats().Overruns == 0; round++ {
		if round == 50 {
			t.Fatal("could not overrun the socket")
		}
		ip(t, add.String())
		w.until(t, "all addresses", func(c Change) bool { return has(c.Local, "10.0.249.1") && len(c.Local) >= 252 })
		ip(t, del.String())
		w.until(t, "none of them", func(c Change) bool { return !has(c.Local, "10.0.0.1") && !has(c.Local, "10.0.249.1") })
	}
	if s := w.Stats(); s.Looks > 200 || s.Failures != 0 {
		t.Errorf("stats %+v", s)
	}
	ip(t, "addr add 10.9.0.1/24 dev eth0\n") // and it still hears
	w.until(t, "one more address", func(c Change) bool { return has(c.Local, "10.9.0.1") })
}

func TestWatchBrokenSubscription(t *testing.T) {
	ns := enter(t)
	ip(t, eth0)
	var subs []*subscription // touched by Run's goroutine only, until it is over
	changed := make(chan struct{}, 100)
	w := &Watcher{Changed: func(Change) { changed <- struct{}{} }}
	w.onSubscribe = func(s *subscription) {
		if subs = append(subs, s); len(subs) == 1 {
			s.sock.Close()
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if err := netns.Set(ns); err != nil {
			done <- err
			return
		}
		done <- w.Run(ctx)
	}()
	<-changed
	for deadline := time.Now().Add(10 * time.Second); w.Stats().Failures == 0 && time.Now().Before(deadline); {
		time.Sleep(10 * time.Millisecond)
	}
	ip(t, "addr add 10.0.0.1/24 dev eth0\n") // while nobody listens
	<-changed
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if len(subs) != 2 || w.Stats().Failures != 1 {
		t.Errorf("%d subscriptions, stats %+v", len(subs), w.Stats())
	}
}

func TestWatchEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	w := &Watcher{Changed: func(Change) { t.Error("told after the end") }}
	if err := w.Run(ctx); err != nil {
		t.Error(err)
	}
}
