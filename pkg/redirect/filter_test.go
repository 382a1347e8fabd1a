// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"math/bits"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// randomTargets are distinct, of both families and offline: nobody has to listen.
func randomTargets(n int) []Target {
	random := rand.New(rand.NewPCG(1, 2))
	byAddr := map[netip.Addr]Target{}
	for len(byAddr) < n {
		b := [16]byte{0: 0xfd, 1: 0x99}
		for i := 2; i < 16; i++ {
			b[i] = byte(random.Uint32())
		}
		for _, addr := range []netip.Addr{netip.AddrFrom16(b), netip.AddrFrom4([4]byte{10, b[3], b[4], b[5]})} {
			byAddr[addr] = Target{addr, "edge-1", Offline}
		}
	}
	var list []Target
	for _, target := range byAddr {
		list = append(list, target)
	}
	return sortTargets(list)
}

// twin is another address that has the same bit among addresses.
func twin(k *Kernel, addr netip.Addr) netip.Addr {
	want := k.filter.places(addr)[1]
	for other := netip.AddrFrom4([4]byte{10, 200, 0, 0}); ; other = other.Next() {
		if k.filter.places(other)[1] == want && other != addr {
			return other
		}
	}
}

// found connects to each target and returns how many of them the programs took for targets.
func found(t *testing.T, k *Kernel, list []Target) int {
	t.Helper()
	before := stats(t, k)
	for _, target := range list {
		family := unix.AF_INET
		if target.Addr.Is6() {
			family = unix.AF_INET6
		}
		s, err := newSocket(family, unix.IPPROTO_TCP)
		must(t, err)
		if err := s.connect(family, netip.AddrPortFrom(target.Addr, edgePort)); err == nil {
			t.Errorf("connected to %s, where nobody listens", target.Addr)
		}
		s.close()
	}
	return int(stats(t, k).Offline - before.Offline)
}

// TestNoTargetIsFiltered: the programs find every target behind the filter: those of before the daemon, those that were added before and after a
// map grew, and those that stay when others go.
func TestNoTargetIsFiltered(t *testing.T) {
	l := newLab(t)
	small := func(o *Options) { o.Capacity = 64 }
	k := l.open(small)
	must(t, k.SetPorts([]uint16{edgePort}))
	must(t, k.Attach())
	list := randomTargets(scaled(3600) + 400)
	check := func(what string, list []Target) {
		t.Helper()
		if n := found(t, k, list); n != len(list) {
			t.Errorf("%s: %d of %d targets were found", what, n, len(list))
		}
	}
	for _, n := range []int{40, 300, len(list)} {
		must(t, k.SetTargets(list[:n]))
		check("added", list[:n])
	}
	half := list[len(list)/2:]
	must(t, k.SetTargets(half))
	check("others removed", half)
	must(t, k.Close())

	k = l.open(small)
	check("before Attach", half)
	more := list[len(list)/4:]
	must(t, k.SetTargets(more))
	check("added before Attach", more)
	must(t, k.Attach())
	must(t, k.SetTargets(list))
	check("after Attach", list)
	must(t, k.Close())

	// A larger map is not in force before Attach, and what is has its own filter.
	k = l.open(func(o *Options) { o.Capacity = 1 << 15 })
	must(t, k.SetTargets(nil))
	check("the former map", list)
	must(t, k.SetTargets(list))
	must(t, k.Attach())
	check("the larger map", list)
}

// TestFilterOfPredecessors: an older version has none, and after a downgrade the one that is pinned does not know what that version added.
func TestFilterOfPredecessors(t *testing.T) {
	l := newLab(t)
	k := l.open()
	must(t, k.SetPorts([]uint16{edgePort}))
	list := randomTargets(8)
	must(t, k.SetTargets(list[:2]))
	must(t, k.Attach())
	must(t, k.putTargets(list[2:4]))
	if n := found(t, k, list[2:4]); n != 0 {
		t.Fatalf("%d targets were found without their bits: this tests nothing", n)
	}
	must(t, k.Close())
	k = l.open()
	if n := found(t, k, list[:4]); n != 4 {
		t.Errorf("after a downgrade %d of 4 targets were found", n)
	}
	must(t, k.Close())

	for _, name := range filterMaps {
		must(t, os.Remove(k.pins.mapPin(name)))
	}
	k = l.open()
	must(t, k.SetTargets(list))
	must(t, k.Attach())
	if n := found(t, k, list); n != len(list) {
		t.Errorf("after a version without filter %d of %d targets were found", n, len(list))
	}
	must(t, k.Close())
	k = l.open()
	must(t, k.SetTargets(list[1:])) // before Attach: the pinned filter is the one in force
	if n := found(t, k, list[1:]); n != len(list)-1 {
		t.Errorf("after a restart %d of %d targets were found", n, len(list)-1)
	}
}

// TestFilterForgets: bits go with the last target that has them, and not before.
func TestFilterForgets(t *testing.T) {
	l := newLab(t)
	k := l.open()
	must(t, k.SetPorts([]uint16{edgePort}))
	must(t, k.Attach())
	list := []Target{{edge4, "edge-1", Offline}, {twin(k, edge4), "edge-2", Offline}}
	must(t, k.SetTargets(list))
	for range 2 {
		if n := found(t, k, list); n != len(list) {
			t.Errorf("%d of %d targets with one bit were found", n, len(list))
		}
		list = list[:len(list)-1]
		must(t, k.SetTargets(list))
	}
	if n := found(t, k, []Target{{edge4, "", 0}}); n != 0 {
		t.Error("a target is still there")
	}
	must(t, k.SetTargets(randomTargets(scaled(1000)+50)))
	must(t, k.SetTargets(nil))
	for _, name := range filterMaps {
		set := 0
		var at uint32
		var word uint64
		entries := k.maps[name].Iterate()
		for entries.Next(&at, &word) {
			set += bits.OnesCount64(word)
		}
		must(t, entries.Err())
		if set != len(canaryAddrs()) {
			t.Errorf("%s: %d bits are set without targets, want the canary's %d", name, set, len(canaryAddrs()))
		}
	}
}

// TestFilterChangesUnderLoad: a target that stays is never missed while others with its bit, and many without, come and go.
func TestFilterChangesUnderLoad(t *testing.T) {
	l := newLab(t)
	k := l.open()
	must(t, k.SetPorts([]uint16{edgePort}))
	stays := []Target{{edge4, "edge-1", Offline}, {edge6, "edge-1", Offline}}
	must(t, k.SetTargets(stays))
	must(t, k.Attach())
	stop, done := make(chan struct{}), make(chan int)
	go in(l.host, func() {
		connects := 0
		defer func() { done <- connects }()
		for {
			select {
			case <-stop:
				return
			default:
			}
			connects += found(t, k, stays)
		}
	})
	others := append(randomTargets(200), Target{twin(k, edge4), "edge-2", Offline}, Target{twin(k, edge6), "edge-2", Offline})
	for i := range scaled(100) + 10 {
		if i%2 == 0 {
			must(t, k.SetTargets(append(slices.Clone(others), stays...)))
		} else {
			must(t, k.SetTargets(stays))
		}
	}
	close(stop)
	connects := <-done
	if c := stats(t, k); c.Missed != 0 || connects == 0 {
		t.Errorf("%d connects found their target, %d did not", connects, c.Missed)
	}
}

// TestFilterIsSparse: addresses as networks give them out do not crowd on few bits, nor share them with their neighbours.
func TestFilterIsSparse(t *testing.T) {
	const n, words = 1 << 13, 1 << 12
	block := func(b [16]byte, n int) (addrs []netip.Addr) {
		for addr := netip.AddrFrom16(b).Unmap(); len(addrs) < n; addr = addr.Next() {
			addrs = append(addrs, addr)
		}
		return addrs
	}
	v4 := func(a, b byte) [16]byte { return netip.AddrFrom4([4]byte{a, b}).As16() }
	v6 := func(subnet byte) [16]byte { return [16]byte{0: 0xfd, 1: 0x99, 7: subnet} }
	var sites, few, other []netip.Addr // one address in each of many subnets, many in each of some
	for i := range n {
		sites = append(sites, netip.AddrFrom16([16]byte{0: 0x20, 1: 0x01, 5: byte(i >> 8), 6: byte(i), 15: 1}))
		few = append(few, netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x99, 7: byte(i >> 8), 15: byte(i)}))
		other = append(other, netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x98, 7: byte(i >> 8), 15: byte(i)}))
	}
	for name, c := range map[string]struct{ targets, others []netip.Addr }{
		"a block beside a block":   {block(v4(10, 99), n), block(v4(10, 98), n)},
		"a block and loopback":     {block(v4(10, 99), n), block(v4(127, 1), n)},
		"a subnet beside a subnet": {block(v6(1), n), block(v6(2), n)},
		"many subnets and one":     {sites, block(v6(2), n)},
		"some subnets and others":  {few, other},
		"two families":             {block(v4(10, 99), n), block(v6(2), n)},
		"four times as many":       {block(v4(10, 0), 4*n), block(v4(11, 0), n)},
	} {
		// Compared with what chance would give.
		f := filter{make([]uint64, 2048), make([]uint64, words)}
		networks := make(map[netip.Prefix]struct{})
		for _, addr := range c.targets {
			for i, at := range f.places(addr) {
				f[i][at.word] |= at.bit
			}
			networks[netip.PrefixFrom(addr, addr.BitLen()-8).Masked()] = struct{}{}
		}
		for i, n := range []int{len(networks), len(c.targets)} {
			set := 0
			for _, word := range f[i] {
				set += bits.OnesCount64(word)
			}
			if even := float64(n) * (1 - float64(n)/float64(2*64*len(f[i]))); float64(set) < 0.97*even {
				t.Errorf("%s, %s: %d have %d bits, want %.0f", name, filterMaps[i], n, set, even)
			}
		}
		var passed [2]int
		for _, addr := range c.others {
			for i, at := range f.places(addr) {
				if f[i][at.word]&at.bit != 0 {
					passed[i]++
				}
			}
		}
		if most := 1.2 * float64(len(c.others)) * float64(len(c.targets)) / (64 * words); float64(passed[1]) > most {
			t.Errorf("%s: %d of %d other addresses pass as addresses, want %.0f at most", name, passed[1], len(c.others), most)
		}
		// Whole networks share a bit: a few more than chance gives are chance, too.
		if most := len(c.others)/4096*len(networks)/32 + 512; passed[0] > most {
			t.Errorf("%s: %d of %d other addresses pass as networks, want %d at most", name, passed[0], len(c.others), most)
		}
	}
}
