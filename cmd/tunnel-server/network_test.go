// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/hostnet"
	"github.com/edge-tunnel/edge-tunnel/pkg/route"
)

// testNetwork is a network whose listeners and kernel are fakes; steps are in listenersFake.
type testNetwork struct {
	*network
	*listenersFake
	told    []route.Rules
	refuses error // by setAddrs
}

func newTestNetwork(fixed ...netip.Addr) *testNetwork {
	n := &testNetwork{}
	var r *redirects
	r, n.listenersFake = newRedirects()
	n.network = &network{
		fixed: fixed, loopback: []netip.Addr{netip.MustParseAddr("127.0.0.1")}, redirects: r, log: silent,
		rules: route.Rules{CIDRs: []netip.Prefix{netip.MustParsePrefix("10.99.0.0/16")}},
		setAddrs: func(v4, v6 netip.Addr) error {
			if n.refuses != nil {
				return n.refuses
			}
			n.steps = append(n.steps, fmt.Sprintf("kernel %s %s", shown(v4), shown(v6)))
			return nil
		},
		setRules: func(r route.Rules) {
			n.steps = append(n.steps, "rules")
			n.told = append(n.told, r)
		},
	}
	return n
}

// world changes what the fakes do; a retry may be under way.
func (n *testNetwork) world(change func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	change()
}

// took returns the steps since the last call, with all eight ports of an address as one.
func (n *testNetwork) took() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	var short []string
	for _, s := range n.steps {
		if addr, _, ok := strings.Cut(s, ":200"); ok {
			s = addr
		}
		if len(short) == 0 || short[len(short)-1] != s {
			short = append(short, s)
		}
	}
	n.steps = nil
	return short
}

func (n *testNetwork) wantSteps(t *testing.T, what string, want ...string) {
	t.Helper()
	if got := n.took(); !slices.Equal(got, want) {
		t.Errorf("%s:\n%q, want\n%q", what, got, want)
	}
}

func TestNetworkChangesInOrder(t *testing.T) {
	n := newTestNetwork()
	defer n.stop()
	ctx := t.Context()
	n.changed(ctx, hostnet.State{Local: []netip.Addr{addrA, addrC}, V4: addrA, V6: addrC})
	n.wantSteps(t, "start", "rules", "+10.0.0.1", "+[fd00::3]", "+127.0.0.1", "kernel 10.0.0.1 fd00::3")
	last := n.told[0]
	if !slices.Equal(last.Local, []netip.Addr{addrA, addrC}) || !slices.Equal(last.Redirect, []netip.Addr{addrA, addrC}) || len(last.CIDRs) != 1 {
		t.Errorf("rules %+v", last)
	}

	n.changed(ctx, hostnet.State{V4: addrB, V6: addrC})
	n.wantSteps(t, "address moved", "rules", "+10.0.0.2", "kernel 10.0.0.2 fd00::3", "-10.0.0.1")
	n.changed(ctx, hostnet.State{V4: addrB})
	n.wantSteps(t, "family gone", "rules", "kernel 10.0.0.2 none", "-[fd00::3]")
	if got := n.addrs(); !slices.Equal(got, []netip.Addr{addrB}) {
		t.Errorf("addrs %v", got)
	}
	if err := n.err(); err != nil {
		t.Error(err)
	}
	n.changed(ctx, hostnet.State{})
	n.wantSteps(t, "all gone", "rules", "kernel none none", "-10.0.0.2")
	if got := n.addrs(); len(got) != 0 {
		t.Errorf("addrs %v", got)
	}
}

func TestNetworkFixedAddress(t *testing.T) {
	n := newTestNetwork(addrB)
	defer n.stop()
	n.changed(t.Context(), hostnet.State{V4: addrA, V6: addrC})
	n.wantSteps(t, "start", "rules", "+10.0.0.2", "+[fd00::3]", "+127.0.0.1", "kernel 10.0.0.2 fd00::3")
	n.changed(t.Context(), hostnet.State{V4: addrC, V6: netip.Addr{}})
	n.wantSteps(t, "the other family is followed", "rules", "kernel 10.0.0.2 none", "-[fd00::3]")
	if got := n.told[1].Redirect; !slices.Equal(got, []netip.Addr{addrB}) {
		t.Errorf("redirect addresses %v", got)
	}
}

// A family whose listeners cannot be had is absent for the kernel, until they can: pods are refused, and go to nobody else.
func TestNetworkFamilyWithoutListeners(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newTestNetwork()
		defer n.stop()
		broken := true
		n.listen = func(addr netip.AddrPort) error {
			if broken && addr.Addr() == addrB {
				return errors.New("taken")
			}
			return nil
		}
		n.changed(t.Context(), hostnet.State{V4: addrA, V6: addrC})
		n.took()
		n.changed(t.Context(), hostnet.State{V4: addrB, V6: addrC})
		n.wantSteps(t, "taken", "rules", "kernel none fd00::3", "-10.0.0.1")
		if err := n.err(); err == nil || !strings.Contains(err.Error(), "redirect listeners: taken") {
			t.Errorf("%v", err)
		}
		time.Sleep(3 * retryListen)
		synctest.Wait()
		n.wantSteps(t, "still taken: no new rules, they cost a build", "kernel none fd00::3")
		n.world(func() { broken = false })
		time.Sleep(retryListen)
		synctest.Wait()
		n.wantSteps(t, "free", "+10.0.0.2", "kernel 10.0.0.2 fd00::3")
		if err := n.err(); err != nil {
			t.Error(err)
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		n.wantSteps(t, "nothing more to do")
	})
}

// While the kernel still sends pods to the old address, its listeners stay.
func TestNetworkKernelRefuses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newTestNetwork()
		defer n.stop()
		n.changed(t.Context(), hostnet.State{V4: addrA})
		n.took()
		n.refuses = errors.New("map is broken")
		n.changed(t.Context(), hostnet.State{V4: addrB})
		n.wantSteps(t, "refused", "rules", "+10.0.0.2")
		if got := n.addrs(); !slices.Equal(got, []netip.Addr{addrA}) || n.err() == nil {
			t.Errorf("addrs %v, err %v", got, n.err())
		}
		n.world(func() { n.refuses = nil })
		time.Sleep(retryListen)
		synctest.Wait()
		n.wantSteps(t, "taken at last", "kernel 10.0.0.2 none", "-10.0.0.1")
	})
}

func TestNetworkStops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, how := range []string{"stop", "context"} {
			n := newTestNetwork()
			n.refuses = errors.New("no")
			ctx, cancel := context.WithCancel(t.Context())
			n.changed(ctx, hostnet.State{V4: addrA})
			if how == "stop" {
				n.stop()
			} else {
				cancel()
			}
			n.world(func() { n.refuses = nil })
			n.took()
			time.Sleep(time.Minute)
			synctest.Wait()
			n.wantSteps(t, how)
			cancel()
		}
	})
}
