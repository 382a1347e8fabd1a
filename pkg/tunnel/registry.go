// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"crypto/tls"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

const (
	// Three evictions within a minute: several instances with one certificate.
	duplicateEvictions = 3
	duplicateWindow    = time.Minute

	maxRetired = 3  // retired tunnels of a node that may still finish their streams
	maxBanned  = 16 // instances of a node that were told to wait

	// Logins of one certificate: more than these are answered with "overloaded".
	loginsPerSecond = 1
	loginBurst      = 20

	// An old link that was replaced by its own instance gets this long to show that it is alive.
	replacedProbe = 5 * time.Second
)

// registry knows the tunnels of each node. Of a node's tunnels one at most is active, which is the one that new streams
// use. The states of a tunnel:
//
//	        add                  replaced, or the agent said go-away             last stream ended
//	login ───────> active ─────────────────────────────────────────> retired ──────────────────────> gone
//	                  └─ evicted, expired, refused, forgotten, link dead ────────────────────────────────┘
//
// Lock order: registry.mu, then link.mu.
type registry struct {
	mu     sync.Mutex
	nodes  map[string]*node
	dirty  []string            // nodes whose being online may have changed, in order
	told   map[string]struct{} // nodes that were reported online
	change chan struct{}       // tells the reporter that dirty is not empty
	swept  time.Time

	evictions, duplicates uint64
}

// node is what is known of one node name, present or not long gone.
type node struct {
	active    *serverTunnel
	retired   []*serverTunnel
	evictions []time.Time            // within duplicateWindow
	banned    map[[16]byte]time.Time // instances that have to wait, and until when
	duplicate time.Time              // until then the node counts as duplicated
	logins    *rate.Limiter
	seen      time.Time
	queued    bool // in registry.dirty
}

// serverTunnel is the server's side of one tunnel.
type serverTunnel struct {
	sess     *session
	reg      *registry // that it is in
	id       Identity
	login    wire.Login
	state    tls.ConnectionState // to be judged again by Recheck
	retired  bool                // needs registry.mu
	moved    chan struct{}       // closed when retired, and when gone
	movedSet bool                // needs registry.mu
}

func newRegistry() *registry {
	return &registry{nodes: make(map[string]*node), told: make(map[string]struct{}), change: make(chan struct{}, 1), swept: time.Now()}
}

// knock counts a login attempt against the certificate's rate.
func (r *registry) knock(name string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.sweep()
	n := r.nodes[name]
	if n == nil {
		n = &node{logins: rate.NewLimiter(loginsPerSecond, loginBurst)}
		r.nodes[name] = n
	}
	n.seen = time.Now()
	return n.logins.Allow()
}

// sweep forgets nodes that have not been here for a while. Needs mu.
func (r *registry) sweep() {
	now := time.Now()
	if now.Sub(r.swept) < duplicateWindow {
		return
	}
	r.swept = now
	for name, n := range r.nodes {
		if n.active == nil && len(n.retired) == 0 && !n.queued && now.Sub(n.seen) > 2*duplicateWindow {
			delete(r.nodes, name)
		}
	}
}

// add makes t the active tunnel of its node, or says why not. Tunnels of another instance are killed, without waiting for
// anything; that of the same instance and index is retired.
func (r *registry) add(t *serverTunnel) (status wire.LoginStatus, retryAfter time.Duration, duplicate bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	n := r.nodes[t.id.Name]
	if n == nil { // forgotten since it knocked
		n = &node{logins: rate.NewLimiter(loginsPerSecond, loginBurst)}
		r.nodes[t.id.Name] = n
	}
	n.seen = now
	old := n.active
	if old != nil && !old.sess.link.alive() {
		old = nil
	}
	if until, ok := n.banned[t.login.Instance]; ok && now.Before(until) && old != nil {
		return wire.LoginDuplicateIdentity, max(until.Sub(now), wire.DuplicateWait), false
	}
	if old != nil && old.login.Instance == t.login.Instance && old.login.Index != t.login.Index {
		return wire.LoginAlreadyConnected, 0, false
	}
	n.active = t
	r.touch(t.id.Name, n)
	switch {
	case old == nil:
	case old.login.Instance == t.login.Instance:
		r.setRetired(n, old)
		old.sess.link.probe(replacedProbe)
	default:
		old.sess.kill(errEvicted)
		for _, t := range n.retired {
			t.sess.kill(errEvicted)
		}
		duplicate = r.evicted(n, old.login.Instance, now)
	}
	return wire.LoginOK, 0, duplicate
}

// evicted notes an eviction and reports whether it is one too many.
func (r *registry) evicted(n *node, instance [16]byte, now time.Time) bool {
	r.evictions++
	recent := n.evictions[:0]
	for _, at := range n.evictions {
		if now.Sub(at) < duplicateWindow {
			recent = append(recent, at)
		}
	}
	n.evictions = append(recent, now)
	if len(n.evictions) < duplicateEvictions {
		return false
	}
	n.evictions = n.evictions[len(n.evictions)-duplicateEvictions:]
	r.duplicates++
	n.duplicate = now.Add(duplicateWindow)
	for i, until := range n.banned {
		if !now.Before(until) {
			delete(n.banned, i)
		}
	}
	if n.banned == nil {
		n.banned = make(map[[16]byte]time.Time)
	}
	if len(n.banned) < maxBanned {
		n.banned[instance] = now.Add(wire.DuplicateWait)
	}
	return true
}

// retire takes t out of use for new streams.
func (r *registry) retire(t *serverTunnel) {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.nodes[t.id.Name]
	if n == nil || t.movedSet {
		return
	}
	if n.active == t {
		n.active = nil
		r.touch(t.id.Name, n)
	}
	r.setRetired(n, t)
}

// setRetired moves t to the retired tunnels of its node. Too many of them, and the oldest ends: an agent could otherwise
// hold any number of sessions by retiring each.
func (r *registry) setRetired(n *node, t *serverTunnel) {
	if t.retired || t.movedSet {
		return
	}
	t.retired = true
	n.retired = append(n.retired, t)
	t.setMoved()
	if len(n.retired) > maxRetired {
		n.retired[0].sess.kill(errReplaced)
		n.retired = slices.Delete(n.retired, 0, 1)
	}
}

func (t *serverTunnel) setMoved() {
	if !t.movedSet {
		t.movedSet = true
		close(t.moved)
	}
}

// remove forgets a tunnel that is gone.
func (r *registry) remove(t *serverTunnel) {
	r.mu.Lock()
	defer r.mu.Unlock()
	t.setMoved()
	n := r.nodes[t.id.Name]
	if n == nil {
		return
	}
	n.seen = time.Now()
	if n.active == t {
		n.active = nil
		r.touch(t.id.Name, n)
	}
	for i, old := range n.retired {
		if old == t {
			n.retired = slices.Delete(n.retired, i, i+1)
			break
		}
	}
}

// pick returns the active tunnel of a node, or nil.
func (r *registry) pick(name string) *serverTunnel {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := r.nodes[name]; n != nil {
		return n.active
	}
	return nil
}

// all returns every tunnel of one node, or of all nodes for "".
func (r *registry) all(name string) []*serverTunnel {
	r.mu.Lock()
	defer r.mu.Unlock()
	var ts []*serverTunnel
	for key, n := range r.nodes {
		if name != "" && name != key {
			continue
		}
		if n.active != nil {
			ts = append(ts, n.active)
		}
		ts = append(ts, n.retired...)
	}
	return ts
}

// forget lifts all bans of a node and returns its tunnels.
func (r *registry) forget(name string) []*serverTunnel {
	if name == "" {
		return nil
	}
	r.mu.Lock()
	if n := r.nodes[name]; n != nil {
		n.banned, n.evictions, n.duplicate = nil, nil, time.Time{}
	}
	r.mu.Unlock()
	return r.all(name)
}

// isDuplicate reports whether clones of this node were seen in the last minute.
func (r *registry) isDuplicate(name string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.nodes[name]
	return n != nil && time.Now().Before(n.duplicate)
}

// touch queues a node for the reporter. Needs mu.
func (r *registry) touch(name string, n *node) {
	if !n.queued {
		n.queued = true
		r.dirty = append(r.dirty, name)
		notify(r.change)
	}
}

// nextChange returns a node that went on- or offline since it was last reported.
func (r *registry) nextChange() (name string, online, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for len(r.dirty) > 0 {
		name := r.dirty[0]
		r.dirty = r.dirty[1:]
		n := r.nodes[name]
		online := n != nil && n.active != nil
		if n != nil {
			n.queued = false
		}
		if _, was := r.told[name]; was == online {
			continue // came and went unseen
		}
		if online {
			r.told[name] = struct{}{}
		} else {
			delete(r.told, name)
		}
		return name, online, true
	}
	return "", false, false
}
