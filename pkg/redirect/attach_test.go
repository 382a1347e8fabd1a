// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/edge-tunnel/edge-tunnel/test/netlab"
)

// balancer is another agent's program: it sends connections to a Service address to an edge address.
func (l *lab) balancer() *ebpf.Program {
	l.t.Helper()
	service := netip.MustParseAddr("10.96.0.1").As4()
	backend := edge4.As4()
	word := func(b [4]byte) int32 {
		return int32(uint32(b[0]) | uint32(b[1])<<8 | uint32(b[2])<<16 | uint32(b[3])<<24)
	}
	const userIP4 = 4 // offset in struct bpf_sock_addr
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "balancer", Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, License: "GPL",
		Instructions: asm.Instructions{
			asm.LoadMem(asm.R2, asm.R1, userIP4, asm.Word),
			asm.JNE.Imm32(asm.R2, word(service), "out"),
			asm.Mov.Imm32(asm.R3, word(backend)),
			asm.StoreMem(asm.R1, userIP4, asm.R3, asm.Word),
			asm.Mov.Imm(asm.R0, 1).WithSymbol("out"),
			asm.Return(),
		},
	})
	must(l.t, err)
	l.t.Cleanup(func() { must(l.t, p.Close()) })
	return p
}

func (l *lab) attachLink(p *ebpf.Program) *link.RawLink {
	l.t.Helper()
	group, err := openCgroup(l.cgroup)
	must(l.t, err)
	defer group.Close()
	other, err := link.AttachRawLink(link.RawLinkOptions{Target: int(group.Fd()), Program: p, Attach: ebpf.AttachCGroupInet4Connect})
	must(l.t, err)
	return other
}

// TestBehindOthers: another program on the hook, attached before ours or after.
func TestBehindOthers(t *testing.T) {
	l := newLab(t)
	balancer := l.balancer()
	const service = "10.96.0.1:10250"

	first := l.attachLink(balancer)
	k, s := l.ready()
	if got, err := ask(dialer(), "tcp4", service); got != dst4.String() {
		t.Errorf("attached before ours: %q (%v)", got, err)
	}
	must(t, first.Close())

	// A client connects all the while that ours moves behind a program that was attached later. Not one connection may be lost.
	stop, done := make(chan struct{}), make(chan int)
	go in(l.host, func() {
		n := 0
		for {
			select {
			case <-stop:
				done <- n
				return
			default:
			}
			if got, err := ask(dialer(), "tcp4", dst4.String()); got != dst4.String() {
				t.Errorf("while moving: %q (%v)", got, err)
			}
			n++
		}
	})
	for range 10 {
		after := l.attachLink(balancer)
		must(t, k.Attach())
		list, err := k.Programs()
		must(t, err)
		var names []string
		for _, p := range list {
			if p.Hook == kernelProgConnect4 {
				names = append(names, p.Name)
			}
		}
		if got := strings.Join(names, " "); got != "balancer connect4" {
			t.Errorf("order on connect4: %s", got)
		}
		if got, err := ask(dialer(), "tcp4", service); got != dst4.String() {
			t.Errorf("attached after ours: %q (%v)", got, err)
		}
		must(t, after.Close())
	}
	close(stop)
	t.Log("connections meanwhile:", <-done)
	if n := s.unknown.Load(); n != 0 {
		t.Errorf("%d connections lost their origin", n)
	}
	if now := l.installed(k); now.count != len(hooks()) {
		t.Errorf("%d programs on %d hooks", now.count, len(hooks()))
	}
}

// TestAttachRollsBack: a program that allows no other beside it.
func TestAttachRollsBack(t *testing.T) {
	l := newLab(t)
	group, err := openCgroup(l.cgroup)
	must(t, err)
	defer group.Close()
	alone := link.RawAttachProgramOptions{Target: int(group.Fd()), Program: l.balancer(), Attach: ebpf.AttachCGroupInet4Connect}
	must(t, link.RawAttachProgram(alone))

	k := l.open()
	l.fill(k)
	err = k.Attach()
	var hinted interface{ Hint() string }
	if !errors.Is(err, unix.EPERM) || !errors.As(err, &hinted) || !strings.Contains(hinted.Hint(), "BPF_F_ALLOW_MULTI") {
		t.Errorf("%v, want EPERM with a hint", err)
	}
	for _, dir := range []string{k.pins.links(), k.pins.staging()} {
		left, err := os.ReadDir(dir)
		must(t, err)
		if len(left) != 0 {
			t.Errorf("left in %s: %v", dir, left)
		}
	}
	list, err := k.Programs()
	must(t, err)
	if len(list) != 1 || list[0].Ours {
		t.Errorf("still attached: %v", list)
	}

	must(t, link.RawDetachProgram(link.RawDetachProgramOptions{Target: int(group.Fd()), Program: alone.Program, Attach: alone.Attach}))
	l.serve(k)
	must(t, k.Attach())
	must(t, k.Canary(t.Context()).Err())
}

// TestDeadCgroup: links on a cgroup that was removed look well, and do nothing.
func TestDeadCgroup(t *testing.T) {
	l := newLab(t)
	root := filepath.Join(l.cgroup, "node")
	must(t, os.Mkdir(root, 0o755))
	joinCgroup(t, root)
	t.Cleanup(func() {
		joinCgroup(t, l.cgroup)
		must(t, netlab.RemoveCgroup(root))
	})
	k, s := l.ready(func(o *Options) { o.CgroupRoot = root })
	must(t, k.Health())
	must(t, k.Canary(t.Context()).Err())

	joinCgroup(t, l.cgroup)
	must(t, netlab.RemoveCgroup(root))
	must(t, os.Mkdir(root, 0o755))
	joinCgroup(t, root)
	if k.Health() == nil {
		t.Error("health did not notice")
	}
	if k.Canary(t.Context()).Err() == nil {
		t.Error("the canary arrived through a dead cgroup")
	}
	must(t, k.Attach())
	must(t, k.Health())
	s.stop() // its listeners are in the dead cgroup
	l.serve(k)
	must(t, k.Canary(t.Context()).Err())
}

// TestOtherCgroup: the option was changed between two starts.
func TestOtherCgroup(t *testing.T) {
	l := newLab(t)
	child := l.newCgroup(l.cgroup)
	joinCgroup(t, child)
	t.Cleanup(func() {
		joinCgroup(t, l.cgroup)
		must(t, netlab.RemoveCgroup(child))
	})
	k, s := l.ready(func(o *Options) { o.CgroupRoot = child })
	must(t, k.Canary(t.Context()).Err())
	s.stop()
	must(t, k.Close())

	k = l.open()
	l.serve(k)
	must(t, k.Attach())
	for _, dir := range []string{child, l.cgroup} {
		joinCgroup(t, dir)
		if got, err := ask(dialer(), "tcp4", dst4.String()); got != dst4.String() {
			t.Errorf("in %s: %q (%v)", dir, got, err)
		}
	}
	if c := stats(t, k); c.RedirectedHost4 != 3 || c.Missed != 0 {
		t.Errorf("redirected %d, missed %d: the programs ran twice", c.RedirectedHost4, c.Missed)
	}
}

func TestCanaryNamesTheFamily(t *testing.T) {
	l := newLab(t)
	k, s := l.ready()
	must(t, k.Canary(t.Context()).Err())
	for _, listener := range s.listeners {
		if addr, err := netip.ParseAddrPort(listener.Addr().String()); err == nil && addr.Addr().Is6() {
			_ = listener.Close()
		}
	}
	r := k.Canary(t.Context())
	if r.IPv4 != nil || !errors.Is(r.IPv6, unix.ECONNREFUSED) {
		t.Errorf("IPv4: %v, IPv6: %v, want only IPv6 refused", r.IPv4, r.IPv6)
	}
	// The canary's addresses are redirected for nobody else.
	before := stats(t, k)
	d := dialer()
	d.Timeout = 100e6
	if got, err := ask(d, "tcp4", "192.0.2.1:10250"); err == nil {
		t.Errorf("somebody else's connection to the canary's address: %q", got)
	}
	if c := stats(t, k); c.RedirectedHost4 != before.RedirectedHost4 {
		t.Error("somebody else's connection to the canary's address was redirected")
	}
}
