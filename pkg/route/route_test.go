// SPDX-License-Identifier: Apache-2.0

package route

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"testing"
)

func TestBuild(t *testing.T) {
	table := Build([]Claim{
		claim("edge-2", "10.99.0.2", "2001:db8:2::2", "10.99.0.7"),
		claim("edge-1", "10.99.0.1", "::ffff:10.99.0.7", "127.0.0.1"),
		claim("edge-3", "10.99.0.7", "10.99.0.3"),
		claim("edge-3", "10.99.0.3", "10.99.0.33"),
	}, Rules{})

	wantTargets := []Target{
		{Addr: netip.MustParseAddr("10.99.0.1"), Node: "edge-1"},
		{Addr: netip.MustParseAddr("10.99.0.2"), Node: "edge-2"},
		{Addr: netip.MustParseAddr("10.99.0.3"), Node: "edge-3"},
		{Addr: netip.MustParseAddr("10.99.0.7"), Ambiguous: true, Claimants: []string{"edge-1", "edge-2", "edge-3"}},
		{Addr: netip.MustParseAddr("10.99.0.33"), Node: "edge-3"},
		{Addr: netip.MustParseAddr("2001:db8:2::2"), Node: "edge-2"},
	}
	if got := table.Targets(); !reflect.DeepEqual(got, wantTargets) {
		t.Errorf("targets\n got %v\nwant %v", got, wantTargets)
	}
	wantRefusals := []Refusal{
		{"edge-1", netip.MustParseAddr("10.99.0.7"), Ambiguous},
		{"edge-1", netip.MustParseAddr("127.0.0.1"), Loopback},
		{"edge-2", netip.MustParseAddr("10.99.0.7"), Ambiguous},
		{"edge-3", netip.MustParseAddr("10.99.0.7"), Ambiguous},
	}
	if got := table.Refusals(); !reflect.DeepEqual(got, wantRefusals) {
		t.Errorf("refusals\n got %v\nwant %v", got, wantRefusals)
	}
	for reason, want := range map[Reason]int{Ambiguous: 3, Loopback: 1, Multicast: 0, 0: 0, 200: 0} {
		if got := table.Count(reason); got != want {
			t.Errorf("count of %s: %d, want %d", reason, got, want)
		}
	}
	for node, want := range map[string][]netip.Addr{
		"edge-1": addrs("10.99.0.1"),
		"edge-2": addrs("10.99.0.2", "2001:db8:2::2"),
		"edge-3": addrs("10.99.0.3", "10.99.0.33"),
		"edge-4": nil,
	} {
		if got := table.NodeAddrs(node); !slices.Equal(got, want) {
			t.Errorf("addresses of %s: %v, want %v", node, got, want)
		}
	}
}

func TestLookup(t *testing.T) {
	table := Build([]Claim{claim("edge-1", "10.99.0.1", "2001:db8::1"), claim("a", "10.0.0.1"), claim("b", "10.0.0.1")}, Rules{})
	for _, test := range []struct {
		addr      string
		node      string
		ok, ambig bool
	}{
		{"10.99.0.1", "edge-1", true, false},
		{"::ffff:10.99.0.1", "edge-1", true, false},
		{"2001:db8::1", "edge-1", true, false},
		{"10.0.0.1", "", true, true},
		{"10.99.0.2", "", false, false},
		{"::", "", false, false},
		{"ffff::", "", false, false},
	} {
		got, ok := table.Lookup(netip.MustParseAddr(test.addr))
		if ok != test.ok || got.Node != test.node || got.Ambiguous != test.ambig {
			t.Errorf("%s: %+v, %t", test.addr, got, ok)
		}
	}
	if got, ok := table.Lookup(netip.Addr{}); ok {
		t.Errorf("no address: found %+v", got)
	}
	if got, ok := (&Table{}).Lookup(netip.MustParseAddr("10.0.0.1")); ok {
		t.Errorf("empty table: found %+v", got)
	}

	addr := netip.MustParseAddr("::ffff:10.99.0.1")
	if n := testing.AllocsPerRun(100, func() { table.Lookup(addr) }); n != 0 {
		t.Errorf("%v allocations a lookup", n)
	}
}

// A node without any address is shown; one whose addresses are in several claims has some.
func TestNodeWithoutAddresses(t *testing.T) {
	table := Build([]Claim{claim("b"), claim("a", "10.0.0.1"), claim("c"), claim("c", "10.0.0.3"), claim("d", "10.0.0.4"), claim("d"), claim("e"), claim("e")}, Rules{})
	want := []Refusal{{Node: "b", Reason: NoAddress}, {Node: "e", Reason: NoAddress}}
	if got := table.Refusals(); !reflect.DeepEqual(got, want) || table.Count(NoAddress) != 2 {
		t.Errorf("refused %v, want %v", got, want)
	}
}

func TestSplit(t *testing.T) {
	claims := []Claim{claim("a", "10.0.0.1", "10.96.0.1", "::ffff:10.0.0.9"), claim("b", "10.0.0.2"), claim("c", "10.0.0.9"), claim("d")}
	allowed, refused := Rules{Direct: addrs("10.0.0.9"), Services: prefixes("10.96.0.0/16")}.Split(claims)
	wantAllowed := []Claim{claim("a", "10.0.0.1"), claim("b", "10.0.0.2"), {Node: "c"}, {Node: "d"}}
	wantRefused := []Claim{claim("a", "10.96.0.1", "::ffff:10.0.0.9"), claim("c", "10.0.0.9")}
	if !reflect.DeepEqual(allowed, wantAllowed) || !reflect.DeepEqual(refused, wantRefused) {
		t.Errorf("allowed %v, refused %v", allowed, refused)
	}
}

func TestRefusalReasons(t *testing.T) {
	rules := Rules{
		Local:      addrs("10.0.0.1", "2001:db8::1", "10.0.0.2"),
		Redirect:   addrs("10.0.0.1", "10.0.0.9"),
		Servers:    addrs("10.0.1.1", "::ffff:10.0.1.2", "10.0.0.9"),
		Direct:     addrs("10.0.3.1", "10.0.1.1"),
		APIServers: addrs("10.0.2.1"),
		Services:   prefixes("10.96.0.0/12", "fd00:96::/112"),
		Reserved:   prefixes("192.0.2.1/32"),
		CIDRs:      prefixes("10.0.0.0/8", "fd00::/8", "2001:db8::/32", "::ffff:172.16.0.0/108", "192.0.2.0/24", "127.0.0.0/8", "240.0.0.0/4"),
	}
	for addr, want := range map[string]Reason{
		"127.0.0.1":        Loopback,
		"127.255.255.255":  Loopback,
		"::1":              Loopback,
		"::ffff:127.0.0.1": Loopback,
		"0.0.0.0":          Unspecified,
		"0.1.2.3":          Unspecified,
		"::":               Unspecified,
		"::ffff:0.0.0.0":   Unspecified,
		"224.0.0.1":        Multicast,
		"239.255.255.255":  Multicast,
		"ff02::1":          Multicast,
		"169.254.169.254":  LinkLocal,
		"fe80::1":          LinkLocal,
		"febf::1":          LinkLocal,
		"fe80::1%eth0":     Invalid,
		"2001:db8::5%eth0": Invalid,
		"255.255.255.255":  Broadcast,
		"10.0.0.1":         LocalAddress, // also a redirect address: the first rule counts
		"::ffff:10.0.0.1":  LocalAddress,
		"2001:db8::1":      LocalAddress,
		"10.0.0.9":         RedirectAddress,
		"10.0.1.1":         ServerAddress,
		"10.0.1.2":         ServerAddress,
		"10.0.2.1":         APIServer,
		"10.0.3.1":         DirectAddress,
		"10.96.0.1":        ServiceRange,
		"10.111.255.255":   ServiceRange,
		"fd00:96::a":       ServiceRange,
		"192.0.2.1":        Reserved,
		"11.0.0.1":         OutsideTargetCIDR,
		"2001:db9::1":      OutsideTargetCIDR,
		"172.32.0.1":       OutsideTargetCIDR,
		"10.112.0.1":       0,
		"172.16.0.1":       0,
		"192.0.2.2":        0,
		"240.0.0.1":        0,
		"255.255.255.254":  0,
		"2001:db8::2":      0,
	} {
		table := Build([]Claim{{"edge-1", addrs(addr)}}, rules)
		if want == 0 {
			if _, ok := table.Lookup(netip.MustParseAddr(addr)); !ok {
				t.Errorf("%s: refused: %v", addr, table.Refusals())
			}
			continue
		}
		r := table.Refusals()
		if len(r) != 1 || r[0].Reason != want || table.Count(want) != 1 || len(table.Targets()) != 0 || len(table.NodeAddrs("edge-1")) != 0 {
			t.Errorf("%s: targets %v, refusals %v, want %v", addr, table.Targets(), r, want)
		}
	}
}

func TestInvalidClaims(t *testing.T) {
	table := Build([]Claim{
		{"edge-1", []netip.Addr{{}}},
		claim("", "10.0.0.1", "10.0.0.2"),
		claim("edge-2", "10.0.0.2"),
	}, Rules{})
	want := []Refusal{
		{"", netip.MustParseAddr("10.0.0.1"), Invalid},
		{"", netip.MustParseAddr("10.0.0.2"), Invalid},
		{"edge-1", netip.Addr{}, Invalid},
	}
	if got := table.Refusals(); !reflect.DeepEqual(got, want) {
		t.Errorf("refusals %v, want %v", got, want)
	}
	if got, ok := table.Lookup(netip.MustParseAddr("10.0.0.2")); !ok || got.Node != "edge-2" {
		t.Errorf("a claim without a node disturbed edge-2: %+v %t", got, ok)
	}
}

// A refused address must not become ambiguous: it is nobody's by rule.
func TestRuleBeforeAmbiguity(t *testing.T) {
	table := Build([]Claim{claim("a", "10.0.0.1"), claim("b", "10.0.0.1")}, Rules{Local: addrs("10.0.0.1")})
	if len(table.Targets()) != 0 || table.Count(LocalAddress) != 2 || table.Count(Ambiguous) != 0 {
		t.Errorf("targets %v, refusals %v", table.Targets(), table.Refusals())
	}
}

func TestOrderOfClaimsDoesNotMatter(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	var claims []Claim
	for range 300 {
		c := Claim{Node: fmt.Sprintf("edge-%d", rng.IntN(200))} // some nodes have several claims
		for range rng.IntN(6) {
			c.Addrs = append(c.Addrs, netip.AddrFrom4([4]byte{10, 0, byte(rng.IntN(3)), byte(rng.IntN(256))}))
		}
		claims = append(claims, c)
	}
	rules := Rules{Local: addrs("10.0.0.1"), Services: prefixes("10.0.1.0/26"), CIDRs: prefixes("10.0.0.0/23")}
	want := Build(claims, rules)
	if want.Count(Ambiguous) == 0 || want.Count(ServiceRange) == 0 || want.Count(OutsideTargetCIDR) == 0 {
		t.Fatal("the claims do not test enough")
	}
	for range 20 {
		before := slices.Clone(claims)
		rng.Shuffle(len(claims), func(i, j int) { claims[i], claims[j] = claims[j], claims[i] })
		for i := range claims {
			claims[i].Addrs = slices.Clone(claims[i].Addrs)
			a := claims[i].Addrs
			rng.Shuffle(len(a), func(i, j int) { a[i], a[j] = a[j], a[i] })
		}
		given := slices.Clone(claims)
		got := Build(claims, rules)
		if !reflect.DeepEqual(got, want) {
			t.Fatalf("another order, another table:\n%v\n%v", before, claims)
		}
		if !reflect.DeepEqual(given, claims) {
			t.Fatal("Build changed its argument")
		}
	}
}

func TestReasonNames(t *testing.T) {
	seen := map[string]bool{}
	for _, r := range Reasons() {
		if name := r.String(); name == "" || seen[name] {
			t.Errorf("reason %d: name %q", r, name)
		} else {
			seen[name] = true
		}
	}
	if len(seen) != int(numReasons)-1 {
		t.Errorf("%d reasons", len(seen))
	}
	if Reason(0).String() != "reason_0" || numReasons.String() == "" {
		t.Error("unknown reasons need a name too")
	}
}

func TestStore(t *testing.T) {
	var s Store
	if got := s.Load(); got == nil || len(got.Targets()) != 0 {
		t.Fatalf("zero store: %v", got)
	}
	table := Build([]Claim{claim("edge-1", "10.0.0.1")}, Rules{})
	s.Put(table)
	if s.Load() != table {
		t.Fatal("not the table that was put")
	}
}

// FuzzBuild checks what must hold for any claims: each distinct (node, address) is exactly one of target, or refusal.
func FuzzBuild(f *testing.F) {
	f.Add([]byte{1, 10, 0, 0, 1, 2, 10, 0, 0, 1, 1, 127, 0, 0, 1})
	f.Add([]byte{0, 255, 255, 255, 255, 3, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, data []byte) {
		type pair struct {
			node string
			addr netip.Addr
		}
		pairs := map[pair]bool{}
		var claims []Claim
		for ; len(data) >= 5; data = data[5:] {
			c := Claim{Node: fmt.Sprintf("edge-%d", data[0]%4), Addrs: []netip.Addr{netip.AddrFrom4([4]byte(data[1:5]))}}
			claims = append(claims, c)
			pairs[pair{c.Node, c.Addrs[0]}] = true
		}
		table := Build(claims, Rules{Local: addrs("10.0.0.1"), CIDRs: prefixes("0.0.0.0/0")})
		got := map[pair]bool{}
		for _, target := range table.Targets() {
			if found, ok := table.Lookup(target.Addr); !ok || !reflect.DeepEqual(found, target) {
				t.Fatalf("target %v is not found", target)
			}
			if !target.Ambiguous {
				got[pair{target.Node, target.Addr}] = true
			} else if len(target.Claimants) < 2 || target.Node != "" {
				t.Fatalf("ambiguous target %+v", target)
			}
		}
		counted := 0
		for _, r := range table.Refusals() {
			p := pair{r.Node, r.Addr}
			if got[p] {
				t.Fatalf("%v is there twice", p)
			}
			got[p] = true
		}
		for _, r := range Reasons() {
			counted += table.Count(r)
		}
		if counted != len(table.Refusals()) || !reflect.DeepEqual(got, pairs) {
			t.Fatalf("got %v, want %v", got, pairs)
		}
	})
}

func manyClaims(n int) []Claim {
	claims := make([]Claim, 0, n/2)
	for i := range n / 2 {
		b := [4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}
		v6 := [16]byte{0xfd, 0, 0, 9, 12: b[0], 13: b[1], 14: b[2], 15: b[3]}
		claims = append(claims, Claim{fmt.Sprintf("edge-%d.example", i), []netip.Addr{netip.AddrFrom4(b), netip.AddrFrom16(v6)}})
	}
	return claims
}

func BenchmarkBuild65536(b *testing.B) {
	claims := manyClaims(65536)
	rules := Rules{Local: addrs("192.168.0.1"), Services: prefixes("10.255.0.0/16"), CIDRs: prefixes("10.0.0.0/8", "fd00::/8")}
	b.ReportAllocs()
	for b.Loop() {
		if got := len(Build(claims, rules).Targets()); got != 65536 {
			b.Fatal(got)
		}
	}
}

func BenchmarkLookup65536(b *testing.B) {
	table := Build(manyClaims(65536), Rules{})
	targets := table.Targets()
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		i = (i + 40503) & 0xffff
		if _, ok := table.Lookup(targets[i].Addr); !ok {
			b.Fatal("lost")
		}
	}
}
