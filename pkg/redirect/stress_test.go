// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// stressConnects is moderate: the end-to-end tests have half a million.
const stressConnects = 20000

// TestAbortedConnections: clients reset half of their connections at once and use the same few source ports again and again, while the ACKs of
// the pod's are handled on other CPUs. Every connection that lives has its own destination, and none has no destination.
func TestAbortedConnections(t *testing.T) {
	l := newLab(t)
	l.addPod()
	k, s := l.ready()
	spreadPackets(t, "pod")

	// One redirect port for all, so that reused source ports make the very same 4-tuple with another destination.
	const destinations = 64
	var targets []Target
	for i := 0; len(targets) < destinations; i++ {
		if addr := netip.AddrFrom4([4]byte{10, 99, byte(i >> 8), byte(i)}); redirectIndex(addr) == 0 {
			targets = append(targets, Target{addr, "edge", Online})
		}
	}
	must(t, k.SetTargets(targets))

	var lived, aborted, busy atomic.Int64
	run := func(ns netns.NsHandle, source netip.Addr, worker int) {
		in(ns, func() {
			random := rand.New(rand.NewPCG(1, uint64(worker)))
			for i := range stressConnects / 4 {
				dst := netip.AddrPortFrom(targets[random.IntN(destinations)].Addr, edgePort)
				from := netip.AddrPortFrom(source, uint16(20000+worker*100+i/2%2))
				switch err := stressOne(from, dst, i%2 == 0); {
				case err == nil && i%2 == 0:
					aborted.Add(1)
				case err == nil:
					lived.Add(1)
				case errors.Is(err, unix.EADDRINUSE), errors.Is(err, unix.ECONNREFUSED), errors.Is(err, os.ErrDeadlineExceeded):
					busy.Add(1) // the port's last connection is not quite gone, at this end or at the other
				default:
					t.Errorf("%s to %s: %v", from, dst, err)
					return
				}
			}
		})
	}
	var wg sync.WaitGroup
	for worker := range 2 {
		wg.Go(func() { run(l.host, netip.AddrFrom4([4]byte{127, 0, 0, 1}), worker) })
		wg.Go(func() { run(l.pod, pod4, worker+2) })
	}
	wg.Wait()
	s.stop()
	c := stats(t, k)
	t.Logf("%d lived, %d were aborted, %d found their port busy; redirected %d, handed over %d, accepted %d", lived.Load(), aborted.Load(), busy.Load(),
		c.RedirectedHost4+c.RedirectedPod4, c.HandedOverHost+c.HandedOverPod, c.AcceptedHost+c.AcceptedPod)
	if lived.Load() < stressConnects/3 {
		t.Error("too few connections lived to prove anything")
	}
	if n := s.unknown.Load(); n != 0 || c.AcceptedUnknown != 0 || c.AcceptFailed != 0 || c.HandOverFailed != 0 {
		t.Errorf("%d connections without an origin; counted %d unknown, %d and %d failed", n, c.AcceptedUnknown, c.AcceptFailed, c.HandOverFailed)
	}
}

// redirectIndex is pick_port() of bpf/connect.h.
func redirectIndex(addr netip.Addr) uint32 {
	bytes := addr.As16()
	hash := uint32(edgePort)
	for i := range 4 {
		hash = (hash ^ binary.LittleEndian.Uint32(bytes[4*i:])) * 0x9e3779b1
	}
	return hash >> 16 & (Ports - 1)
}

var errWrongDestination = errors.New("arrived with another connection's destination")

func stressOne(from, dst netip.AddrPort, abort bool) error {
	client, err := newSocket(unix.AF_INET, 0)
	if err != nil {
		return err
	}
	defer client.close()
	linger := unix.Linger{Onoff: 1} // closing is a reset, and leaves no TIME_WAIT
	err = errors.Join(
		unix.SetNonblock(int(client), true),
		unix.SetsockoptInt(int(client), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
		unix.SetsockoptLinger(int(client), unix.SOL_SOCKET, unix.SO_LINGER, &linger))
	if err == nil {
		err = unix.Bind(int(client), sockaddr(unix.AF_INET, from))
	}
	if err == nil {
		err = client.connectWithin(50*time.Millisecond, unix.AF_INET, dst)
	}
	if err != nil || abort {
		return err
	}
	got, err := client.answer()
	if err != nil {
		return fmt.Errorf("connected, then: %v", err)
	}
	if got != dst.String() {
		return errWrongDestination
	}
	return nil
}

// spreadPackets makes all CPUs handle the packets of a device.
func spreadPackets(t *testing.T, device string) {
	t.Helper()
	sys := t.TempDir() // the sysfs of this network namespace
	must(t, unix.Mount("sysfs", sys, "sysfs", 0, ""))
	defer func() { must(t, unix.Unmount(sys, unix.MNT_DETACH)) }()
	must(t, os.WriteFile(filepath.Join(sys, "class/net", device, "queues/rx-0/rps_cpus"), []byte("3"), 0))
}
