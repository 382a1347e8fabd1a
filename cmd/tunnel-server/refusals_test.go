// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/kube"
	"github.com/edge-tunnel/edge-tunnel/pkg/route"
)

func TestRefusalsAreTold(t *testing.T) {
	shared := netip.MustParseAddr("10.1.0.1")
	table := route.Build([]route.Claim{{Node: "edge-1", Addrs: []netip.Addr{shared}}, {Node: "edge-2", Addrs: []netip.Addr{shared}}, {Node: "edge-3"}}, route.Rules{})
	r := newRefusals(table.Refusals)
	clock := time.Now()
	r.now = func() time.Time { return clock }
	r.login("edge-9", "denied")
	r.login("edge-8", "bad_request")
	r.login("edge-8", "not_tunneled")
	addrs := []kube.Refusal{{Node: "edge-1", Addr: shared, Reason: "ambiguous"}, {Node: "edge-2", Addr: shared, Reason: "ambiguous"}}
	want := append([]kube.Refusal{{Node: "edge-8", Reason: "not_tunneled"}, {Node: "edge-9", Reason: "denied"}}, addrs...)
	if got := r.list(); !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	clock = clock.Add(refusedFor + time.Second)
	if got := r.list(); !slices.Equal(got, addrs) {
		t.Errorf("%v, want %v", got, addrs)
	}
	for i := range maxRefused + 10 {
		r.login(fmt.Sprint("edge-", i), "denied")
	}
	if got := len(r.list()) - len(addrs); got != maxRefused {
		t.Errorf("%d", got)
	}
}
