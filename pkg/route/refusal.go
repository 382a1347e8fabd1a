// SPDX-License-Identifier: Apache-2.0

package route

import (
	"fmt"
	"net/netip"
)

// Refusal is one claimed address that did not become the claimant's target.
type Refusal struct {
	Node   string
	Addr   netip.Addr // as claimed, but unmapped; with its zone, if that is what is wrong with it; invalid for NoAddress
	Reason Reason
}

func (r Refusal) String() string {
	if r.Reason == NoAddress {
		return fmt.Sprintf("node %q claims no address", r.Node)
	}
	return fmt.Sprintf("address %s of node %q refused: %s", r.Addr, r.Node, r.Reason)
}

// Reason says why an address was refused. Its String is a label for metrics and reports.
type Reason uint8

const (
	Invalid           Reason = iota + 1 // no address, one with a zone, or claimed by a node without a name
	Loopback                            // 127.0.0.0/8, ::1
	Unspecified                         // 0.0.0.0/8, ::
	Multicast                           // 224.0.0.0/4, ff00::/8
	LinkLocal                           // 169.254.0.0/16, fe80::/10
	Broadcast                           // 255.255.255.255
	LocalAddress                        // an address of this host's network namespace
	RedirectAddress                     // where this host's connections are redirected to
	ServerAddress                       // of a node that runs a tunnel-server
	DirectAddress                       // of an edge node that is reached without a tunnel
	APIServer                           // an API server's endpoint
	ServiceRange                        // inside a Service range
	Reserved                            // kept for another use on this host
	OutsideTargetCIDR                   // --target-cidr is set, and it lies outside
	Ambiguous                           // claimed by several nodes
	NoAddress                           // the node claims none at all
	numReasons
)

var reasonNames = [numReasons]string{
	Invalid:           "invalid",
	Loopback:          "loopback",
	Unspecified:       "unspecified",
	Multicast:         "multicast",
	LinkLocal:         "link_local",
	Broadcast:         "broadcast",
	LocalAddress:      "local_address",
	RedirectAddress:   "redirect_address",
	ServerAddress:     "server_address",
	DirectAddress:     "direct_address",
	APIServer:         "api_server",
	ServiceRange:      "service_range",
	Reserved:          "reserved",
	OutsideTargetCIDR: "outside_target_cidr",
	Ambiguous:         "ambiguous",
	NoAddress:         "no_address",
}

func (r Reason) String() string {
	if r == 0 || r >= numReasons {
		return fmt.Sprintf("reason_%d", uint8(r))
	}
	return reasonNames[r]
}

// Reasons returns every reason, so that metrics can show those with a count of zero.
func Reasons() []Reason {
	all := make([]Reason, 0, numReasons-1)
	for r := Invalid; r < numReasons; r++ {
		all = append(all, r)
	}
	return all
}
