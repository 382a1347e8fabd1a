// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"
)

// The index is the small CA's memory of what it issued: one line a certificate, oldest first, after a line that names
// the format. It is what keeps one address from being issued to two nodes.
//
//	edge-tunnel-index 1
//	SERIAL agent|server NAME NOT-AFTER ADDRESS,ADDRESS,...|-
type index []indexEntry

type indexEntry struct {
	serial   string
	role     Role
	name     string
	notAfter time.Time    // UTC, whole seconds
	addrs    []netip.Addr // of agents
}

const (
	indexHeader = "edge-tunnel-index 1"
	maxIndex    = 64 << 20 // bytes; about half a million certificates
)

var indexRoles = [...]struct {
	word string
	role Role
}{{"agent", RoleAgent}, {"server", RoleServer}}

// parseIndex wants every line to be right: an entry that is skipped is an address that could be issued twice.
func parseIndex(data []byte) (index, error) {
	text, ok := strings.CutPrefix(string(data), indexHeader+"\n")
	if !ok {
		return nil, fmt.Errorf("does not begin with the line %q", indexHeader)
	}
	var ix index
	n := 1
	for line := range strings.Lines(text) {
		n++
		line, ok := strings.CutSuffix(line, "\n")
		if !ok {
			return nil, fmt.Errorf("line %d: cut off", n)
		}
		e, err := parseIndexEntry(line)
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		ix = append(ix, e)
	}
	return ix, nil
}

func parseIndexEntry(line string) (e indexEntry, err error) {
	f := strings.Split(line, " ")
	if len(f) != 5 {
		return e, fmt.Errorf("%d fields, not 5", len(f))
	}
	if e.serial, err = parseSerial(f[0]); err != nil {
		return e, err
	}
	for _, r := range indexRoles {
		if r.word == f[1] {
			e.role = r.role
		}
	}
	if e.role == "" {
		return e, fmt.Errorf("unknown role %.40q", f[1])
	}
	if err = CheckName(f[2]); err != nil {
		return e, err
	}
	e.name = f[2]
	if e.notAfter, err = time.Parse(time.RFC3339, f[3]); err != nil {
		return e, err
	}
	if e.notAfter = e.notAfter.UTC(); stamp(e.notAfter) != f[3] {
		return e, fmt.Errorf("time %.40q is not in UTC and whole seconds", f[3])
	}
	if f[4] == "-" {
		return e, nil
	}
	for text := range strings.SplitSeq(f[4], ",") {
		a, err := netip.ParseAddr(text)
		if err != nil {
			return e, err
		}
		if a != a.Unmap().WithZone("") {
			return e, fmt.Errorf("address %s has a zone or is an IPv4 address in IPv6 form", a)
		}
		e.addrs = append(e.addrs, a)
	}
	if len(e.addrs) > maxAddrs {
		return e, errors.New("too many addresses")
	}
	return e, nil
}

func (ix index) format() []byte {
	var b bytes.Buffer
	fmt.Fprintln(&b, indexHeader)
	for _, e := range ix {
		word := ""
		for _, r := range indexRoles {
			if r.role == e.role {
				word = r.word
			}
		}
		addrs := "-"
		if len(e.addrs) > 0 {
			var texts []string
			for _, a := range e.addrs {
				texts = append(texts, a.String())
			}
			addrs = strings.Join(texts, ",")
		}
		fmt.Fprintf(&b, "%s %s %s %s %s\n", e.serial, word, e.name, stamp(e.notAfter), addrs)
	}
	return b.Bytes()
}

// roleOf returns the role that name was last issued for, or "".
func (ix index) roleOf(name string) Role {
	for i := len(ix) - 1; i >= 0; i-- {
		if ix[i].name == name {
			return ix[i].role
		}
	}
	return ""
}

// others returns the last entry of each address that was last issued to another node. Expired ones count: an operator whose
// node is gone for good says so with reissue.
func (ix index) others(node string, addrs []netip.Addr) []Moved {
	last := make(map[netip.Addr]int)
	for i, e := range ix {
		for _, a := range e.addrs {
			last[a] = i
		}
	}
	var moved []Moved
	for _, a := range addrs {
		if i, ok := last[a]; ok && ix[i].name != node {
			moved = append(moved, Moved{Addr: a, Node: ix[i].name, Serial: ix[i].serial})
		}
	}
	return moved
}

// add appends an entry and drops the expired ones of the same name, so that renewals do not grow the index for ever.
func (ix index) add(e indexEntry, now time.Time) index {
	var out index
	for _, old := range ix {
		if old.name != e.name || now.Before(old.notAfter) {
			out = append(out, old)
		}
	}
	return append(out, e)
}
