// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/cilium/ebpf"
)

// manyTargets are distinct addresses, beginning with the two that clients of the tests use.
func manyTargets(n int) []Target {
	list := []Target{{edge4, "edge-1", Online}, {edge6, "edge-1", Online}}
	for i := len(list); i < n; i++ {
		addr := netip.AddrFrom4([4]byte{10, byte(100 + i>>16), byte(i >> 8), byte(i)})
		list = append(list, Target{addr, fmt.Sprintf("edge-%d", i), Offline})
	}
	return list
}

// TestMapGrowsUnderLoad: the target map is replaced by larger ones while a client connects; not one connection goes astray.
func TestMapGrowsUnderLoad(t *testing.T) {
	l := newLab(t)
	k, s := l.ready(func(o *Options) { o.Capacity = 8 })

	stop, done := make(chan struct{}), make(chan struct{})
	var connections atomic.Int64
	go in(l.host, func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
			}
			for network, dst := range map[string]netip.AddrPort{"tcp4": dst4, "tcp6": dst6} {
				if got, err := ask(dialer(), network, dst.String()); got != dst.String() {
					t.Errorf("while growing: %q (%v)", got, err)
				}
				connections.Add(1)
			}
		}
	})
	for n := 10; n <= 20000; n *= 2 {
		before := connections.Load()
		must(t, k.SetTargets(manyTargets(n)))
		for connections.Load() < before+4 { // some with each size
			select {
			case <-done:
				t.Fatal("the client ended")
			default:
			}
		}
	}
	close(stop)
	<-done
	t.Log("connections meanwhile:", connections.Load())
	if n := s.unknown.Load(); n != 0 {
		t.Errorf("%d connections without an origin", n)
	}
	if c := stats(t, k); c.Missed != 0 {
		t.Errorf("%d connections went direct", c.Missed)
	}
	targets := k.Targets()
	if now := l.installed(k); now.count != len(hooks()) {
		t.Errorf("%d programs on %d hooks", now.count, len(hooks()))
	}

	// The larger map is the one that a successor finds, and it may shrink in use, not in size.
	must(t, k.Close())
	k = l.open()
	if got := k.Targets(); len(got) != len(targets) || got[0] != targets[0] {
		t.Errorf("%d targets after the restart, want %d", len(got), len(targets))
	}
	must(t, k.SetTargets(manyTargets(2)))
	for _, name := range targetMaps {
		if k.maps[name].MaxEntries() < 10240 {
			t.Errorf("map %s shrank", name)
		}
	}
}

func TestTargetsAreChecked(t *testing.T) {
	l := newLab(t)
	k := l.open(func(o *Options) { o.Capacity, o.MaxTargets = 4, 6 })
	must(t, k.SetTargets(manyTargets(3)))

	good := Target{edge4, "edge-1", Online}
	for name, list := range map[string][]Target{
		"no address":  {{netip.Addr{}, "n", Online}},
		"unspecified": {{netip.IPv4Unspecified(), "n", Online}},
		"mapped":      {{netip.MustParseAddr("::ffff:10.0.0.1"), "n", Online}},
		"zone":        {{netip.MustParseAddr("fe80::1%eth0"), "n", Online}},
		"no state":    {{edge4, "n", 0}},
		"NUL":         {{edge4, "a\x00b", Online}},
		"long name":   {{edge4, strings.Repeat("n", 254), Online}},
		"twice":       {good, good},
	} {
		if err := k.SetTargets(list); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
	var many *TooManyTargetsError
	if err := k.SetTargets(manyTargets(7)); !errors.As(err, &many) || many.Reason() != "too_many_targets" {
		t.Errorf("too many: %v", err)
	}
	if n := len(k.Targets()); n != 3 {
		t.Errorf("%d targets in force after the refusals, want the 3 of before", n)
	}
	long := Target{edge4, strings.Repeat("n", 253), Ambiguous}
	must(t, k.SetTargets([]Target{long}))
	inMap, err := readTargets(k.maps[kernelMapTargets], k.maps[kernelMapTargetNodes])
	must(t, err)
	if len(inMap) != 1 || inMap[0] != long {
		t.Errorf("in the map: %v", inMap)
	}
	if err := k.SetPorts([]uint16{10250, 0}); err == nil {
		t.Error("port 0 was accepted")
	}
	must(t, k.SetPorts([]uint16{1, 65535, 10250}))
	must(t, k.SetPorts([]uint16{65535, 10255}))
	if ports, err := readPorts(k.maps[kernelMapPorts]); err != nil || len(ports) != 2 || ports[0] != 10255 || ports[1] != 65535 {
		t.Errorf("in the map: %v (%v)", ports, err)
	}
	for _, bad := range [][2]netip.Addr{
		{node6, netip.Addr{}}, {netip.Addr{}, node4}, {netip.MustParseAddr("127.0.0.1"), netip.Addr{}}, {netip.IPv4Unspecified(), netip.Addr{}},
	} {
		if err := k.SetNodeAddrs(bad[0], bad[1]); err == nil {
			t.Errorf("node addresses %v were accepted", bad)
		}
	}
}

// TestMapsCarryTypes: an operator reads the maps by their type information.
func TestMapsCarryTypes(t *testing.T) {
	l := newLab(t)
	k := l.open()
	for name := range mapSet(nil).names(k.spec) {
		info, err := k.maps[name].Info()
		must(t, err)
		if _, ok := info.BTFID(); !ok {
			t.Errorf("map %s has no type information", name)
		}
		if k.spec.Maps[name].Type == ebpf.Hash && k.spec.Maps[name].Key == nil {
			t.Errorf("map %s has an untyped key", name)
		}
	}
}
