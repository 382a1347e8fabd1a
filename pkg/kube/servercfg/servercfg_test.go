// SPDX-License-Identifier: Apache-2.0

package servercfg

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"
)

func refuse(port uint16) string {
	if port >= 10270 && port <= 10277 {
		return "is one of the redirect ports"
	}
	return ""
}

func TestParse(t *testing.T) {
	type data = map[string]string
	for _, c := range []struct {
		data             data
		ports, localhost []uint16
		problems         []string // parts of them, in order; those that count have a +
		unusable         bool
	}{
		{nil, nil, nil, nil, false},
		{data{KeyHTTP: ""}, nil, nil, nil, false},
		{data{KeyHTTP: " ,, \n"}, nil, nil, nil, false},
		{data{KeyHTTP: "9051"}, []uint16{9051}, nil, nil, false},
		{data{KeyHTTP: "9200, 9100 ,9200,", KeyHTTPS: "\n9443\n,00080"}, []uint16{80, 9100, 9200, 9443}, nil, nil, false},
		{data{KeyLocalhost: "10250, 10255"}, nil, []uint16{10250, 10255}, nil, false},
		// An agent may dial these on its loopback; the server redirects none of its own ports.
		{data{KeyLocalhost: "10270", KeyHTTP: "10270,1"}, []uint16{1}, []uint16{10270}, []string{`http-proxy-ports: "10270" is one of the redirect ports`}, false},
		{data{KeyDNAT: "9051=10264,9052=10263, 9053 = x,9054"}, []uint16{9051, 9052, 9053, 9054}, nil, []string{
			`+dnat-ports-pair: "9051=10264" is tunneled, but this key is retired: write http-proxy-ports: "9051"`,
			`+dnat-ports-pair: "9052=10263" is tunneled`, `+dnat-ports-pair: "9053 = x" is tunneled`, `+dnat-ports-pair: "9054" is tunneled`}, false},
		{data{KeyHTTP: "9100,9200=10264,x"}, []uint16{9100}, nil, []string{`http-proxy-ports: "9200=10264" is a pair of ports: write the left one alone`, `"x" is no port`}, false},
		{data{KeyHTTP: "0,65536,99999999999999999999,-1,+1,1_0,0x1,٣,9-10"}, nil, nil, []string{
			`"0" is not between`, `"65536" is not between`, `"99999999999999999999" is not between`, `"-1" is no port`, `"+1" is no port`, `"1_0" is no port`, `"0x1" is no port`,
			`"٣" is no port`, `"9-10" is no port`}, true},
		{data{KeyHTTP: "garbage", KeyHTTPS: "9100"}, []uint16{9100}, nil, []string{`"garbage" is no port`}, false},
		{data{KeyHTTP: "garbage", KeyDNAT: "=,=10264"}, nil, nil, []string{`dnat-ports-pair: "=" is no port`, `"=10264" is no port`, `"garbage" is no port`}, true},
		{data{"http-proxy-port": "9100"}, nil, nil, []string{"http-proxy-port: is no key that is looked at"}, false},
		{data{KeyHTTP: strings.Repeat("x", 1000)}, nil, nil, []string{`http-proxy-ports: "` + strings.Repeat("x", maxShown) + `…" is no port`}, true},
	} {
		got := Parse(c.data, refuse)
		if !slices.Equal(got.Ports, c.ports) || !slices.Equal(got.Localhost, c.localhost) || got.Usable() == c.unusable {
			t.Errorf("%v: %v, localhost %v, usable %t", c.data, got.Ports, got.Localhost, got.Usable())
		}
		if len(got.Problems) != len(c.problems) {
			t.Errorf("%v: problems %v, want %q", c.data, got.Problems, c.problems)
			continue
		}
		for i, want := range c.problems {
			want, taken := strings.CutPrefix(want, "+")
			if p := got.Problems[i]; !strings.Contains(p.String(), want) || p.Taken != taken {
				t.Errorf("%v: problem %v, taken %t, want %q", c.data, p, p.Taken, want)
			}
		}
	}
}

func TestProblemsAreBounded(t *testing.T) {
	got := Parse(map[string]string{KeyHTTP: strings.Repeat("x,", 1000) + "9100"}, nil)
	if len(got.Problems) != MaxProblems || got.More != 1000-MaxProblems || !slices.Equal(got.Ports, []uint16{9100}) {
		t.Errorf("%d problems, %d more, ports %v", len(got.Problems), got.More, got.Ports)
	}
}

// FuzzParse: each entry is a port that counts, or a problem, or both where that is said.
func FuzzParse(f *testing.F) {
	for _, s := range []string{"9100, 9200", "9051=10264,9052=10264", "10250,x,,=", "", "0,65536", "\xff,\x00"} {
		f.Add(s, s)
	}
	f.Fuzz(func(t *testing.T, list, pairs string) {
		data := map[string]string{KeyHTTP: list, KeyDNAT: pairs}
		c := Parse(data, refuse)
		if !reflect.DeepEqual(c, Parse(data, refuse)) {
			t.Error("twice, and not the same")
		}
		entries := 0
		for _, text := range data {
			for e := range strings.SplitSeq(text, ",") {
				if strings.TrimSpace(e) != "" {
					entries++
				}
			}
		}
		if c.good+c.bad != entries || len(c.Ports) > c.good {
			t.Errorf("%d entries, %d good, %d bad, ports %v", entries, c.good, c.bad, c.Ports)
		}
		if !slices.IsSorted(c.Ports) || slices.Contains(c.Ports, 0) {
			t.Errorf("ports %v", c.Ports)
		}
		for _, p := range c.Problems {
			if !utf8.ValidString(p.String()) || len(p.Entry) > 4*maxShown {
				t.Errorf("problem %q", p)
			}
		}
		// What was understood is understood again, alone and without a complaint.
		again := Parse(map[string]string{KeyHTTP: strings.Trim(strings.ReplaceAll(fmt.Sprint(c.Ports), " ", ","), "[]")}, refuse)
		if !slices.Equal(again.Ports, c.Ports) || len(again.Problems) > 0 {
			t.Errorf("%v became %v, %v", c.Ports, again.Ports, again.Problems)
		}
	})
}
