// SPDX-License-Identifier: Apache-2.0

// Package text understands what stands in annotations of Kubernetes' objects, and in the file in which an agent keeps what it has read there. It
// knows nothing of the objects themselves: package kube has them.
package text

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/edge-tunnel/edge-tunnel/pkg/identity"
)

// HostPort reads HOST[:PORT], of which the host has to be something that others can dial and a server's certificate can say. It returns
// HOST:PORT in the form that certificates and package net have.
func HostPort(text string, defaultPort uint16) (string, error) {
	text = strings.TrimSpace(text)
	host, port := text, strconv.Itoa(int(defaultPort))
	if inner, ok := strings.CutPrefix(text, "["); ok && strings.HasSuffix(inner, "]") {
		host = strings.TrimSuffix(inner, "]")
	} else if _, err := netip.ParseAddr(text); err != nil && strings.Contains(text, ":") {
		if host, port, err = net.SplitHostPort(text); err != nil {
			return "", fmt.Errorf("%s is not HOST:PORT", shown(text))
		}
	}
	number, err := strconv.ParseUint(port, 10, 16)
	if err != nil || number == 0 {
		return "", fmt.Errorf("%s has no port between 1 and 65535", shown(text))
	}
	hosts := identity.Hosts([]string{host})
	if len(hosts) != 1 {
		return "", fmt.Errorf("%s has no name or address that could be dialed from elsewhere", shown(text))
	}
	return net.JoinHostPort(hosts[0], strconv.FormatUint(number, 10)), nil
}

func shown(text string) string {
	const most = 80
	if len(text) > most {
		text = text[:most] + "…"
	}
	return strconv.Quote(text)
}

// What a Lease of a server says at most: more does not fit into an object's annotations.
const maxNodes = 200 << 10

// Nodes reads a list of names with commas, as FormatNodes has written it. What is no name of a node is left out.
func Nodes(text string) []string {
	var names []string
	for name := range strings.SplitSeq(text, ",") {
		if identity.CheckName(name) == nil {
			names = append(names, name)
		}
	}
	return names
}

// FormatNodes writes names, sorted, as far as they fit.
func FormatNodes(names []string) string {
	names = slices.Sorted(slices.Values(names))
	length := 0
	for i, name := range names {
		if length += len(name) + 1; length-1 > maxNodes {
			names = names[:i]
			break
		}
	}
	return strings.Join(names, ",")
}

// Servers is what an agent knows about where servers are dialed, each list of HOST:PORT with the best first.
type Servers struct {
	Service string   // NAMESPACE/NAME, which this was read from
	Addrs   []string // of the Service itself: one of them leads to all servers
	Nodes   []string // of the nodes that servers run on
	// What the certificate of each server says, to be asked for at an address in Nodes: a node port leads to servers on other nodes, too. Empty: there is nothing
	// of the kind.
	Common string
}

// Ways are all addresses, the best first.
func (s Servers) Ways() []string {
	ways := slices.Clone(s.Addrs)
	for _, addr := range s.Nodes {
		if !slices.Contains(ways, addr) {
			ways = append(ways, addr)
		}
	}
	return ways
}

// Name is what a server's certificate has to say when it is dialed at an address.
func (s Servers) Name(addr string) string {
	if s.Common != "" && !slices.Contains(s.Addrs, addr) && slices.Contains(s.Nodes, addr) {
		return s.Common
	}
	host, _, _ := net.SplitHostPort(addr)
	return host
}

// MaxWays is how many addresses either list has at most.
const MaxWays = 32

const (
	serversVersion = 1
	maxServersFile = 64 << 10 // bytes
)

type serversFile struct {
	Version int      `json:"version"`
	Service string   `json:"service"`
	Addrs   []string `json:"addresses"`
	Nodes   []string `json:"nodes"`
	Common  string   `json:"common"`
}

// Format writes what ParseServers reads.
func (s Servers) Format() []byte {
	text, _ := json.MarshalIndent(serversFile{serversVersion, s.Service, s.Addrs, s.Nodes, s.Common}, "", "  ") //nolint:errchkjson // strings and a number
	return append(text, '\n')
}

// ParseServers understands all of the file or refuses all of it.
func ParseServers(data []byte) (Servers, error) {
	if len(data) > maxServersFile {
		return Servers{}, fmt.Errorf("more than %d bytes", maxServersFile)
	}
	// The version first, alone: a later one may have fields that this one does not know.
	var head struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(data, &head); err != nil {
		return Servers{}, err
	}
	if head.Version != serversVersion {
		return Servers{}, fmt.Errorf("version %d, this program reads %d", head.Version, serversVersion)
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	var f serversFile
	if err := dec.Decode(&f); err != nil {
		return Servers{}, err
	}
	if len(f.Addrs)+len(f.Nodes) == 0 {
		return Servers{}, errors.New("no address")
	}
	for _, list := range [][]string{f.Addrs, f.Nodes} {
		if len(list) > MaxWays {
			return Servers{}, fmt.Errorf("%d addresses, more than %d", len(list), MaxWays)
		}
		for i, addr := range list {
			if same, err := HostPort(addr, 0); err != nil || same != addr {
				return Servers{}, fmt.Errorf("%s is no address of a server", shown(addr))
			}
			if slices.Contains(list[:i], addr) {
				return Servers{}, fmt.Errorf("%s stands there twice", shown(addr))
			}
		}
	}
	if f.Common != "" && !slices.Equal(identity.Hosts([]string{f.Common}), []string{f.Common}) {
		return Servers{}, fmt.Errorf("%s is nothing that a certificate says", shown(f.Common))
	}
	return Servers{f.Service, f.Addrs, f.Nodes, f.Common}, nil
}
