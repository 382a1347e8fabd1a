// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/edge-tunnel/edge-tunnel/test/netlab"
)

// installed is what a restart must not multiply.
type installed struct {
	links map[string]link.ID
	maps  map[string]ebpf.MapID
	count int // programs on the hooks
}

func (l *lab) installed(k *Kernel) installed {
	t := l.t
	t.Helper()
	now := installed{links: map[string]link.ID{}, maps: map[string]ebpf.MapID{}}
	for _, h := range hooks() {
		pinned, err := link.LoadPinnedLink(k.pins.linkPin(h.name), nil)
		must(t, err)
		info, err := pinned.Info()
		must(t, err)
		now.links[h.name] = info.ID
		must(t, pinned.Close())
	}
	for name := range mapSet(nil).names(k.spec) {
		m, err := ebpf.LoadPinnedMap(k.pins.mapPin(name), nil)
		must(t, err)
		info, err := m.Info()
		must(t, err)
		now.maps[name], _ = info.ID()
		must(t, m.Close())
	}
	list, err := k.Programs()
	must(t, err)
	now.count = len(list)
	left, err := os.ReadDir(k.pins.staging())
	must(t, err)
	if len(left) != 0 {
		t.Errorf("left in the staging folder: %v", left)
	}
	return now
}

func TestRestartReusesEverything(t *testing.T) {
	l := newLab(t)
	k, s := l.ready()
	must(t, k.SetNodeAddrs(node4, netip.Addr{}))
	must(t, k.SetOptOut([]uint64{12345}))
	must(t, k.SetState([]netip.Addr{edge6}, Offline))
	before, targets := l.installed(k), k.Targets()
	s.stop()
	must(t, k.Close())

	// Nobody is there: still intercepted, still in the kernel's state.
	if _, err := ask(dialer(), "tcp4", dst4.String()); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("without a daemon: %v, want ECONNREFUSED", err)
	}
	if _, err := ask(dialer(), "tcp6", dst6.String()); !errors.Is(err, offlineUnserved(t, k)) {
		t.Errorf("offline target without a daemon: %v, want %v", err, offlineUnserved(t, k))
	}

	k = l.open()
	if got := k.Targets(); !slices.Equal(got, targets) {
		t.Errorf("targets after the restart: %v, want %v", got, targets)
	}
	if got := k.TunneledPorts(); !slices.Equal(got, []uint16{edgePort}) {
		t.Errorf("ports after the restart: %v", got)
	}
	if v4, v6 := k.NodeAddrs(); v4 != node4 || v6.IsValid() {
		t.Errorf("node addresses after the restart: %s, %s", v4, v6)
	}
	l.serve(k)
	if got, err := ask(dialer(), "tcp4", dst4.String()); got != dst4.String() {
		t.Errorf("before Attach: %q (%v)", got, err)
	}
	must(t, k.Attach())
	if got, err := ask(dialer(), "tcp4", dst4.String()); got != dst4.String() {
		t.Errorf("after Attach: %q (%v)", got, err)
	}
	after := l.installed(k)
	for name, id := range before.links {
		if after.links[name] != id {
			t.Errorf("link of %s is another one", name)
		}
	}
	for name, id := range before.maps {
		if after.maps[name] != id {
			t.Errorf("map %s is another one", name)
		}
	}
	if after.count != len(hooks()) {
		t.Errorf("%d programs on %d hooks", after.count, len(hooks()))
	}
	if err := k.Health(); err != nil {
		t.Error(err)
	}
	if len(k.optOuts) != 1 || k.config.OptOuts != 1 {
		t.Error("opted-out cgroups are lost")
	}
}

// TestIncompatibleMapsAreReplaced: a map of another shape is replaced, with its contents where they still mean the same, and the
// former programs work with the former maps until Attach.
func TestIncompatibleMapsAreReplaced(t *testing.T) {
	l := newLab(t)
	k, s := l.ready()
	must(t, k.SetState([]netip.Addr{edge6}, Offline))
	targets := k.Targets()
	s.stop()
	before := l.installed(k)

	// As if an older version had sized these maps otherwise.
	for _, name := range []string{kernelMapPorts, kernelMapCounters, kernelMapInFlightPods} {
		spec := k.spec.Maps[name].Copy()
		switch name {
		case kernelMapCounters:
			spec.ValueSize -= 8
			spec.Value = nil
		default:
			spec.MaxEntries /= 2
		}
		old, err := ebpf.NewMap(spec)
		must(t, err)
		must(t, carryOver(k.maps[name], old))
		must(t, k.pins.replace(old, k.pins.mapPin(name)))
		must(t, old.Close())
	}
	must(t, k.Close())

	k = l.open()
	if _, err := ask(dialer(), "tcp6", dst6.String()); !errors.Is(err, offlineUnserved(t, k)) {
		t.Errorf("before Attach: %v, want %v from the former programs", err, offlineUnserved(t, k))
	}
	if got := k.Targets(); !slices.Equal(got, targets) {
		t.Errorf("targets: %v, want %v", got, targets)
	}
	if got := k.TunneledPorts(); !slices.Equal(got, []uint16{edgePort}) {
		t.Errorf("ports: %v", got)
	}
	l.serve(k)
	must(t, k.Attach())
	after := l.installed(k)
	for _, name := range []string{kernelMapPorts, kernelMapCounters, kernelMapInFlightPods} {
		if after.maps[name] == before.maps[name] {
			t.Errorf("map %s was not replaced", name)
		}
	}
	for _, name := range []string{kernelMapTargets, kernelMapSockets, kernelMapConfig} {
		if after.maps[name] != before.maps[name] {
			t.Errorf("map %s was replaced", name)
		}
	}
	if got, err := ask(dialer(), "tcp4", dst4.String()); got != dst4.String() {
		t.Errorf("after Attach: %q (%v)", got, err)
	}
	if err := k.Canary(t.Context()).Err(); err != nil {
		t.Error(err)
	}
}

func TestOtherLayoutIsReplaced(t *testing.T) {
	l := newLab(t)
	k, s := l.ready()
	s.stop()
	before := l.installed(k)
	k.config.Layout = 99
	must(t, k.writeConfig())
	must(t, k.Close())
	if _, err := ReadPinned(l.bpffs); err == nil {
		t.Error("ReadPinned read another layout")
	}

	k = l.open()
	if n := len(k.Targets()); n != 0 {
		t.Errorf("%d targets were taken over from another layout", n)
	}
	if _, err := ask(dialer(), "tcp4", dst4.String()); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("before Attach: %v, want ECONNREFUSED: the former state is in force", err)
	}
	l.fill(k)
	l.serve(k)
	must(t, k.Attach())
	if got, err := ask(dialer(), "tcp4", dst4.String()); got != dst4.String() {
		t.Errorf("after Attach: %q (%v)", got, err)
	}
	after := l.installed(k)
	for name, id := range before.maps {
		if after.maps[name] == id {
			t.Errorf("map %s was not replaced", name)
		}
	}
	for name, id := range before.links {
		if after.links[name] != id {
			t.Errorf("link of %s is another one", name)
		}
	}
}

// TestFailedStartLeavesTheSettings: what a start with other options wants counts from its Attach on, if that succeeds. Until then
// connects go where the predecessor's listeners were, and not to whoever has the other ports.
func TestFailedStartLeavesTheSettings(t *testing.T) {
	l := newLab(t)
	k, s := l.ready()
	must(t, k.SetNodeAddrs(node4, netip.Addr{}))
	s.stop()
	must(t, k.Close())
	before, err := ReadPinned(l.bpffs)
	must(t, err)
	for port := range uint16(Ports) {
		stranger, err := net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 20000+port)))
		must(t, err)
		t.Cleanup(func() { _ = stranger.Close() })
	}
	unchanged := func(when string) {
		t.Helper()
		now, err := ReadPinned(l.bpffs)
		must(t, err)
		if now.RedirectPort != before.RedirectPort || now.HostOnly != before.HostOnly || !slices.Equal(now.NodeAddrs, before.NodeAddrs) {
			t.Errorf("%s: redirect port %d, host only %t, node addresses %v", when, now.RedirectPort, now.HostOnly, now.NodeAddrs)
		}
		if _, err := ask(dialer(), "tcp4", dst4.String()); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("%s: %v, want ECONNREFUSED", when, err)
		}
	}

	// A cgroup whose last hooks cannot be attached to.
	taken := l.newCgroup(l.cgroup)
	t.Cleanup(func() { must(t, netlab.RemoveCgroup(taken)) })
	group, err := openCgroup(taken)
	must(t, err)
	defer func() { _ = group.Close() }()
	must(t, link.RawAttachProgram(link.RawAttachProgramOptions{Target: int(group.Fd()), Program: l.balancer(), Attach: ebpf.AttachCGroupInet4Connect}))

	k = l.open(func(o *Options) { o.RedirectPort, o.HostOnly, o.CgroupRoot = 20000, true, taken })
	unchanged("opened")
	must(t, k.SetNodeAddrs(netip.Addr{}, node6))
	unchanged("told its addresses")
	for range 2 {
		if err := k.Attach(); !errors.Is(err, unix.EPERM) {
			t.Fatalf("attach: %v, want EPERM", err)
		}
		unchanged("attach failed")
	}
	must(t, k.Close())
	unchanged("closed")

	k = l.open(func(o *Options) { o.RedirectPort, o.HostOnly = 21000, true })
	l.serve(k)
	must(t, k.SetNodeAddrs(netip.Addr{}, node6))
	must(t, k.Attach())
	if got, err := ask(dialer(), "tcp4", dst4.String()); got != dst4.String() {
		t.Errorf("after Attach: %q (%v)", got, err)
	}
	now, err := ReadPinned(l.bpffs)
	must(t, err)
	if now.RedirectPort != 21000 || !now.HostOnly || !slices.Equal(now.NodeAddrs, []netip.Addr{node6}) {
		t.Errorf("after Attach: redirect port %d, host only %t, node addresses %v", now.RedirectPort, now.HostOnly, now.NodeAddrs)
	}
}

func TestSuccessorWaits(t *testing.T) {
	l := newLab(t)
	k, s := l.ready()
	s.stop()
	waits := 0
	opts := l.options()
	opts.OnWait = func(string) { waits++ }
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	_, err := Open(ctx, opts)
	if !errors.Is(err, ErrInUse) || !errors.Is(err, context.DeadlineExceeded) || waits != 1 {
		t.Errorf("%v after %d announcements, want ErrInUse after one", err, waits)
	}
	if err := Cleanup(l.bpffs); !errors.Is(err, ErrInUse) {
		t.Errorf("cleanup beside a daemon: %v, want ErrInUse", err)
	}

	opts.OnWait = func(string) { must(t, k.Close()) }
	successor, err := Open(t.Context(), opts)
	must(t, err)
	must(t, successor.Close())
}

func TestCleanup(t *testing.T) {
	l := newLab(t)
	must(t, Cleanup(l.bpffs)) // nothing there
	if _, err := ReadPinned(l.bpffs); !errors.Is(err, ErrNotInstalled) {
		t.Errorf("nothing there: %v, want ErrNotInstalled", err)
	}
	k, s := l.ready()
	must(t, k.SetNodeAddrs(node4, node6))
	pinned, err := ReadPinned(l.bpffs)
	must(t, err)
	want := []Target{{edge4, "edge-1", Online}, {edge6, "edge-1", Online}}
	if !slices.Equal(pinned.Targets, want) || !slices.Equal(pinned.Ports, []uint16{edgePort}) || pinned.RedirectPort != DefaultPort ||
		!slices.Equal(pinned.NodeAddrs, []netip.Addr{node4, node6}) || len(pinned.Detached) != 0 {
		t.Errorf("pinned: %+v", pinned)
	}
	s.stop()
	must(t, k.Close())
	must(t, Cleanup(l.bpffs))
	if _, err := os.Stat(k.pins.root()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("left behind: %s (%v)", k.pins.root(), err)
	}
	group, err := openCgroup(l.cgroup)
	must(t, err)
	defer group.Close()
	for _, h := range hooks() {
		list, err := link.QueryPrograms(link.QueryOptions{Target: int(group.Fd()), Attach: h.attach})
		must(t, err)
		if len(list.Programs) != 0 {
			t.Errorf("%s is still attached", h.name)
		}
	}
}

func TestOpenExplains(t *testing.T) {
	l := newLab(t)
	hint := func(err error) string {
		var hinted interface{ Hint() string }
		if errors.As(err, &hinted) {
			return hinted.Hint()
		}
		return ""
	}
	plain := t.TempDir()
	_, err := Open(t.Context(), Options{BPFFS: plain})
	if err == nil || !strings.Contains(hint(err), "mount -t bpf") {
		t.Errorf("plain folder: %v (%s)", err, hint(err))
	}
	_, err = Open(t.Context(), Options{BPFFS: filepath.Join(plain, "missing")})
	if err == nil || !strings.Contains(hint(err), "mount -t bpf") {
		t.Errorf("missing folder: %v (%s)", err, hint(err))
	}
	k := l.open(func(o *Options) { o.CgroupRoot = plain })
	if err := k.Attach(); err == nil || !strings.Contains(hint(err), "cgroup2") {
		t.Errorf("no cgroup: %v (%s)", err, hint(err))
	}
}
