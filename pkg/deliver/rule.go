// SPDX-License-Identifier: Apache-2.0

package deliver

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// Bounds on what ParseRules accepts.
const (
	MaxRules = 256 // rules altogether
	MaxPorts = 256 // ports and ranges of one rule
)

// Rule allows addresses on ports.
type Rule struct {
	Prefix netip.Prefix // masked; a single address has its full length
	Ports  []PortRange
}

// PortRange is all ports from First to Last, both included.
type PortRange struct{ First, Last uint16 }

func (r Rule) covers(dst netip.AddrPort) bool {
	if !r.Prefix.Contains(dst.Addr()) {
		return false
	}
	for _, ports := range r.Ports {
		if ports.First <= dst.Port() && dst.Port() <= ports.Last {
			return true
		}
	}
	return false
}

// String is the rule as ParseRules reads it.
func (r Rule) String() string {
	host := r.Prefix.String()
	if r.Prefix.IsSingleIP() {
		host = r.Prefix.Addr().String()
	}
	if r.Prefix.Addr().Is6() {
		host = "[" + host + "]"
	}
	ports := make([]string, len(r.Ports))
	for i, p := range r.Ports {
		ports[i] = p.String()
	}
	return host + ":" + strings.Join(ports, ",")
}

// String is the range as ParseRules reads it.
func (p PortRange) String() string {
	switch {
	case p == allPorts:
		return "*"
	case p.First == p.Last:
		return strconv.Itoa(int(p.First))
	}
	return fmt.Sprintf("%d-%d", p.First, p.Last)
}

var allPorts = PortRange{1, 65535}

// RuleError says what is wrong with a rule.
type RuleError struct {
	Text    string // the part that is wrong
	Problem string
}

func (e *RuleError) Error() string { return fmt.Sprintf("bad rule %q: %s", e.Text, e.Problem) }

// Reason is the label for metrics and records.
func (e *RuleError) Reason() string { return "bad_rule" }

// ParseRules reads rules of the form ADDR-OR-CIDR:PORTS, separated by commas, in one text or in several:
//
//	192.168.7.20:22,80      10.1.0.0/16:8000-8100      [fd00:7::/64]:*      192.168.7.20:22,80,[fd00:7::1]:443
//
// A part without a host is one more port of the rule before it. Hosts are addresses: a name could mean something else
// at each look-up, and the destinations that servers ask for are addresses. The error is a *RuleError.
func ParseRules(texts ...string) ([]Rule, error) {
	var rules []Rule
	for _, text := range texts {
		first := len(rules)
		for part := range strings.SplitSeq(text, ",") {
			part = strings.TrimSpace(part)
			host, ports, hasHost := cutHost(part)
			if hasHost {
				prefix, err := parseHost(host)
				if err != nil {
					return nil, err
				}
				if len(rules) == MaxRules {
					return nil, &RuleError{part, fmt.Sprintf("more than %d rules", MaxRules)}
				}
				rules = append(rules, Rule{Prefix: prefix})
			}
			if len(rules) == first {
				return nil, &RuleError{part, "want ADDR-OR-CIDR:PORTS"}
			}
			rule := &rules[len(rules)-1]
			if len(rule.Ports) == MaxPorts {
				return nil, &RuleError{part, fmt.Sprintf("more than %d ports and ranges in one rule", MaxPorts)}
			}
			r, err := parsePorts(part, ports)
			if err != nil {
				return nil, err
			}
			rule.Ports = append(rule.Ports, r)
		}
	}
	return rules, nil
}

// cutHost splits at the colon before the ports: the last one, unless it stands in brackets.
func cutHost(part string) (host, ports string, ok bool) {
	i := strings.LastIndexByte(part, ':')
	if i < 0 || i < strings.LastIndexByte(part, ']') {
		if strings.ContainsAny(part, "./[]") {
			return part, "", true // a host that lacks its ports; parsePorts says so
		}
		return "", part, false
	}
	return part[:i], part[i+1:], true
}

func parseHost(host string) (netip.Prefix, error) {
	inner, bracketed := strings.CutPrefix(host, "[")
	if bracketed {
		var closed bool
		if inner, closed = strings.CutSuffix(inner, "]"); !closed {
			return netip.Prefix{}, &RuleError{host, "brackets go around the whole address or CIDR: [fd00::/64]:22"}
		}
	}
	prefix, err := netip.ParsePrefix(inner)
	if addr, addrErr := netip.ParseAddr(inner); addrErr == nil && addr.Zone() == "" {
		prefix, err = netip.PrefixFrom(addr, addr.BitLen()), nil
	}
	switch {
	case err != nil && strings.Contains(inner, "/"):
		return netip.Prefix{}, &RuleError{host, "not a CIDR"}
	case err != nil:
		return netip.Prefix{}, &RuleError{host, "not an IP address (names are not looked up)"}
	case prefix.Addr().Is4In6():
		return netip.Prefix{}, &RuleError{host, "write IPv4 addresses as IPv4"}
	case prefix.Addr().Is6() && !bracketed:
		return netip.Prefix{}, &RuleError{host, "IPv6 needs brackets: [fd00::/64]:22"}
	case prefix.Addr().Is4() && bracketed:
		return netip.Prefix{}, &RuleError{host, "brackets are for IPv6"}
	case prefix != prefix.Masked():
		return netip.Prefix{}, &RuleError{host, fmt.Sprintf("bits set beyond the prefix length: %v is meant?", prefix.Masked())}
	}
	return prefix, nil
}

// parsePorts reads one port or range; part is what it stands in.
func parsePorts(part, text string) (PortRange, error) {
	if text == "*" {
		return allPorts, nil
	}
	from, to, isRange := strings.Cut(text, "-")
	if !isRange {
		to = from
	}
	first, errFirst := strconv.ParseUint(from, 10, 16)
	last, errLast := strconv.ParseUint(to, 10, 16)
	switch {
	case text == "":
		return PortRange{}, &RuleError{part, "ports are missing: HOST:22, HOST:8000-8100 or HOST:*"}
	case errFirst != nil || errLast != nil || first == 0 || last == 0:
		return PortRange{}, &RuleError{part, "ports are numbers from 1 to 65535, ranges of them, or *"}
	case first > last:
		return PortRange{}, &RuleError{part, "range ends before it begins"}
	}
	return PortRange{uint16(first), uint16(last)}, nil
}
