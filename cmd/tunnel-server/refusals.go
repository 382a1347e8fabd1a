// SPDX-License-Identifier: Apache-2.0

package main

import (
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/kube"
	"github.com/edge-tunnel/edge-tunnel/pkg/route"
)

const (
	refusedFor = 5 * time.Minute // a login that was refused is told for so long
	maxRefused = 1024            // nodes of which that is told
)

// refusals is what this server tells the controller, by its Lease, of nodes that it refuses.
type refusals struct {
	addrs func() []route.Refusal
	now   func() time.Time

	mu     sync.Mutex
	logins map[string]refusedLogin // by node
}

type refusedLogin struct {
	reason string
	at     time.Time
}

func newRefusals(addrs func() []route.Refusal) *refusals {
	return &refusals{addrs: addrs, now: time.Now, logins: make(map[string]refusedLogin)}
}

// login notes that the login of a node's agent, whose certificate was good, was refused.
func (r *refusals) login(node, reason string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.expire()
	if _, known := r.logins[node]; known || len(r.logins) < maxRefused {
		r.logins[node] = refusedLogin{reason, r.now()}
	}
}

// expire needs mu.
func (r *refusals) expire() {
	for node, l := range r.logins {
		if r.now().Sub(l.at) > refusedFor {
			delete(r.logins, node)
		}
	}
}

// list is all that there is to tell, in one order.
func (r *refusals) list() []kube.Refusal {
	var list []kube.Refusal
	r.mu.Lock()
	r.expire()
	for node, l := range r.logins {
		list = append(list, kube.Refusal{Node: node, Reason: l.reason})
	}
	r.mu.Unlock()
	slices.SortFunc(list, func(a, b kube.Refusal) int { return strings.Compare(a.Node, b.Node) })
	for _, refused := range r.addrs() {
		if refused.Addr != (netip.Addr{}) { // that a Node has no address, anybody can see
			list = append(list, kube.Refusal{Node: refused.Node, Addr: refused.Addr, Reason: refused.Reason.String()})
		}
	}
	return list
}
