// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

type settings struct {
	ca      string
	listen  string
	first   uint16
	ports   []uint16
	addrs   []netip.Addr
	ranges  []netip.Prefix
	servers []string
	host    bool
	drain   time.Duration
	log     Log
}

func defaults() settings {
	return settings{listen: ":10262", first: 10270, ports: []uint16{10250, 10255}, drain: 10 * time.Second}
}

func (s *settings) flags() *Flags {
	f := &Flags{
		Summary:  "prog is what these tests start.",
		Synopsis: []string{"--ca-cert FILE\n[--port N]"},
		Examples: []Example{{"Listen everywhere:", "prog --listen :1"}, {"Take part:", "prog --node-ip 10.0.0.1"}},
		Notes:    "One.\n\nTwo.",
	}
	g := f.Group("Traffic")
	ListenVar(g, &s.listen, "listen", "Where agents and peers come in.")
	PortVar(g, &s.first, "redirect-port", "The first of eight ports that intercepted connections are sent to; it must be free.")
	PortsVar(g, &s.ports, "tunneled-ports", "Intercepted destination ports.")
	AddrsVar(g, &s.addrs, "node-ip", "Addresses of this node.")
	PrefixesVar(g, &s.ranges, "target-cidr", "Where targets may be.")
	HostPortsVar(g, &s.servers, "server", 10262, "Servers to dial.")
	ChoiceVar(g, &s.host, "intercept", []Choice[bool]{{"all", false}, {"host", true}}, "Whose connections.")
	g.DurationVar(&s.drain, "drain-timeout", s.drain, "How long open connections may take to finish.")
	files := f.Group("Certificates")
	files.StringVar(&s.ca, "ca-cert", "", "`FILE` with the CA bundle.")
	f.Require("ca-cert")
	LogVar(f.Group("Logging"), &s.log)
	return f
}

func parse(t *testing.T, args ...string) (s settings, status int, stdout, stderr string) {
	t.Helper()
	s = defaults()
	status, stdout, stderr = run(t, func(_ context.Context, env Env) error { return s.flags().Parse(env) }, args...)
	return s, status, stdout, stderr
}

func TestParseLists(t *testing.T) {
	s, status, _, stderr := parse(t, "--ca-cert=f", "--tunneled-ports", "9100, 80", "--tunneled-ports=80,443",
		"--node-ip", "::ffff:10.0.0.1,10.0.0.1", "--node-ip", "2001:DB8::1", "--target-cidr=10.0.0.0/8,2001:db8::/32",
		"--server", "Cloud.example.com,10.0.0.9:1,[2001:db8::2]:2,2001:db8::3", "--intercept", "host", "--drain-timeout=3s",
		"--listen", "[::1]:0", "--redirect-port", "20000", "--log-format", "json", "--log-level", "debug")
	if status != 0 {
		t.Fatal(stderr)
	}
	if want := []uint16{80, 443, 9100}; !slices.Equal(s.ports, want) {
		t.Errorf("ports %v, want %v", s.ports, want)
	}
	if got, want := fmt.Sprint(s.addrs, s.ranges), "[10.0.0.1 2001:db8::1] [10.0.0.0/8 2001:db8::/32]"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if want := []string{"Cloud.example.com:10262", "10.0.0.9:1", "[2001:db8::2]:2", "[2001:db8::3]:10262"}; !slices.Equal(s.servers, want) {
		t.Errorf("servers %v, want %v", s.servers, want)
	}
	if !s.host || s.drain != 3*time.Second || s.listen != "[::1]:0" || s.first != 20000 || !s.log.JSON || s.log.Level != -4 {
		t.Errorf("got %+v", s)
	}
}

func TestDefaultsStay(t *testing.T) {
	s, status, _, stderr := parse(t, "--ca-cert=f")
	if status != 0 || !slices.Equal(s.ports, []uint16{10250, 10255}) || s.listen != ":10262" {
		t.Errorf("status %d %s, got %+v", status, stderr, s)
	}
}

func TestUsageErrors(t *testing.T) {
	for _, c := range []struct{ args, want string }{
		{"", "error: --ca-cert is required\nhint: prog --help shows what is possible\n"},
		{"--ca-cert=", "error: --ca-cert is empty\n"},
		{"--ca-cert", "error: --ca-cert needs a value\nhint: expected FILE\n"},
		{"--ca-crt f", "error: unknown flag --ca-crt\nhint: did you mean --ca-cert?\n"},
		{"-server x", "error: unknown flag -server\nhint: did you mean --server?\n"},
		{"-x", "error: unknown flag -x\nhint: prog --help shows what is possible\n"},
		{"--=x", "error: \"--=x\" is not a flag\nhint: flags look like"},
		{"--ca-cert f --tunneled-ports 80 90", "error: unexpected argument \"90\"\nhint: every value belongs to a flag; lists are written with commas"},
		{"x y", "error: unexpected argument \"x\"\nhint: every value belongs to a flag; lists are written with commas or by repeating the flag\nerror: --ca-cert is required\n"},
		{"--tunneled-ports 80-90", "error: --tunneled-ports: \"80-90\" is a range, and ranges are not possible here\nhint: expected ports from 1 to 65535, such as 9100,10250\n"},
		{"--tunneled-ports 0,x,80", "error: --tunneled-ports: \"0\" is not between 1 and 65535\nerror: --tunneled-ports: \"x\" is not a port\nhint: expected"},
		{"--tunneled-ports 65536", "\"65536\" is not between"},
		{"--tunneled-ports 80,,90", "error: --tunneled-ports: an entry is empty\nhint: expected"},
		{"--tunneled-ports=", "error: --tunneled-ports: the value is empty\nhint: expected"},
		{"--redirect-port +1", "error: --redirect-port: \"+1\" is not a port\nhint: expected a port from 1 to 65535\n"},
		{"--node-ip 10.0.0.1:80", "is an address with a port"},
		{"--node-ip 10.0.0.0/8", "is a range of addresses, and one"},
		{"--node-ip fe80::1%eth0", "has a zone"},
		{"--node-ip edge-1", "is not an IP address\nhint: expected IP addresses, such as"},
		{"--target-cidr 10.1.2.3/8", "has bits below its mask; the range is 10.0.0.0/8\nhint: expected"},
		{"--target-cidr 10.1.2.3", "is one address; as a range it is 10.1.2.3/32"},
		{"--target-cidr ::ffff:10.0.0.0/104", "is IPv4 written as IPv6"},
		{"--server https://x:1", "is a URL\nhint: expected HOST or HOST:PORT, such as cloud.example.com, 192.0.2.1:10262 or [2001:db8::1]:10262\n"},
		{"--server x:0", "has a port that is not between 1 and 65535"},
		{"--server x:y", "has a port that is not a port"},
		{"--server 10.0.0.256", "neither an address nor a DNS name"},
		{"--intercept none", "error: --intercept: \"none\" is not one of the choices\nhint: expected all or host\n"},
		{"--log-level loud", "hint: expected debug, info, warn or error\n"},
		{"--drain-timeout 10", "error: --drain-timeout: \"10\" is not a duration, such as 10s or 1m30s\n"},
		{"--listen 10262", "error: --listen: \"10262\" is not ADDR:PORT\nhint: expected ADDR:PORT, such as"},
		{"--listen example.com:1", "has a host that is not an address of this machine"},
		{"--node-ip " + strings.Repeat("x", 5000), "…\" is not an IP address"},
	} {
		t.Run(fmt.Sprintf("%.30s", c.args), func(t *testing.T) {
			_, status, stdout, stderr := parse(t, strings.Fields(c.args)...)
			if status != StatusUsage || !strings.Contains(stderr, c.want) || stdout != "" {
				t.Errorf("status %d, stdout %q, stderr:\n%swant:\n%s", status, stdout, stderr, c.want)
			}
			if len(stderr) > 1000 {
				t.Errorf("%d bytes of error", len(stderr))
			}
		})
	}
}

func TestBadEntryChangesNothing(t *testing.T) {
	s, _, _, _ := parse(t, "--tunneled-ports=1,x")
	if !slices.Equal(s.ports, []uint16{10250, 10255}) {
		t.Errorf("ports are %v after a refused list", s.ports)
	}
}

func TestHelp(t *testing.T) {
	_, status, out, stderr := parse(t, "--help", "--nonsense")
	if status != 0 || stderr != "" {
		t.Fatalf("status %d, stderr %q", status, stderr)
	}
	for _, want := range []string{
		"prog is what these tests start.\n\nUSAGE\n  prog --ca-cert FILE\n       [--port N]\n\nTRAFFIC\n",
		"      --listen ADDR             Where agents and peers come in. (default :10262)\n",
		"      --tunneled-ports PORT,...\n                                Intercepted destination ports. (default 10250,10255)\n",
		"      --redirect-port PORT      The first of eight ports that intercepted connections are sent to;\n" +
			"                                it must be free. (default 10270)\n",
		"      --intercept all|host      Whose connections. (default all)\n",
		"      --drain-timeout DURATION  How long open connections may take to finish. (default 10s)\n",
		"\nCERTIFICATES\n      --ca-cert FILE            FILE with the CA bundle. (required)\n",
		"\nLOGGING\n", "(default info)", "(default text)",
		"\nGENERAL\n  -h, --help                    Show this text.\n",
		"\nEXAMPLES\n  # Listen everywhere:\n  prog --listen :1\n\n  # Take part:\n  prog --node-ip 10.0.0.1\n\nOne.\n\nTwo.\n",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("the help lacks:\n%s\nit is:\n%s", want, out)
		}
	}
	for line := range strings.SplitSeq(out, "\n") {
		if len([]rune(line)) > helpWidth {
			t.Errorf("line of %d characters: %s", len(line), line)
		}
	}
}

func TestShowVersion(t *testing.T) {
	_, status, out, _ := parse(t, "--version")
	if status != 0 || !strings.HasPrefix(out, "prog "+Version()+" (go") {
		t.Errorf("status %d, %q", status, out)
	}
}

func TestParseReturnsTypedErrors(t *testing.T) {
	s := defaults()
	env := Env{Name: "prog", Args: []string{"--bad"}}
	var usage *UsageError
	if err := s.flags().Parse(env); !errors.As(err, &usage) {
		t.Errorf("%T is no *UsageError", err)
	}
}

// The parsers must never panic, and what they accept they must accept again in the form that they returned, unchanged.

func FuzzParsePort(f *testing.F) {
	for _, s := range []string{"1", "65535", "65536", "0", "-1", "+1", "1-2", "0x1", "1_0", "", "٣", "00080"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		port, err := ParsePort(s)
		if err == nil && (port == 0 || !strings.HasSuffix(s, fmt.Sprint(port)) || !isNumber(s)) {
			t.Errorf("%q became %d", s, port)
		}
	})
}

func FuzzParseAddr(f *testing.F) {
	for _, s := range []string{"10.0.0.1", "::1", "::ffff:1.2.3.4", "fe80::1%eth0", "1.2.3.4:5", "[::1]:1", "1.2.3.0/24", "::ffff:1.2.3.4%x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		addr, err := ParseAddr(s)
		if err != nil {
			return
		}
		if again, err := ParseAddr(addr.String()); err != nil || again != addr || addr.Is4In6() || addr.Zone() != "" {
			t.Errorf("%q became %v, then %v, %v", s, addr, again, err)
		}
	})
}

func FuzzParsePrefix(f *testing.F) {
	for _, s := range []string{"10.0.0.0/8", "::/0", "10.0.0.1/8", "10.0.0.1", "::ffff:10.0.0.0/104", "fe80::1%a", "::ffff:1.2.3.4"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		prefix, err := ParsePrefix(s)
		if err != nil {
			return
		}
		if again, err := ParsePrefix(prefix.String()); err != nil || again != prefix || prefix != prefix.Masked() {
			t.Errorf("%q became %v, then %v, %v", s, prefix, again, err)
		}
	})
}

func FuzzParseHostPort(f *testing.F) {
	for _, s := range []string{"a", "a:1", "[::1]:1", "::1", "[::1]", "[a]:1", "[a]", "a:b:c", "http://a", "a.", ":1", "1.2.3", "::ffff:1.2.3.4", "a:007", "fe80::1%x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got, err := ParseHostPort(s, 10262)
		if err != nil {
			return
		}
		if again, err := ParseHostPort(got, 1); err != nil || again != got {
			t.Errorf("%q became %q, then %q, %v", s, got, again, err)
		}
	})
}

func FuzzParseListen(f *testing.F) {
	for _, s := range []string{":1", ":0", "127.0.0.1:80", "[::]:80", "localhost:1", "x:1", "80", "[::1%lo]:1", "::1:80", ":00"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got, err := ParseListen(s)
		if err != nil {
			return
		}
		if again, err := ParseListen(got); err != nil || again != got {
			t.Errorf("%q became %q, then %q, %v", s, got, again, err)
		}
	})
}
