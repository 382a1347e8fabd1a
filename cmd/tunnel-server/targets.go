// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
	"github.com/edge-tunnel/edge-tunnel/pkg/redirect"
	"github.com/edge-tunnel/edge-tunnel/pkg/route"
)

const (
	// A storm of logins must not keep the machine busy with building tables: after each, this many times as long is spent
	// on nothing but state changes. The first one starts at once.
	restPerBuild = 3

	kernelRetryMin = 100 * time.Millisecond // after the kernel refused something; doubled each time
	kernelRetryMax = 10 * time.Second

	// Who asks to forget a node is told within this time, also if the kernel refuses; it goes on being tried.
	forgetTimeout = 10 * time.Second

	maxNodeText        = 253 // bytes that a target in the kernel has for its node
	maxReportsPerBuild = 20  // refused addresses that are logged one by one
)

// targetKernel is the kernel's list of targets; [redirect.Kernel] has it.
type targetKernel interface {
	Targets() []redirect.Target
	SetTargets([]redirect.Target) error
	SetState([]netip.Addr, redirect.State) error
}

// targets keeps three things in step: the claims of known nodes, the table that says where an intercepted connection goes,
// and the kernel's list of what to intercept. Everything that happens is only noted, by whoever sees it; run does the rest:
//
//	login, forget, setRules ──► build a table ──► kernel, table, kernel
//	online                  ──► state of one node's targets in the kernel (much cheaper, and never waits for a storm to end)
//
// The order is such that at no instant the kernel intercepts what the table does not know: what goes away leaves the kernel
// first, what is new enters the table first.
type targets struct {
	known  *route.Known
	kernel targetKernel
	log    *slog.Logger
	table  route.Store
	wake   chan struct{} // something below was noted

	mu      sync.Mutex // guards what follows
	rules   route.Rules
	cluster route.Rules         // what a cluster adds to the rules
	foreign []route.Claim       // what it refuses: shown, but not remembered
	up      map[string]struct{} // nodes with a tunnel
	flipped map[string]struct{} // nodes that came to or left up, not yet told to the kernel
	stale   bool                // claims or rules have changed since the latest build
	waiting []chan struct{}     // closed when what was noted before is in force
	err     error               // why the kernel's list is not what it should be

	// Only for start and then for run's goroutine.
	reported map[route.Refusal]struct{}
}

func newTargets(known *route.Known, kernel targetKernel, rules route.Rules, log *slog.Logger) *targets {
	return &targets{
		known: known, kernel: kernel, rules: rules, log: log,
		wake:    make(chan struct{}, 1),
		up:      make(map[string]struct{}),
		flipped: make(map[string]struct{}),
	}
}

// baseRules are the rules that do not change while the server runs. Without the two reserved addresses, those of the kernel's
// canary connects, a node could claim one and so make every server look broken.
func baseRules(cidrs []netip.Prefix) route.Rules {
	return route.Rules{
		CIDRs:    cidrs,
		Reserved: []netip.Prefix{netip.MustParsePrefix("192.0.2.1/32"), netip.MustParsePrefix("2001:db8::1/128")},
	}
}

// start puts all known targets into force, offline. It has to return before the programs are
// attached and before run: an address that is not listed goes direct. What only the kernel remembers, because there is no --state-dir
// or its file was lost, counts too.
func (t *targets) start() error {
	t.adopt(t.kernel.Targets())
	if err := t.build(); err != nil {
		return fmt.Errorf("put the known targets into force: %w", err)
	}
	return nil
}

// adopt learns the claims behind pinned targets where they are not known. Of a node that is known, its own claim counts; but an
// address that was ambiguous stays so until those who claimed it have logged in again, lest a restart decide between them.
func (t *targets) adopt(pinned []redirect.Target) {
	claims := make(map[string][]netip.Addr)
	claimants := make(map[netip.Addr][]string)
	for _, c := range t.known.Claims() {
		claims[c.Node] = c.Addrs
		for _, a := range c.Addrs {
			claimants[a] = append(claimants[a], c.Node)
		}
	}
	found := make(map[string][]netip.Addr)
	for _, p := range pinned {
		if p.State != redirect.Ambiguous {
			if _, known := claims[p.Node]; !known {
				found[p.Node] = append(found[p.Node], p.Addr)
			}
			continue
		}
		if len(claimants[p.Addr]) > 1 {
			continue
		}
		for _, node := range claimantsOf(p.Node, claimants[p.Addr]) {
			found[node] = append(found[node], p.Addr)
		}
	}
	for node, addrs := range found {
		if _, err := t.known.Learn(route.Claim{Node: node, Addrs: slices.Concat(claims[node], addrs)}); err != nil {
			t.log.Error("pinned targets of a node are dropped and go direct", "node", node, "addrs", addrs, "err", err)
		}
	}
}

// claimantsText is what the kernel's list says about an ambiguous target: the claimants, as far as there is room for them.
func claimantsText(names []string) string {
	text := ""
	for _, name := range names {
		if len(text)+1+len(name) > maxNodeText {
			break
		}
		if text != "" {
			text += ","
		}
		text += name
	}
	return text
}

// claimantsOf is its reverse; known are claimants from elsewhere. It always finds two: with one name, an address that two nodes claim
// would become that node's.
func claimantsOf(text string, known []string) []string {
	names := append(strings.FieldsFunc(text, func(r rune) bool { return r == ',' }), known...)
	slices.Sort(names)
	names = slices.Compact(names)
	for i := 1; len(names) < 2; i++ {
		names = append(names, fmt.Sprintf("unknown-claimant-%d", i))
	}
	return names
}

// login notes what a node says its addresses are. An error, a [*route.ClaimError], is a reason to refuse the login.
func (t *targets) login(node string, addrs []netip.Addr) error {
	changed, err := t.known.Learn(route.Claim{Node: node, Addrs: addrs})
	if changed {
		t.note(func() { t.stale = true })
	}
	return err
}

// online notes that a node has a tunnel now, or has none. Calls for one node must be in order.
func (t *targets) online(node string, online bool) {
	t.note(func() {
		if online {
			t.up[node] = struct{}{}
		} else {
			delete(t.up, node)
		}
		t.flipped[node] = struct{}{}
	})
}

// setRules notes other rules. What a cluster adds to them is set by replace alone.
func (t *targets) setRules(rules route.Rules) {
	t.note(func() { t.rules, t.stale = rules, true })
}

// replace notes the claims of all nodes of a cluster, and which addresses it says cannot be targets. It returns the nodes that were known
// before and are not any more. What the cluster refuses is not remembered: after a restart nobody could tell it from good claims until the
// cluster has been seen again.
func (t *targets) replace(claims []route.Claim, cluster route.Rules) (gone []string) {
	was := make(map[string]struct{})
	for _, name := range t.known.Names() {
		was[name] = struct{}{}
	}
	allowed, foreign := cluster.Split(claims)
	for _, c := range allowed {
		delete(was, c.Node)
		if _, err := t.known.Learn(c); err != nil {
			t.log.Warn("what a node says its addresses are is refused, what it said before counts", "node", c.Node, "addrs", len(c.Addrs), "err", err)
		}
	}
	for name := range was {
		t.known.Forget(name)
		gone = append(gone, name)
	}
	t.note(func() { t.cluster, t.foreign, t.stale = cluster, foreign, true })
	return gone
}

// forget drops a node that nobody needs any more. It returns after its addresses are neither in the kernel's list nor in the file,
// and says how many are intercepted no longer; known is false if nobody knew the node. It needs run.
func (t *targets) forget(ctx context.Context, node string) (gone int, known bool, err error) {
	was := t.table.Load()
	if !t.known.Forget(node) {
		return 0, false, nil
	}
	t.note(func() { t.stale = true })
	ctx, cancel := context.WithTimeout(ctx, forgetTimeout)
	defer cancel()
	if err := t.settle(ctx); err != nil {
		return 0, true, err
	}
	now := t.table.Load()
	for _, target := range was.Targets() {
		if target.Node == node || slices.Contains(target.Claimants, node) {
			if _, still := now.Lookup(target.Addr); !still {
				gone++
			}
		}
	}
	return gone, true, t.known.Flush()
}

// settle waits until everything noted so far is in force. It needs run.
func (t *targets) settle(ctx context.Context) error {
	done := make(chan struct{})
	t.note(func() { t.waiting = append(t.waiting, done) })
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		t.mu.Lock()
		t.waiting = slices.DeleteFunc(t.waiting, func(w chan struct{}) bool { return w == done })
		t.mu.Unlock()
		return cmp.Or(t.problem(), ctx.Err())
	}
}

func (t *targets) note(change func()) {
	t.mu.Lock()
	change()
	t.mu.Unlock()
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

// run puts what is noted into force until ctx ends. What the kernel refuses is tried again, whole. Each turn does one thing.
func (t *targets) run(ctx context.Context) error {
	retry := kernelRetryMin
	var rested time.Time // no build before
	for ctx.Err() == nil {
		stale, flipped := t.pending()
		rest := time.Until(rested)
		var err error
		switch {
		case stale && rest <= 0:
			began := time.Now()
			err = t.build()
			rested = time.Now().Add(restPerBuild * time.Since(began))
		case flipped:
			err = t.flip()
		case stale:
			t.rest(ctx, time.After(rest))
			continue
		default:
			t.rest(ctx, nil)
			continue
		}
		if err == nil {
			retry = kernelRetryMin
			continue
		}
		t.log.Error("the kernel did not take the targets", "err", err, "retry_in", retry)
		select {
		case <-ctx.Done():
		case <-time.After(retry):
		}
		retry = min(2*retry, kernelRetryMax)
		rested = time.Time{}
		t.mu.Lock()
		t.stale = true
		t.mu.Unlock()
	}
	return nil
}

// pending says what there is to do. If that is nothing, those who wait for it learn so.
func (t *targets) pending() (stale, flipped bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.stale && len(t.flipped) == 0 {
		for _, done := range t.waiting {
			close(done)
		}
		t.waiting = nil
	}
	return t.stale, len(t.flipped) > 0
}

func (t *targets) rest(ctx context.Context, until <-chan time.Time) {
	select {
	case <-ctx.Done():
	case <-t.wake:
	case <-until:
	}
}

// build makes a table of claims and rules and puts it into force.
func (t *targets) build() error {
	// Cleared first: what is noted from here on may be missed by this build, and asks for another.
	t.mu.Lock()
	t.stale = false
	clear(t.flipped)
	rules := t.rules
	rules.Servers, rules.Direct, rules.APIServers, rules.Services = t.cluster.Servers, t.cluster.Direct, t.cluster.APIServers, t.cluster.Services
	foreign := t.foreign
	t.mu.Unlock()

	was, table := t.table.Load(), route.Build(slices.Concat(t.known.Claims(), foreign), rules)
	err := t.narrow(was, table)
	if err == nil {
		t.table.Put(table)
		err = t.kernel.SetTargets(t.list(table.Targets()))
	}
	t.setProblem(err)
	if err != nil {
		return err
	}
	t.report(table)
	return nil
}

// narrow takes from the kernel what was a target and is none in the new table, or belongs to nobody any more.
func (t *targets) narrow(was, table *route.Table) error {
	kept := make([]route.Target, 0, len(was.Targets()))
	narrower := false
	for _, old := range was.Targets() {
		now, ok := table.Lookup(old.Addr)
		switch {
		case !ok:
			narrower = true
			continue
		case now.Ambiguous && !old.Ambiguous:
			narrower = true
			old = now
		}
		kept = append(kept, old)
	}
	if !narrower {
		return nil
	}
	return t.kernel.SetTargets(t.list(kept))
}

// list gives targets the form that the kernel takes, each with the present state of its node.
func (t *targets) list(targets []route.Target) []redirect.Target {
	t.mu.Lock()
	defer t.mu.Unlock()
	list := make([]redirect.Target, len(targets))
	for i, target := range targets {
		list[i] = redirect.Target{Addr: target.Addr, Node: target.Node, State: t.state(target)}
		if target.Ambiguous {
			list[i].Node = claimantsText(target.Claimants)
		}
	}
	return list
}

// state returns what the kernel does with a target; t.mu is held.
func (t *targets) state(target route.Target) redirect.State {
	if target.Ambiguous {
		return redirect.Ambiguous
	}
	if _, up := t.up[target.Node]; up {
		return redirect.Online
	}
	return redirect.Offline
}

// flip tells the kernel which nodes have come and gone.
func (t *targets) flip() error {
	table := t.table.Load()
	var online, offline []netip.Addr
	t.mu.Lock()
	for node := range t.flipped {
		if _, up := t.up[node]; up {
			online = append(online, table.NodeAddrs(node)...)
		} else {
			offline = append(offline, table.NodeAddrs(node)...)
		}
	}
	clear(t.flipped)
	t.mu.Unlock()
	for _, change := range []struct {
		addrs []netip.Addr
		state redirect.State
	}{{offline, redirect.Offline}, {online, redirect.Online}} {
		if len(change.addrs) == 0 {
			continue
		}
		if err := t.kernel.SetState(change.addrs, change.state); err != nil {
			t.setProblem(err)
			return err
		}
	}
	return nil
}

// report logs refusals that are new.
func (t *targets) report(table *route.Table) {
	now := make(map[route.Refusal]struct{}, len(table.Refusals()))
	logged, more := 0, 0
	for _, r := range table.Refusals() {
		now[r] = struct{}{}
		if _, old := t.reported[r]; old {
			continue
		}
		if logged == maxReportsPerBuild {
			more++
			continue
		}
		logged++
		t.log.Warn("address refused as a target", "node", r.Node, "addr", r.Addr, "reason", r.Reason)
	}
	if more > 0 {
		t.log.Warn("more addresses refused as targets", "number", more)
	}
	t.reported = now
}

func (t *targets) setProblem(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.err = err
}

// problem is why the kernel's list is not what it should be; nil if it is.
func (t *targets) problem() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.err != nil {
		return fmt.Errorf("the kernel did not take the targets: %w", t.err)
	}
	return nil
}

// condition is part of readiness.
func (t *targets) condition() admin.Condition {
	if err := t.problem(); err != nil {
		return admin.Condition{Name: "targets", Reason: err.Error()}
	}
	return admin.Condition{Name: "targets", OK: true}
}

// lookup names the node that an intercepted connection belongs to; not ok for what is no target, or an ambiguous one.
func (t *targets) lookup(addr netip.Addr) (node string, ok bool) {
	target, ok := t.table.Load().Lookup(addr)
	return target.Node, ok && !target.Ambiguous
}

// snapshot lists every claimed address once for each outcome, sorted by address.
func (t *targets) snapshot() []admin.Target {
	table := t.table.Load()
	list := make([]admin.Target, 0, len(table.Targets())+len(table.Refusals()))
	t.mu.Lock()
	for _, target := range table.Targets() {
		shown := admin.Target{Addr: target.Addr, Node: target.Node, State: admin.TargetOffline}
		switch t.state(target) {
		case redirect.Online:
			shown.State = admin.TargetOnline
		case redirect.Ambiguous:
			shown.State, shown.Reason = admin.TargetAmbiguous, route.Ambiguous.String()
			shown.Node = strings.Join(target.Claimants, ",")
		}
		list = append(list, shown)
	}
	t.mu.Unlock()
	for _, r := range table.Refusals() {
		if r.Reason != route.Ambiguous { // that is a target, and stands there already
			list = append(list, admin.Target{Addr: r.Addr, Node: r.Node, State: admin.TargetRefused, Reason: r.Reason.String()})
		}
	}
	slices.SortStableFunc(list, func(a, b admin.Target) int { return cmp.Or(a.Addr.Compare(b.Addr), cmp.Compare(a.Node, b.Node)) })
	return list
}

// counts counts what snapshot lists.
func (t *targets) counts() admin.TargetCounts {
	table := t.table.Load()
	var c admin.TargetCounts
	t.mu.Lock()
	for _, target := range table.Targets() {
		switch t.state(target) {
		case redirect.Online:
			c.Online++
		case redirect.Offline:
			c.Offline++
		case redirect.Ambiguous:
			c.Ambiguous++
		}
	}
	t.mu.Unlock()
	for _, r := range route.Reasons() {
		if r != route.Ambiguous {
			c.Refused += table.Count(r)
		}
	}
	return c
}

// refusals are the claims that are refused now.
func (t *targets) refusals() []route.Refusal { return t.table.Load().Refusals() }

// refused counts claims by the reason for which they are refused, ambiguous ones included.
func (t *targets) refused() map[string]int {
	table := t.table.Load()
	counts := make(map[string]int)
	for _, r := range route.Reasons() {
		counts[r.String()] = table.Count(r)
	}
	return counts
}
