// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"testing"

	"github.com/edge-tunnel/edge-tunnel/pkg/redirect"
)

func TestPodPath(t *testing.T) {
	// A look is what was counted since the one before; the first one is what an earlier process left.
	type look struct{ redirected4, redirected6, handedOver, accepted uint64 }
	idle := make([]look, podPatience+1)
	for _, c := range []struct {
		what  string
		looks []look
		want  string // "" is well
	}{
		{"nothing at all", []look{{}, {}, {}}, ""},
		{"what was before says nothing", []look{{redirected4: 100}}, ""},
		{"before and after do not add up", []look{{redirected4: 100}, {redirected4: podSilence - 1}}, ""},
		{"all arrive", []look{{}, {100, 100, 200, 200}}, ""},
		{"too few to judge", []look{{}, {redirected4: podSilence - 1}}, ""},
		{"none arrive", []look{{}, {redirected4: podSilence}}, "5 connects of pods were redirected to this node and none arrived: a host firewall"},
		{"none arrive, over several looks and families", []look{{}, {redirected4: 2}, {}, {redirected6: 3}}, "a host firewall"},
		{"answered, but not as themselves", []look{{}, {redirected6: 5, handedOver: 5}}, "SNAT"},
		{"first answered, then silent", []look{{}, {redirected4: 5, handedOver: 1}, {redirected4: 1}}, "6 connects"},
		{"one arrives", []look{{}, {redirected4: 50}, {1, 0, 1, 1}}, ""},
		{"one arrives among many", []look{{}, {50, 0, 1, 1}}, ""},
		{"silent again", []look{{}, {redirected4: 50}, {1, 0, 1, 1}, {redirected4: 5}}, "5 connects"},
		{"still within patience", append([]look{{}, {redirected4: 50}}, idle[:podPatience]...), "50 connects"},
		{"nobody tries any more", append([]look{{}, {redirected4: 50}}, idle...), ""},
		{"then few", append(append([]look{{}, {redirected4: 50}}, idle...), look{redirected4: 4}), ""},
		{"the host's own do not count", []look{{}}, ""},
	} {
		t.Run(c.what, func(t *testing.T) {
			var p podPath
			var err error
			sum := redirect.Counters{RedirectedHost4: 7, HandedOverHost: 7}
			for _, l := range c.looks {
				sum.RedirectedPod4 += l.redirected4
				sum.RedirectedPod6 += l.redirected6
				sum.HandedOverPod += l.handedOver
				sum.AcceptedPod += l.accepted
				sum.RedirectedHost4 += 100
				err = p.judge(sum)
			}
			if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
}
