// SPDX-License-Identifier: Apache-2.0

// Package servercfg understands the ConfigMap that users of edge-tunnel and yurt-tunnel have: edge-tunnel-server-cfg, yurt-tunnel-server-cfg. It
// only reads; package kube follows the object, and the daemons put into force what it says.
//
// Nothing in it is dropped silently: an entry that is not understood is a [Problem], and the others count.
package servercfg

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// Keys of the ConfigMap.
const (
	KeyHTTP      = "http-proxy-ports"
	KeyHTTPS     = "https-proxy-ports"
	KeyLocalhost = "localhost-proxy-ports"
	KeyDNAT      = "dnat-ports-pair"
)

// MaxProblems are kept of one ConfigMap; More counts the others.
const MaxProblems = 64

const maxShown = 40 // bytes of an entry

// Config is what a ConfigMap says.
type Config struct {
	Ports     []uint16 // to be tunneled beside those that always are: sorted, distinct
	Localhost []uint16 // which of the tunneled ports agents dial on their loopback; nil: their default
	Problems  []Problem
	More      int // problems that are not listed

	good, bad int // entries
}

// Problem is an entry that does not count, or that counts but should be written in another way.
type Problem struct {
	Key   string
	Entry string // shortened
	Text  string // what is wrong, and what to write
	Taken bool   // it counts all the same
}

func (p Problem) String() string {
	if p.Entry == "" {
		return p.Key + ": " + p.Text
	}
	return fmt.Sprintf("%s: %q %s", p.Key, p.Entry, p.Text)
}

// Usable is false if there are entries and none of them is understood: whoever wrote that has not meant "no port at all".
func (c Config) Usable() bool { return c.good > 0 || c.bad == 0 }

// Parse reads the data of a ConfigMap. Refuse says why a port cannot be tunneled, or nothing; it may be nil.
func Parse(data map[string]string, refuse func(port uint16) string) Config {
	if refuse == nil {
		refuse = func(uint16) string { return "" }
	}
	var c Config
	for _, key := range slices.Sorted(maps.Keys(data)) {
		switch key {
		case KeyHTTP, KeyHTTPS:
			each(data[key], func(entry string) {
				if port, ok := c.port(key, entry, entry, refuse); ok {
					c.Ports = append(c.Ports, port)
				}
			})
		case KeyLocalhost:
			each(data[key], func(entry string) {
				if port, ok := c.port(key, entry, entry, nil); ok {
					c.Localhost = append(c.Localhost, port)
				}
			})
		case KeyDNAT:
			each(data[key], func(entry string) { c.pair(entry, refuse) })
		default:
			c.note(Problem{Key: shortened(key), Text: fmt.Sprintf("is no key that is looked at; these are %s, %s, %s and %s", KeyHTTP, KeyHTTPS, KeyLocalhost, KeyDNAT)})
		}
	}
	slices.Sort(c.Ports)
	c.Ports = slices.Compact(c.Ports)
	slices.Sort(c.Localhost)
	c.Localhost = slices.Compact(c.Localhost)
	return c
}

// each takes a list apart: commas, and spaces and line ends around entries. A comma too many is nothing to talk about.
func each(list string, see func(entry string)) {
	for entry := range strings.SplitSeq(list, ",") {
		if entry = strings.TrimSpace(entry); entry != "" {
			see(entry)
		}
	}
}

// pair reads an entry of the retired key, "9051=10264" or "9051". What stands right of the sign was the port of an entry of the tunnel server; no such
// entry is in the way any more, so whatever it is does not matter.
func (c *Config) pair(entry string, refuse func(uint16) string) {
	left, _, _ := strings.Cut(entry, "=")
	if port, ok := c.port(KeyDNAT, entry, strings.TrimSpace(left), refuse); ok {
		c.Ports = append(c.Ports, port)
		c.note(Problem{Key: KeyDNAT, Entry: shortened(entry), Taken: true, Text: fmt.Sprintf("is tunneled, but this key is retired: write %s: %q", KeyHTTP, fmt.Sprint(port))})
	}
}

// port reads one port, which text is, out of an entry.
func (c *Config) port(key, entry, text string, refuse func(uint16) string) (uint16, bool) {
	why := ""
	port, err := strconv.ParseUint(text, 10, 16)
	switch {
	case strings.Trim(text, "0123456789") != "" || text == "":
		why = "is no port"
		if strings.Contains(entry, "=") && key != KeyDNAT {
			why = "is a pair of ports: write the left one alone"
		}
	case err != nil || port == 0:
		why = "is not between 1 and 65535"
	case refuse != nil:
		why = refuse(uint16(port))
	}
	if why != "" {
		c.bad++
		c.note(Problem{Key: key, Entry: shortened(entry), Text: why})
		return 0, false
	}
	c.good++
	return uint16(port), true
}

func (c *Config) note(p Problem) {
	if len(c.Problems) == MaxProblems {
		c.More++
		return
	}
	c.Problems = append(c.Problems, p)
}

func shortened(text string) string {
	if len(text) <= maxShown {
		return strings.ToValidUTF8(text, "\uFFFD")
	}
	return strings.ToValidUTF8(text[:maxShown], "\uFFFD") + "…"
}
