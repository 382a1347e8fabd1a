// SPDX-License-Identifier: Apache-2.0

package deliver_test

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/edge-tunnel/edge-tunnel/pkg/deliver"
)

func rules(t *testing.T, texts ...string) []deliver.Rule {
	t.Helper()
	r, err := deliver.ParseRules(texts...)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func ports(list ...uint16) func(uint16) bool {
	return func(port uint16) bool { return slices.Contains(list, port) }
}

func TestPolicy(t *testing.T) {
	own := func(a netip.Addr) bool {
		return a == netip.MustParseAddr("10.0.0.5") || a == netip.MustParseAddr("fd00::5") ||
			// An interface has these as well; they are not opened by that.
			a == netip.MustParseAddr("169.254.1.1") || a == netip.MustParseAddr("fe80::1") || a.IsLoopback()
	}
	plain := deliver.Policy{Own: own, Loopback: ports(10250), ClosedPorts: []uint16{10266}}
	with := func(texts ...string) deliver.Policy {
		p := plain
		p.Allow = rules(t, texts...)
		return p
	}
	adminListed := plain
	adminListed.Loopback = ports(10250, 10266)

	for _, c := range []struct {
		name   string
		policy deliver.Policy
		dst    string
		want   string // targets, or the end of the error
	}{
		{"own address, any port", plain, "10.0.0.5:22", "[10.0.0.5:22]"},
		{"own address, IPv6", plain, "[fd00::5]:22", "[[fd00::5]:22]"},
		{"own address, v4-mapped", plain, "[::ffff:10.0.0.5]:22", "[10.0.0.5:22]"},
		{"loopback port: loopback first", plain, "10.0.0.5:10250", "[127.0.0.1:10250 10.0.0.5:10250]"},
		{"loopback port, IPv6", plain, "[fd00::5]:10250", "[[::1]:10250 [fd00::5]:10250]"},
		{"loopback port, address of the NAT gateway", plain, "198.51.100.7:10250", "[127.0.0.1:10250]"},
		{"loopback itself, its port listed", plain, "127.0.0.1:10250", "[127.0.0.1:10250]"},
		{"loopback itself, not listed", plain, "127.0.0.1:2379", "loopback port is not listed"},
		{"loopback itself, by a rule", with("127.0.0.1:2379"), "127.0.0.1:2379", "[127.0.0.1:2379]"},
		{"loopback itself, by a rule about all of it", with("127.0.0.0/8:2379"), "127.9.9.9:2379", "[127.9.9.9:2379]"},
		{"loopback itself, by a rule about everything", with("0.0.0.0/0:*"), "127.0.0.1:2379", "loopback port is not listed"},
		{"loopback itself, IPv6, by a rule about everything", with("[::/0]:*"), "[::1]:2379", "loopback port is not listed"},
		{"loopback itself, IPv6, by a rule", with("[::1]:2379"), "[::1]:2379", "[[::1]:2379]"},
		{"somebody else", plain, "10.0.0.6:22", "address is not the node's own, and not listed"},
		{"somebody else, listed", with("10.0.0.6:22"), "10.0.0.6:22", "[10.0.0.6:22]"},
		{"somebody else, listed, v4-mapped", with("10.0.0.0/24:22"), "[::ffff:10.0.0.6]:22", "[10.0.0.6:22]"},
		{"somebody else, another port listed", with("10.0.0.6:22"), "10.0.0.6:23", "address is not the node's own, and not listed"},
		{"somebody else, listed with a loopback port", with("10.0.0.6:10250"), "10.0.0.6:10250", "[10.0.0.6:10250]"},
		{"end of a range", with("10.0.0.6:20-22"), "10.0.0.6:22", "[10.0.0.6:22]"},
		{"beyond a range", with("10.0.0.6:20-22"), "10.0.0.6:23", "address is not the node's own, and not listed"},
		{"the agent's own port", plain, "10.0.0.5:10266", "port is the agent's own, and not listed"},
		{"the agent's own port, a loopback port", adminListed, "10.0.0.5:10266", "[127.0.0.1:10266 10.0.0.5:10266]"},
		{"the agent's own port, by a rule about it", with("10.0.0.5:10266"), "10.0.0.5:10266", "[10.0.0.5:10266]"},
		{"the agent's own port, by a rule about everything", with("0.0.0.0/0:*"), "10.0.0.5:10266", "port is the agent's own, and not listed"},
		{"somebody else's port of that number", with("10.0.0.6:10266"), "10.0.0.6:10266", "[10.0.0.6:10266]"},
		{"cloud metadata", with("0.0.0.0/0:*", "169.254.169.254:80"), "169.254.169.254:80", "never dialed"},
		{"own link-local", plain, "169.254.1.1:10250", "never dialed"},
		{"own link-local, IPv6", with("[::/0]:*"), "[fe80::1]:22", "never dialed"},
		{"link-local, v4-mapped", with("0.0.0.0/0:*", "[::/0]:*"), "[::ffff:169.254.169.254]:80", "never dialed"},
		{"unspecified", with("0.0.0.0/0:*"), "0.0.0.0:10250", "never dialed"},
		{"unspecified, IPv6", with("[::/0]:*"), "[::]:10250", "never dialed"},
		{"multicast", with("0.0.0.0/0:*"), "224.0.0.1:10250", "never dialed"},
		{"multicast, IPv6", with("[::/0]:*"), "[ff02::1]:10250", "never dialed"},
		{"broadcast", with("0.0.0.0/0:*"), "255.255.255.255:10250", "never dialed"},
		{"port 0", plain, "10.0.0.5:0", "never dialed"},
		{"zero value allows nothing", deliver.Policy{}, "10.0.0.5:22", "address is not the node's own, and not listed"},
	} {
		targets, err := c.policy.Targets(netip.MustParseAddrPort(c.dst))
		got := fmt.Sprint(targets)
		if err != nil {
			var denied *deliver.DeniedError
			if !errors.As(err, &denied) || denied.Reason() != "not_allowed" || targets != nil {
				t.Errorf("%s: %v with error %v", c.name, targets, err)
			}
			got = err.Error()
		}
		if got != c.want && !hasSuffix(got, c.want) {
			t.Errorf("%s: %s gives %s, want %s", c.name, c.dst, got, c.want)
		}
	}
}

func hasSuffix(s, end string) bool { return len(s) > len(end) && s[len(s)-len(end):] == end }

// Whatever a server asks for, and whatever is listed, nothing forbidden comes out.
func FuzzPolicy(f *testing.F) {
	f.Add([]byte{169, 254, 169, 254}, uint16(80))
	f.Add(netip.MustParseAddr("::ffff:127.0.0.1").AsSlice(), uint16(10250))
	f.Fuzz(func(t *testing.T, raw []byte, port uint16) {
		addr, ok := netip.AddrFromSlice(raw)
		if !ok {
			return
		}
		policy := deliver.Policy{
			Own:         func(netip.Addr) bool { return true },
			Loopback:    ports(10250),
			ClosedPorts: []uint16{10266},
			Allow:       rules(t, "0.0.0.0/0:*", "[::/0]:*"),
		}
		targets, err := policy.Targets(netip.AddrPortFrom(addr, port))
		if (err == nil) != (len(targets) > 0) {
			t.Fatal(targets, err)
		}
		for _, target := range targets {
			a := target.Addr()
			if a != a.Unmap() || a.IsLinkLocalUnicast() || a.IsMulticast() || a.IsUnspecified() || a.IsLoopback() && port != 10250 || port == 10266 {
				t.Fatalf("%v:%d may dial %v", addr, port, target)
			}
		}
	})
}
