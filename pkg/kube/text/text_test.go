// SPDX-License-Identifier: Apache-2.0

package text

import (
	"fmt"
	"net"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/edge-tunnel/edge-tunnel/pkg/identity"
)

func TestHostPort(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{"tunnel.example.org", "tunnel.example.org:10262"},
		{" tunnel.example.org:443\n", "tunnel.example.org:443"},
		{"203.0.113.7:31008", "203.0.113.7:31008"},
		{"203.0.113.7", "203.0.113.7:10262"},
		{"2001:DB8::1", "[2001:db8::1]:10262"},
		{"[2001:db8::1]", "[2001:db8::1]:10262"},
		{"[2001:db8::1]:0443", "[2001:db8::1]:443"},
		{"localhost:1", "localhost:1"},
		{"", ""}, {":10262", ""}, {"127.0.0.1:1", ""}, {"[::1]:1", ""}, {"0.0.0.0:1", ""}, {"169.254.0.1:1", ""}, {"fe80::1%eth0", ""},
		{"host:0", ""}, {"host:65536", ""}, {"host:http", ""}, {"host:1:2", ""}, {"https://host", ""}, {"a b:1", ""}, {"[", ""}, {"[]", ""},
	} {
		if got, err := HostPort(c.text, 10262); got != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%q: %q, %v; want %q", c.text, got, err, c.want)
		}
	}
	if _, err := HostPort("host", 0); err == nil {
		t.Error("no port at all")
	}
}

func TestNodes(t *testing.T) {
	if got := Nodes("a,b,,Not A Node,a.b"); !slices.Equal(got, []string{"a", "b", "a.b"}) {
		t.Error(got)
	}
	var many []string
	for i := range 10_000 {
		many = append(many, fmt.Sprintf("a-node-with-a-long-name-%06d", 10_000-i))
	}
	text := FormatNodes(many)
	got := Nodes(text)
	if len(text) > maxNodes || len(text) < maxNodes-100 || !slices.IsSorted(got) || got[0] != "a-node-with-a-long-name-000001" {
		t.Errorf("%d bytes, %d names", len(text), len(got))
	}
}

func TestServersFile(t *testing.T) {
	whole := Servers{
		Service: "kube-system/x-tunnel-server-svc", Addrs: []string{"203.0.113.7:10262", "tunnel.example.org:443"},
		Nodes: []string{"tunnel.example.org:443", "[2001:db8::1]:31008"}, Common: "10.96.0.77",
	}
	got, err := ParseServers(whole.Format())
	if err != nil || !reflect.DeepEqual(got, whole) {
		t.Errorf("%+v, %v", got, err)
	}
	if ways := got.Ways(); !slices.Equal(ways, []string{"203.0.113.7:10262", "tunnel.example.org:443", "[2001:db8::1]:31008"}) {
		t.Error(ways)
	}
	for addr, name := range map[string]string{"tunnel.example.org:443": "tunnel.example.org", "[2001:db8::1]:31008": "10.96.0.77", "other.example.org:1": "other.example.org"} {
		if got := got.Name(addr); got != name {
			t.Errorf("%s is asked for %s, want %s", addr, got, name)
		}
	}
	many := whole
	for i := range MaxWays + 1 {
		many.Nodes = append(many.Nodes, fmt.Sprintf("10.0.0.%d:1", i+1))
	}
	for name, data := range map[string]string{
		"empty": "", "half": string(whole.Format()[:40]), "nothing": "{}", "newer": `{"version":2,"service":"a/b"}`,
		"no address": `{"version":1,"service":"a/b","addresses":[],"nodes":null,"common":""}`,
		"field":      `{"version":1,"addresses":["a:1"],"more":1}`,
		"no port":    `{"version":1,"addresses":["a"]}`, "loopback": `{"version":1,"nodes":["127.0.0.1:1"]}`,
		"twice": `{"version":1,"addresses":["a:1","a:1"]}`, "common": `{"version":1,"addresses":["a:1"],"common":"a b"}`,
		"many": string(many.Format()), "large": strings.Repeat(" ", maxServersFile) + string(whole.Format()),
	} {
		if got, err := ParseServers([]byte(data)); err == nil {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

func FuzzHostPort(f *testing.F) {
	for _, s := range []string{"tunnel.example.org:443", "[2001:db8::1]:31008", "203.0.113.7", "::ffff:10.0.0.1", "[::1]", "host:00080"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		got, err := HostPort(text, 10262)
		if err != nil {
			return
		}
		if host, port, err := net.SplitHostPort(got); err != nil || host == "" || port == "0" || len(identity.Hosts([]string{host})) != 1 {
			t.Errorf("%q became %q: %v", text, got, err)
		}
		if again, err := HostPort(got, 0); err != nil || again != got {
			t.Errorf("%q became %q, which becomes %q: %v", text, got, again, err)
		}
	})
}

func FuzzNodes(f *testing.F) {
	for _, s := range []string{"edge-1,edge-2", ",,", "A,b c,-", "a.b,a.b"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		names := Nodes(text)
		for _, name := range names {
			if err := identity.CheckName(name); err != nil {
				t.Error(err)
			}
		}
		written := FormatNodes(names)
		if len(written) > maxNodes {
			t.Errorf("%d bytes", len(written))
		}
		if again := Nodes(written); len(text) <= maxNodes && !slices.Equal(again, slices.Sorted(slices.Values(names))) {
			t.Errorf("%q became %q", names, again)
		}
	})
}

func FuzzServersFile(f *testing.F) {
	f.Add(Servers{Service: "a/b", Addrs: []string{"a:1"}, Nodes: []string{"[2001:db8::1]:1"}, Common: "10.96.0.1"}.Format())
	f.Add([]byte(`{"version":1,"nodes":["a:1"]}`))
	f.Add([]byte(`{"version":2}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := ParseServers(data)
		if err != nil {
			return
		}
		if len(s.Ways()) == 0 || len(s.Addrs) > MaxWays || len(s.Nodes) > MaxWays {
			t.Errorf("%+v", s)
		}
		again, err := ParseServers(s.Format())
		if err != nil || !slices.Equal(again.Addrs, s.Addrs) || !slices.Equal(again.Nodes, s.Nodes) || again.Common != s.Common {
			t.Errorf("%+v became %+v: %v", s, again, err)
		}
	})
}
