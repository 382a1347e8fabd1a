// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"

	"github.com/edge-tunnel/edge-tunnel/pkg/redirect"
)

const (
	// podSilence is how many connects of pods may be redirected, with none arriving, before somebody is to blame.
	podSilence = 5
	// podPatience is after how many looks without a further attempt the blame is dropped: it may have been one pod, long gone.
	podPatience = 30
)

// podPath compares, look by look, what was redirected for pods with what arrived: a host firewall that drops pod-to-node traffic would
// otherwise look like an edge that is dead. The canary cannot tell, it takes the host's way.
type podPath struct {
	seen       bool
	before     redirect.Counters
	silent     uint64 // connects redirected since the last that arrived
	translated bool   // of these some left the pod and got an answer
	idle       int    // looks since the last of them
}

// judge takes the counters as they are now.
func (p *podPath) judge(now redirect.Counters) error {
	before, first := p.before, !p.seen
	p.before, p.seen = now, true
	if first {
		return nil // what was before this process says nothing
	}
	redirected := now.RedirectedPod4 + now.RedirectedPod6 - before.RedirectedPod4 - before.RedirectedPod6
	switch {
	case now.AcceptedPod != before.AcceptedPod:
		p.silent, p.translated, p.idle = 0, false, 0
	case redirected > 0:
		p.silent, p.idle = p.silent+redirected, 0
		p.translated = p.translated || now.HandedOverPod != before.HandedOverPod
	case p.idle >= podPatience:
		p.silent, p.translated = 0, false
	default:
		p.idle++
	}
	if p.silent < podSilence {
		return nil
	}
	suspect := "a host firewall may drop pod-to-node traffic on the redirect ports"
	if p.translated {
		suspect = "something may translate addresses between pods and node (SNAT)"
	}
	return fmt.Errorf("%d connects of pods were redirected to this node and none arrived: %s", p.silent, suspect)
}
