// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"errors"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// scaled is how many of something a test makes; under emulation, where -short is given, a fiftieth of them.
func scaled(n int) int {
	if testing.Short() {
		return n / 50
	}
	return n
}

// crowded is a lab with a pod whose packets are handled on all CPUs, many destinations, and a server for the host and the pod.
func crowded(t *testing.T) (*lab, *exactServer, []wish) {
	l := newLab(t)
	l.addPod()
	spreadPackets(t, "pod")
	k := l.open()
	must(t, k.SetPorts([]uint16{edgePort}))
	all := wishes(t, k, 4096)
	s := l.listenExactly(k, append(k.HostAddrs(), node4, node6)...)
	must(t, k.SetNodeAddrs(node4, node6))
	must(t, k.Attach())
	return l, s, all
}

// storm makes connects from as many threads in the host's namespace as in the pod's, every second of them aborted.
func (l *lab) storm(all []wish, connects, threads int) {
	l.t.Helper()
	begin := time.Now()
	var lived, aborted atomic.Int64
	var wg sync.WaitGroup
	for worker := range 2 * threads {
		ns := [2]netns.NsHandle{l.host, l.pod}[worker%2]
		wg.Go(func() {
			in(ns, func() {
				random := rand.New(rand.NewPCG(1, uint64(worker)))
				for i := worker; i < connects; i += 2 * threads {
					w, count := all[random.IntN(len(all))], &lived
					do := w.visit
					if i/(2*threads)%2 == 1 {
						count, do = &aborted, func() error { return w.abort(random.Uint32()) }
					}
					if err := do(); err != nil {
						l.t.Error(err)
						return
					}
					count.Add(1)
				}
			})
		})
	}
	wg.Wait()
	l.t.Logf("%d lived, %d were aborted, %.0f/s", lived.Load(), aborted.Load(), float64(connects)/time.Since(begin).Seconds())
	if lived.Load()+aborted.Load() != int64(connects) || lived.Load() < int64(connects/2) {
		l.t.Errorf("want %d, half of each", connects)
	}
}

// TestHalfAMillionConnects: from many threads of the host and of a pod, over both families, half of them aborted. Each connection that lives
// arrives at its own destination, and no connection is accepted without, or with another's.
func TestHalfAMillionConnects(t *testing.T) {
	l, s, all := crowded(t)
	s.start()
	connects := scaled(500_000)
	l.storm(all, connects, 4)
	c := s.complete(t)
	if n := c.RedirectedHost4 + c.RedirectedHost6 + c.RedirectedPod4 + c.RedirectedPod6; n != uint64(connects) || c.Missed != 0 {
		t.Errorf("redirected %d and missed %d, want all %d redirected", n, c.Missed, connects)
	}
}

// TestSYNCookies: the kernel makes accepted sockets out of nothing but ACKs.
func TestSYNCookies(t *testing.T) {
	l, s, all := crowded(t)
	sysctl(t, "tcp_syncookies", "2")
	s.start()
	l.storm(all, scaled(20_000), 4)
	s.account(t)
	if n := netstat(t, "SyncookiesRecv"); n < int64(scaled(20_000)/2) {
		t.Errorf("%d connections came with a cookie", n)
	}
}

// TestFullBacklog: the listener has no room for what its clients take for connected; their ACKs are dropped, and come again later.
func TestFullBacklog(t *testing.T) {
	for _, cookies := range []string{"0", "1", "2"} {
		t.Run("tcp_syncookies="+cookies, func(t *testing.T) {
			l, s, _ := crowded(t)
			sysctl(t, "tcp_syncookies", cookies)
			all := onePort(64)
			setWishes(t, s.k, all)
			for _, listener := range s.listeners {
				must(t, unix.Listen(int(listener), 2))
			}
			s.pause = time.Millisecond
			s.start()
			l.storm(all, 160, 8)
			s.account(t)
			if netstat(t, "ListenOverflows") == 0 {
				t.Error("the backlog was not full")
			}
		})
	}
}

// TestPortReusedWhileAcksWait: clients reset their connections and connect again at once from the same port, to another destination by the same
// redirect port: all connections of a client have one 4-tuple. The packets of each are handled on a CPU that its hash selects, and with
// SYN cookies the listener does not mind in which order. TestAckIsOvertaken is the one case that all this is about.
func TestPortReusedWhileAcksWait(t *testing.T) {
	l, s, _ := crowded(t)
	sysctl(t, "tcp_syncookies", "2")
	all := onePort(256)
	setWishes(t, s.k, all)
	s.start()

	var connected, busy atomic.Int64
	var wg sync.WaitGroup
	for worker := range 4 {
		wg.Go(func() {
			in(l.pod, func() {
				random := rand.New(rand.NewPCG(2, uint64(worker)))
				from := netip.AddrPortFrom(pod4, uint16(20000+worker))
				for range scaled(20_000) / 4 {
					err := all[random.IntN(len(all))].reuse(from)
					switch {
					case err == nil:
						connected.Add(1)
					case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.ECONNRESET), errors.Is(err, unix.EPIPE):
						busy.Add(1) // the former connection is not quite gone at the other end
					default:
						t.Error(err)
						return
					}
				}
			})
		})
	}
	wg.Wait()
	c := s.account(t)
	t.Logf("%d connected, %d did not; accepted %d, of which %d were made anew", connected.Load(), busy.Load(), s.accepted.Load(), c.AcceptedUnknown)
	if s.answered.Load() < int64(scaled(10_000)) {
		t.Error("too few connections to prove anything")
	}
}

// reuse connects from a port that another connection has just left, says what it wants, and resets.
func (w wish) reuse(from netip.AddrPort) error {
	s, err := w.ready(from)
	if err != nil {
		return err
	}
	defer s.close()
	if err := s.connectWithin(10*time.Millisecond, w.family(), netip.AddrPortFrom(w.addr(), edgePort)); err != nil {
		return err
	}
	return w.say(s)
}

// spreadPackets makes all CPUs handle the packets of a device.
func spreadPackets(t *testing.T, device string) {
	t.Helper()
	sys := t.TempDir() // the sysfs of this network namespace
	must(t, unix.Mount("sysfs", sys, "sysfs", 0, ""))
	defer func() { must(t, unix.Unmount(sys, unix.MNT_DETACH)) }()
	must(t, os.WriteFile(filepath.Join(sys, "class/net", device, "queues/rx-0/rps_cpus"), []byte("3"), 0))
}

// sysctl sets something for IPv4 and IPv6 in this thread's network namespace, which ends with the test.
func sysctl(t *testing.T, name, value string) {
	t.Helper()
	must(t, os.WriteFile("/proc/sys/net/ipv4/"+name, []byte(value), 0))
}

// netstat reads a counter of TCP's, of this thread's network namespace.
func netstat(t *testing.T, name string) int64 {
	t.Helper()
	text, err := os.ReadFile("/proc/thread-self/net/netstat")
	must(t, err)
	var names []string
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if fields[0] != "TcpExt:" {
			continue
		}
		for i, n := range names {
			if n == name {
				value, err := strconv.ParseInt(fields[i], 10, 64)
				must(t, err)
				return value
			}
		}
		names = fields
	}
	t.Fatalf("no counter %s", name)
	return 0
}
