// SPDX-License-Identifier: Apache-2.0

package deliver_test

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/edge-tunnel/edge-tunnel/pkg/deliver"
)

func TestParseRules(t *testing.T) {
	for _, c := range []struct {
		texts []string
		want  []string
	}{
		{nil, nil},
		{[]string{"192.168.7.20:22"}, []string{"192.168.7.20:22"}},
		{[]string{"192.168.7.20:22,80,8000-8100"}, []string{"192.168.7.20:22,80,8000-8100"}},
		{[]string{"10.1.0.0/16:*"}, []string{"10.1.0.0/16:*"}},
		{[]string{"[fd00:7::/64]:443"}, []string{"[fd00:7::/64]:443"}},
		{[]string{"[fd00:7::1]:443, 10.0.0.1:1-65535"}, []string{"[fd00:7::1]:443", "10.0.0.1:*"}},
		{[]string{"10.0.0.1:22,80,[fd00::1]:22,443", "10.0.0.2:1"}, []string{"10.0.0.1:22,80", "[fd00::1]:22,443", "10.0.0.2:1"}},
		{[]string{"0.0.0.0/0:22"}, []string{"0.0.0.0/0:22"}},
		{[]string{"[::/0]:22"}, []string{"[::/0]:22"}},
	} {
		rules, err := deliver.ParseRules(c.texts...)
		if err != nil {
			t.Errorf("%q: %v", c.texts, err)
		}
		var got []string
		for _, r := range rules {
			got = append(got, r.String())
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%q is %q, want %q", c.texts, got, c.want)
		}
	}
}

func TestParseRulesRefuses(t *testing.T) {
	for text, problem := range map[string]string{
		"":                     "want ADDR-OR-CIDR:PORTS",
		"22":                   "want ADDR-OR-CIDR:PORTS",
		"10.0.0.1":             "ports are missing",
		"10.0.0.1:":            "ports are missing",
		"[fd00::1]":            "ports are missing",
		"10.0.0.1:22,":         "ports are missing",
		"10.0.0.1:0":           "from 1 to 65535",
		"10.0.0.1:65536":       "from 1 to 65535",
		"10.0.0.1:-1":          "from 1 to 65535",
		"10.0.0.1:ssh":         "from 1 to 65535",
		"10.0.0.1:80-":         "from 1 to 65535",
		"10.0.0.1:90-80":       "ends before it begins",
		"printer:80":           "names are not looked up",
		":80":                  "names are not looked up",
		"10.0.0.1/33:80":       "not a CIDR",
		"10.0.0.1/16:80":       "10.0.0.0/16 is meant?",
		"fd00::1:80":           "IPv6 needs brackets",
		"fd00::/64:80":         "IPv6 needs brackets",
		"[fd00::]/64:80":       "around the whole",
		"[10.0.0.1]:80":        "brackets are for IPv6",
		"[::ffff:10.0.0.1]:80": "IPv4 addresses as IPv4",
		"[fe80::1%eth0]:80":    "names are not looked up",
		strings.Repeat("1.1.1.1:1,", 256) + "1.1.1.1:1": "more than 256 rules",
		"1.1.1.1:1" + strings.Repeat(",2", 256):         "more than 256 ports",
	} {
		_, err := deliver.ParseRules(text)
		var bad *deliver.RuleError
		if !errors.As(err, &bad) || !strings.Contains(bad.Problem, problem) || bad.Reason() != "bad_rule" {
			t.Errorf("%.40q: %v, want a RuleError with %q", text, err, problem)
		}
	}
}

// What is parsed prints as something that parses to the same.
func FuzzParseRules(f *testing.F) {
	for _, seed := range []string{"192.168.7.20:22,80", "10.1.0.0/16:8000-8100", "[fd00:7::/64]:*", "10.0.0.1:22,[::1]:5", "a:b", "[]:,", "1.1.1.1:1,,"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		rules, err := deliver.ParseRules(text)
		if err != nil {
			var bad *deliver.RuleError
			if !errors.As(err, &bad) || rules != nil {
				t.Fatalf("%v and %v", rules, err)
			}
			return
		}
		for _, r := range rules {
			again, err := deliver.ParseRules(r.String())
			if err != nil || len(again) != 1 || again[0].String() != r.String() || again[0].Prefix != r.Prefix || !slices.Equal(again[0].Ports, r.Ports) {
				t.Fatalf("%q gives %v, which parses as %v, %v", text, r, again, err)
			}
		}
	})
}
