// SPDX-License-Identifier: Apache-2.0

// Package hostnet tells what this host's network looks like: its own addresses, the addresses at which its pods reach it, and
// when any of that changes.
//
// "This host" is the network namespace of the calling thread, which is the process's unless somebody moved the thread.
// [Read] looks once. A [Watcher] follows: its Run opens one subscription, to links, addresses and routes of both
// families, and reads everything again after each burst of events. It never trusts the events themselves, so that losing
// some to a full socket buffer costs nothing but another look. Run owns the sockets and the one goroutine that it starts,
// and returns after both are gone.
//
// Only the main routing table is looked at, and addresses, not ranges made local by a route (ip route add local PREFIX).
package hostnet

import (
	"net/netip"
	"slices"
)

// State is the network of this host at one moment.
type State struct {
	// Local has all addresses of all links, also of loopback and of links that are down: sorted, distinct, unmapped, without zone.
	Local []netip.Addr
	// V4 and V6 are, for each family, the source address of the default route, or else the first global address. They are
	// not valid if the family has none. An address whose duplicate detection has not succeeded does not count; temporary,
	// deprecated and secondary ones do if there is no better one.
	V4, V6 netip.Addr
}

func (s State) equal(o State) bool {
	return s.V4 == o.V4 && s.V6 == o.V6 && slices.Equal(s.Local, o.Local)
}
