// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"github.com/cilium/ebpf"
)

// Counters are the kernel's verdicts since the programs were installed, summed over all CPUs. They survive the daemon.
type Counters struct {
	// What connect() of TCP sockets came to; each ends in exactly one of these.
	Missed                           uint64 // port not tunneled or address no target
	RedirectedHost4, RedirectedHost6 uint64 // by the family of the redirect address
	RedirectedPod4, RedirectedPod6   uint64
	Offline, Ambiguous               uint64 // refused (before Linux 5.18 redirected as well, to be reset)
	NoFamily                         uint64 // refused: the node has no address of the socket's family
	StorageFailed                    uint64 // refused: no memory for the socket's record
	Bypassed                         uint64 // the daemon's own, to tunneled ports
	OptedOut                         uint64 // by cgroup
	DeviceBound                      uint64 // in the host's namespace, bound to a device: went direct
	PodSkipped                       uint64 // went direct because of HostOnly
	Inactive                         uint64 // before the host's namespace is known

	// The way from the client's socket to the accepted one. What is redirected to a listener that is there, handed over and
	// accepted is the same number, but for those under way or aborted.
	HandedOverHost, HandedOverPod uint64
	HandOverFailed                uint64
	AcceptedHost, AcceptedPod     uint64
	AcceptedUnknown               uint64 // nobody intercepted it; or, with SYN cookies, it was reset before and a late packet made it anew
	AcceptFailed                  uint64 // no memory for the record

	PeerNames   uint64 // getpeername() answered with the original destination
	BindRefused uint64 // somebody wanted a redirect port
}

// Stats reads the counters.
func (k *Kernel) Stats() (Counters, error) {
	return readCounters(k.counters)
}

func readCounters(m *ebpf.Map) (Counters, error) {
	var perCPU []kernelCounters
	if err := m.Lookup(uint32(0), &perCPU); err != nil {
		return Counters{}, explain("read the counters", err)
	}
	return sumCounters(perCPU), nil
}

func sumCounters(perCPU []kernelCounters) Counters {
	var sum Counters
	for _, c := range perCPU {
		sum.Missed += c.Missed
		sum.RedirectedHost4 += c.RedirectedHost4
		sum.RedirectedHost6 += c.RedirectedHost6
		sum.RedirectedPod4 += c.RedirectedPod4
		sum.RedirectedPod6 += c.RedirectedPod6
		sum.Offline += c.Offline
		sum.Ambiguous += c.Ambiguous
		sum.NoFamily += c.NoFamily
		sum.StorageFailed += c.StorageFailed
		sum.Bypassed += c.Bypassed
		sum.OptedOut += c.OptedOut
		sum.DeviceBound += c.DeviceBound
		sum.PodSkipped += c.PodSkipped
		sum.Inactive += c.Inactive
		sum.HandedOverHost += c.HandedOverHost
		sum.HandedOverPod += c.HandedOverPod
		sum.HandOverFailed += c.HandOverFailed
		sum.AcceptedHost += c.AcceptedHost
		sum.AcceptedPod += c.AcceptedPod
		sum.AcceptedUnknown += c.AcceptedUnknown
		sum.AcceptFailed += c.AcceptFailed
		sum.PeerNames += c.PeerNames
		sum.BindRefused += c.BindRefused
	}
	return sum
}
