// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
	"github.com/edge-tunnel/edge-tunnel/pkg/redirect"
	"github.com/edge-tunnel/edge-tunnel/pkg/route"
)

var _ targetKernel = (*redirect.Kernel)(nil)

// kernelFake behaves like redirect.Kernel, and complains when it intercepts what the table would not know.
type kernelFake struct {
	t     *testing.T
	takes time.Duration // that a SetTargets lasts; set before it is used

	mu     sync.Mutex // guards what follows
	of     *targets
	list   map[netip.Addr]redirect.Target
	sets   int      // calls of SetTargets
	states int      // calls of SetState
	steps  []string // what changed, in order
	fails  int      // calls that still fail, after half of their work
	broken error    // all do
}

func (k *kernelFake) Targets() []redirect.Target {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.SortedFunc(maps.Values(k.list), func(a, b redirect.Target) int { return a.Addr.Compare(b.Addr) })
}

func (k *kernelFake) SetTargets(list []redirect.Target) error {
	time.Sleep(k.takes)
	k.mu.Lock()
	defer k.mu.Unlock()
	k.check("before SetTargets")
	k.sets++
	fail := k.fail()
	want := make(map[netip.Addr]redirect.Target)
	for _, target := range list {
		if _, twice := want[target.Addr]; twice {
			k.t.Errorf("%s is listed twice", target.Addr)
		}
		want[target.Addr] = target
	}
	for addr := range k.list {
		if _, keep := want[addr]; !keep {
			delete(k.list, addr)
			k.steps = append(k.steps, fmt.Sprintf("-%s", addr))
		}
	}
	for i, target := range list {
		if fail != nil && i >= len(list)/2 {
			return fail
		}
		k.put(target)
	}
	k.check("after SetTargets")
	return fail
}

func (k *kernelFake) SetState(addrs []netip.Addr, state redirect.State) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.states++
	if err := k.fail(); err != nil {
		return err
	}
	for _, addr := range addrs {
		if target, ok := k.list[addr]; ok && target.State != redirect.Ambiguous {
			target.State = state
			k.put(target)
		}
	}
	k.check("after SetState")
	return nil
}

func (k *kernelFake) put(target redirect.Target) {
	if k.list[target.Addr] == target {
		return
	}
	if len(target.Node) > 253 {
		k.t.Errorf("%d bytes for the node of %s", len(target.Node), target.Addr)
	}
	k.list[target.Addr] = target
	k.steps = append(k.steps, fmt.Sprintf("%s=%s:%s", target.Addr, target.Node, target.State))
}

func (k *kernelFake) fail() error {
	if k.broken != nil {
		return k.broken
	}
	if k.fails > 0 {
		k.fails--
		return errors.New("the map is full")
	}
	return nil
}

func (k *kernelFake) check(when string) {
	if k.of == nil {
		return
	}
	for addr, target := range k.list {
		if _, ok := k.of.lookup(addr); !ok && target.State == redirect.Online {
			k.t.Errorf("%s: %s is redirected, but nobody owns it", when, addr)
		}
	}
}

// do runs f with the fake locked.
func (k *kernelFake) do(f func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	f()
}

// takeSteps returns what changed since it was last asked.
func (k *kernelFake) takeSteps() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	steps := k.steps
	k.steps = nil
	return steps
}

// makeTargets returns targets on a fake kernel with the given content; nothing is started.
func makeTargets(t *testing.T, dir string, rules route.Rules, pinned ...redirect.Target) (*targets, *kernelFake) {
	t.Helper()
	known, err := route.OpenKnown(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	k := &kernelFake{t: t, list: make(map[netip.Addr]redirect.Target)}
	for _, p := range pinned {
		k.list[p.Addr] = p
	}
	return newTargets(known, k, rules, slog.New(slog.DiscardHandler)), k
}

// runTargets starts them and runs them until the test ends.
func runTargets(t *testing.T, ts *targets, k *kernelFake) {
	t.Helper()
	if err := ts.start(); err != nil {
		t.Fatal(err)
	}
	k.do(func() { k.of = ts })
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- ts.run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
	})
	k.takeSteps()
}

func settle(t *testing.T, ts *targets) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := ts.settle(ctx); err != nil {
		t.Fatal(err)
	}
}

func targetsLogin(t *testing.T, ts *targets, node string, list ...string) {
	t.Helper()
	if err := ts.login(node, targetAddrs(list...)); err != nil {
		t.Fatal(err)
	}
}

func targetAddrs(list ...string) []netip.Addr {
	var out []netip.Addr
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

func kernelTarget(addr, node string, state redirect.State) redirect.Target {
	return redirect.Target{Addr: netip.MustParseAddr(addr), Node: node, State: state}
}

func wantKernel(t *testing.T, k *kernelFake, want ...redirect.Target) {
	t.Helper()
	if got := k.Targets(); !slices.Equal(got, want) {
		t.Fatalf("kernel has\n%v, want\n%v", got, want)
	}
}

func wantSteps(t *testing.T, k *kernelFake, want ...string) {
	t.Helper()
	if got := k.takeSteps(); !slices.Equal(got, want) {
		t.Fatalf("kernel's changes\n%v, want\n%v", got, want)
	}
}

// After a reboot: the kernel knows nothing, the file does.
func TestTargetsStoredAreInForceAtStart(t *testing.T) {
	dir := t.TempDir()
	ts, _ := makeTargets(t, dir, route.Rules{})
	targetsLogin(t, ts, "edge-1", "10.99.0.1", "10.99.0.9", "127.0.0.1")
	targetsLogin(t, ts, "edge-2", "10.99.0.2", "10.99.0.9")
	if err := ts.known.Flush(); err != nil {
		t.Fatal(err)
	}

	ts, k := makeTargets(t, dir, route.Rules{Local: targetAddrs("10.99.0.2")})
	if err := ts.start(); err != nil {
		t.Fatal(err)
	}
	wantKernel(t, k, kernelTarget("10.99.0.1", "edge-1", redirect.Offline), kernelTarget("10.99.0.9", "edge-1,edge-2", redirect.Ambiguous))
	if node, ok := ts.lookup(netip.MustParseAddr("10.99.0.1")); node != "edge-1" || !ok {
		t.Errorf("%q %t", node, ok)
	}
	if node, ok := ts.lookup(netip.MustParseAddr("10.99.0.9")); node != "" || ok {
		t.Errorf("an ambiguous address has an owner: %q %t", node, ok)
	}
	want := []admin.Target{
		{Addr: netip.MustParseAddr("10.99.0.1"), Node: "edge-1", State: "offline"},
		{Addr: netip.MustParseAddr("10.99.0.2"), Node: "edge-2", State: "refused", Reason: "local_address"},
		{Addr: netip.MustParseAddr("10.99.0.9"), Node: "edge-1,edge-2", State: "ambiguous", Reason: "ambiguous"},
		{Addr: netip.MustParseAddr("127.0.0.1"), Node: "edge-1", State: "refused", Reason: "loopback"},
	}
	if got := ts.snapshot(); !reflect.DeepEqual(got, want) {
		t.Errorf("snapshot\n%v, want\n%v", got, want)
	}
	if got, want := ts.counts(), (admin.TargetCounts{Offline: 1, Ambiguous: 1, Refused: 2}); got != want {
		t.Errorf("counts %+v", got)
	}
	if got := ts.refused(); got["local_address"] != 1 || got["loopback"] != 1 || got["ambiguous"] != 2 || got["multicast"] != 0 {
		t.Errorf("refused %v", got)
	}
}

// A Node that claims an address which the cluster says is somebody else's is refused, and shown. After a restart nobody knows whose they are until the cluster is seen, so
// nothing of it is remembered.
func TestTargetsOfTheClusterAreNobodyElses(t *testing.T) {
	dir := t.TempDir()
	ts, k := makeTargets(t, dir, route.Rules{})
	runTargets(t, ts, k)
	claims := []route.Claim{
		{Node: "edge-1", Addrs: targetAddrs("10.99.0.1", "10.0.0.2", "10.0.0.3", "10.1.0.9", "10.96.0.7")}, {Node: "edge-2", Addrs: targetAddrs("10.99.0.2")},
	}
	cluster := route.Rules{
		Servers: targetAddrs("10.0.0.1", "10.0.0.2"), Direct: targetAddrs("10.1.0.9"), APIServers: targetAddrs("10.0.0.3"),
		Services: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16")},
	}
	if gone := ts.replace(claims, cluster); len(gone) > 0 {
		t.Errorf("gone: %v", gone)
	}
	settle(t, ts)
	mine, theirs := kernelTarget("10.99.0.1", "edge-1", redirect.Offline), kernelTarget("10.99.0.2", "edge-2", redirect.Offline)
	wantKernel(t, k, mine, theirs)
	refused := func(addr, reason string) admin.Target {
		return admin.Target{Addr: netip.MustParseAddr(addr), Node: "edge-1", State: "refused", Reason: reason}
	}
	want := []admin.Target{
		refused("10.0.0.2", "server_address"), refused("10.0.0.3", "api_server"), refused("10.1.0.9", "direct_address"), refused("10.96.0.7", "service_range"),
	}
	if got := ts.snapshot(); len(got) != 6 || !slices.Equal(got[:4], want) {
		t.Errorf("snapshot %v", got)
	}
	if gone := ts.replace(claims[:1], cluster); !slices.Equal(gone, []string{"edge-2"}) {
		t.Errorf("gone: %v, want edge-2", gone)
	}
	settle(t, ts)
	wantKernel(t, k, mine)
	if err := ts.known.Flush(); err != nil {
		t.Fatal(err)
	}

	ts, k = makeTargets(t, dir, route.Rules{})
	if err := ts.start(); err != nil {
		t.Fatal(err)
	}
	wantKernel(t, k, mine)
}

// A restart without a state folder: the pinned map is all there is.
func TestTargetsPinnedAreAdopted(t *testing.T) {
	long := strings.Repeat("a", 200)
	pinned := []redirect.Target{
		kernelTarget("10.99.0.1", "edge-1", redirect.Online),
		kernelTarget("10.99.0.2", "edge-2", redirect.Offline),
		kernelTarget("10.99.0.9", "edge-1,edge-3", redirect.Ambiguous),
		kernelTarget("10.99.0.10", long, redirect.Ambiguous), // the other one's name had no room
		kernelTarget("10.99.0.11", "", redirect.Ambiguous),
	}
	ts, k := makeTargets(t, "", route.Rules{}, pinned...)
	runTargets(t, ts, k)
	wantKernel(t, k,
		kernelTarget("10.99.0.1", "edge-1", redirect.Offline), // its tunnel ended with the predecessor
		kernelTarget("10.99.0.2", "edge-2", redirect.Offline),
		kernelTarget("10.99.0.9", "edge-1,edge-3", redirect.Ambiguous),
		kernelTarget("10.99.0.10", long+",unknown-claimant-1", redirect.Ambiguous),
		kernelTarget("10.99.0.11", "unknown-claimant-1,unknown-claimant-2", redirect.Ambiguous),
	)
	targetsLogin(t, ts, "edge-3", "10.99.0.3") // one claimant has withdrawn, which leaves the other
	settle(t, ts)
	if node, ok := ts.lookup(netip.MustParseAddr("10.99.0.9")); node != "edge-1" || !ok {
		t.Errorf("%q %t", node, ok)
	}
}

// What the file says about a node counts, not what the kernel still has; but it does not make an ambiguous address somebody's.
func TestTargetsStoredBeatPinned(t *testing.T) {
	dir := t.TempDir()
	ts, _ := makeTargets(t, dir, route.Rules{})
	targetsLogin(t, ts, "edge-1", "10.99.0.1")
	targetsLogin(t, ts, "edge-2", "10.99.0.2")
	if err := ts.known.Flush(); err != nil {
		t.Fatal(err)
	}
	ts, k := makeTargets(t, dir, route.Rules{},
		kernelTarget("10.99.0.7", "edge-1", redirect.Online),
		kernelTarget("10.99.0.2", "edge-2,edge-9", redirect.Ambiguous),
		kernelTarget("10.99.0.8", "not a name", redirect.Online),
	)
	if err := ts.start(); err != nil {
		t.Fatal(err)
	}
	wantKernel(t, k, kernelTarget("10.99.0.1", "edge-1", redirect.Offline), kernelTarget("10.99.0.2", "edge-2,edge-9", redirect.Ambiguous))
}

func TestTargetsFollowTunnels(t *testing.T) {
	ts, k := makeTargets(t, "", route.Rules{})
	runTargets(t, ts, k)
	targetsLogin(t, ts, "edge-1", "10.99.0.1", "2001:db8:1::1")
	settle(t, ts)
	wantSteps(t, k, "10.99.0.1=edge-1:offline", "2001:db8:1::1=edge-1:offline")
	sets := k.sets

	ts.online("edge-1", true)
	settle(t, ts)
	wantSteps(t, k, "10.99.0.1=edge-1:online", "2001:db8:1::1=edge-1:online")
	ts.online("edge-1", false)
	settle(t, ts)
	wantSteps(t, k, "10.99.0.1=edge-1:offline", "2001:db8:1::1=edge-1:offline")
	ts.online("edge-9", true) // nobody's addresses
	ts.online("edge-9", false)
	settle(t, ts)
	wantSteps(t, k)
	if k.sets != sets {
		t.Errorf("a change of state wrote the whole list, %d times", k.sets-sets)
	}

	ts.online("edge-1", true)
	targetsLogin(t, ts, "edge-1", "10.99.0.1", "2001:db8:1::1") // the same again
	settle(t, ts)
	if k.sets != sets {
		t.Error("a login that changes nothing wrote the whole list")
	}
	if got := ts.snapshot(); len(got) != 2 || got[0].State != "online" {
		t.Errorf("snapshot %v", got)
	}
}

func TestTargetsChangeInOrder(t *testing.T) {
	ts, k := makeTargets(t, "", route.Rules{})
	runTargets(t, ts, k)
	ts.online("edge-1", true)
	ts.online("edge-2", true)
	targetsLogin(t, ts, "edge-1", "10.99.0.1")
	settle(t, ts)
	k.takeSteps()

	targetsLogin(t, ts, "edge-1", "10.99.0.5") // another address
	settle(t, ts)
	wantSteps(t, k, "-10.99.0.1", "10.99.0.5=edge-1:online")

	targetsLogin(t, ts, "edge-2", "10.99.0.5", "10.99.0.2") // the same address
	settle(t, ts)
	wantSteps(t, k, "10.99.0.5=edge-1,edge-2:ambiguous", "10.99.0.2=edge-2:online")

	targetsLogin(t, ts, "edge-2", "10.99.0.2") // which it then withdraws
	settle(t, ts)
	wantSteps(t, k, "10.99.0.5=edge-1:online")

	ts.setRules(route.Rules{Local: targetAddrs("10.99.0.5")}) // now it is this host's
	settle(t, ts)
	wantSteps(t, k, "-10.99.0.5")
	ts.setRules(route.Rules{})
	settle(t, ts)
	wantSteps(t, k, "10.99.0.5=edge-1:online")

	// The owner changes at once, as two logins before one build.
	ts.known.Learn(route.Claim{Node: "edge-1", Addrs: targetAddrs("10.99.0.2")})
	targetsLogin(t, ts, "edge-2", "10.99.0.5")
	settle(t, ts)
	wantSteps(t, k, "10.99.0.2=edge-1:online", "10.99.0.5=edge-2:online")
}

func TestTargetsForget(t *testing.T) {
	dir := t.TempDir()
	ts, k := makeTargets(t, dir, route.Rules{})
	runTargets(t, ts, k)
	targetsLogin(t, ts, "edge-1", "10.99.0.1", "10.99.0.3", "10.99.0.9")
	targetsLogin(t, ts, "edge-2", "10.99.0.2", "10.99.0.9")
	settle(t, ts)

	if gone, known, err := ts.forget(t.Context(), "edge-1"); gone != 2 || !known || err != nil {
		t.Errorf("forget: %d, %t, %v", gone, known, err)
	}
	wantKernel(t, k, kernelTarget("10.99.0.2", "edge-2", redirect.Offline), kernelTarget("10.99.0.9", "edge-2", redirect.Offline))
	if gone, known, err := ts.forget(t.Context(), "edge-1"); gone != 0 || known || err != nil {
		t.Errorf("forget again: %d, %t, %v", gone, known, err)
	}
	again, err := route.OpenKnown(dir, nil)
	if err != nil || len(again.Claims()) != 1 {
		t.Errorf("stored: %v %v", again.Claims(), err)
	}

	// The kernel refuses: whoever asked is told, and it is done later.
	k.do(func() { k.broken = errors.New("no memory") })
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, known, err := ts.forget(ctx, "edge-2"); !known || err == nil {
		t.Errorf("forget: %t, %v", known, err)
	}
	k.do(func() { k.broken = nil })
	settle(t, ts)
	wantKernel(t, k)
}

func TestTargetsLoginRefused(t *testing.T) {
	ts, k := makeTargets(t, "", route.Rules{})
	runTargets(t, ts, k)
	var refused *route.ClaimError
	if err := ts.login("Not A Name", targetAddrs("10.0.0.1")); !errors.As(err, &refused) {
		t.Errorf("login: %v", err)
	}
	settle(t, ts)
	if k.sets != 1 {
		t.Errorf("%d writes", k.sets)
	}
}

func TestTargetsKernelRefuses(t *testing.T) {
	for _, fails := range []int{1, 2, 3} {
		ts, k := makeTargets(t, "", route.Rules{})
		runTargets(t, ts, k)
		targetsLogin(t, ts, "edge-1", "10.99.0.1", "10.99.0.2")
		ts.online("edge-1", true)
		settle(t, ts)

		k.do(func() { k.fails = fails })
		targetsLogin(t, ts, "edge-1", "10.99.0.2", "10.99.0.3", "10.99.0.4")
		for ts.condition().OK {
			time.Sleep(time.Millisecond)
		}
		if c := ts.condition(); c.Name != "targets" || !strings.Contains(c.Reason, "the map is full") {
			t.Errorf("condition %+v", c)
		}
		ts.online("edge-1", false) // meanwhile
		settle(t, ts)
		if c := ts.condition(); !c.OK {
			t.Errorf("condition %+v", c)
		}
		wantKernel(t, k, kernelTarget("10.99.0.2", "edge-1", redirect.Offline),
			kernelTarget("10.99.0.3", "edge-1", redirect.Offline), kernelTarget("10.99.0.4", "edge-1", redirect.Offline))
	}

	t.Run("a change of state", func(t *testing.T) {
		ts, k := makeTargets(t, "", route.Rules{})
		runTargets(t, ts, k)
		targetsLogin(t, ts, "edge-1", "10.99.0.1")
		settle(t, ts)
		k.do(func() { k.fails = 1 })
		ts.online("edge-1", true)
		settle(t, ts)
		wantKernel(t, k, kernelTarget("10.99.0.1", "edge-1", redirect.Online))
	})

	t.Run("at start", func(t *testing.T) {
		ts, k := makeTargets(t, "", route.Rules{}, kernelTarget("10.99.0.1", "edge-1", redirect.Online))
		k.fails = 1
		if err := ts.start(); err == nil {
			t.Error("started")
		}
	})
}

// Three thousand logins in three seconds, each of a new node: builds are few, and a tunnel that comes or goes does not wait for them.
func TestTargetsStorm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts, k := makeTargets(t, "", route.Rules{})
		k.takes = 20 * time.Millisecond
		runTargets(t, ts, k)
		targetsLogin(t, ts, "edge-0", "10.98.0.1")
		settle(t, ts)

		addr := netip.MustParseAddr("10.98.0.1")
		var late time.Duration
		for i := range 3000 {
			targetsLogin(t, ts, fmt.Sprintf("edge-%d", i+1), fmt.Sprintf("10.99.%d.%d", i>>8, i&0xff))
			time.Sleep(time.Millisecond)
			if i%100 == 0 {
				began := time.Now()
				ts.online("edge-0", i%200 == 0)
				want := redirect.Online
				if i%200 != 0 {
					want = redirect.Offline
				}
				for done := false; !done; time.Sleep(100 * time.Microsecond) {
					k.do(func() { done = k.list[addr].State == want })
				}
				late = max(late, time.Since(began))
			}
		}
		settle(t, ts)
		if got := len(k.Targets()); got != 3001 {
			t.Errorf("%d targets", got)
		}
		if k.sets < 5 || k.sets > 60 {
			t.Errorf("%d writes of the whole list", k.sets)
		}
		if late > 25*time.Millisecond { // one write of the list that is under way
			t.Errorf("a tunnel's end was seen after %v", late)
		}
	})
}

// Anything at once, then the kernel has what the claims, rules and tunnels say. The fake checks each step on the way there.
func TestTargetsConverge(t *testing.T) {
	ts, k := makeTargets(t, "", route.Rules{})
	runTargets(t, ts, k)
	var wg sync.WaitGroup
	for w := range 6 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 1))
			for range 300 {
				node := fmt.Sprintf("edge-%d-%d", w, rng.IntN(4)) // calls for one node are in order
				switch rng.IntN(8) {
				case 0, 1, 2:
					ts.online(node, rng.IntN(2) == 0)
				case 3:
					if _, _, err := ts.forget(context.Background(), node); err != nil {
						t.Error(err)
					}
				case 4:
					ts.setRules(route.Rules{Local: targetAddrs(fmt.Sprintf("10.0.0.%d", rng.IntN(30)))})
				case 5:
					k.do(func() { k.fails += rng.IntN(100) / 99 })
				default:
					var list []netip.Addr
					for range rng.IntN(5) {
						list = append(list, netip.AddrFrom4([4]byte{10, 0, 0, byte(rng.IntN(30))}))
					}
					if err := ts.login(node, list); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	k.do(func() { k.fails = 0 })
	ts.setRules(route.Rules{Local: targetAddrs("10.0.0.7")})
	settle(t, ts)

	want := route.Build(ts.known.Claims(), route.Rules{Local: targetAddrs("10.0.0.7")}).Targets()
	got := k.Targets()
	if len(got) != len(want) || len(want) == 0 {
		t.Fatalf("kernel has %v, want %v", got, want)
	}
	for i, target := range want {
		ts.mu.Lock()
		state := ts.state(target)
		ts.mu.Unlock()
		if got[i].Addr != target.Addr || got[i].State != state || !target.Ambiguous && got[i].Node != target.Node {
			t.Errorf("kernel has %v, want %v %s", got[i], target, state)
		}
	}
}

func TestTargetsReportRefusalsOnce(t *testing.T) {
	ts, k := makeTargets(t, "", route.Rules{})
	var out bytes.Buffer
	ts.log = slog.New(slog.NewTextHandler(&out, nil))
	runTargets(t, ts, k)
	targetsLogin(t, ts, "edge-1", "127.0.0.1")
	settle(t, ts)
	targetsLogin(t, ts, "edge-2", "224.0.0.1")
	settle(t, ts)
	for _, want := range []string{"node=edge-1 addr=127.0.0.1 reason=loopback", "node=edge-2 addr=224.0.0.1 reason=multicast"} {
		if strings.Count(out.String(), want) != 1 {
			t.Errorf("log, not once %q:\n%s", want, out.String())
		}
	}

	// Very many at once are not a line each.
	out.Reset()
	for i := range 100 {
		ts.known.Learn(route.Claim{Node: fmt.Sprintf("edge-%d", i+10), Addrs: targetAddrs(fmt.Sprintf("127.0.1.%d", i))})
	}
	ts.setRules(route.Rules{})
	settle(t, ts)
	if n := strings.Count(out.String(), "reason=loopback"); n != maxReportsPerBuild || !strings.Contains(out.String(), "number=80") {
		t.Errorf("%d lines:\n%s", n, out.String())
	}
}

func TestBaseRulesKeepCanaryAddresses(t *testing.T) {
	table := route.Build([]route.Claim{{Node: "edge-1", Addrs: targetAddrs("192.0.2.1", "2001:db8::1", "192.0.2.2")}}, baseRules(nil))
	if table.Count(route.Reserved) != 2 || len(table.Targets()) != 1 {
		t.Errorf("%v %v", table.Targets(), table.Refusals())
	}
}
