// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"encoding/binary"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// carrier is a pod's link on which the test carries each packet by hand, in the order and at the time it likes: a TUN device at each end.
type carrier struct {
	t         *testing.T
	pod, host *os.File
}

// What a packet of TCP is for, of its flags.
const (
	flagsSYN    = 0x02
	flagsSYNACK = 0x12
	flagsACK    = 0x10
	flagsRST    = 0x14
	flagsMask   = 0x17
)

func (l *lab) addCarriedPod() *carrier {
	l.pod = l.newPod()
	c := &carrier{t: l.t}
	c.host = l.openTUN(l.host, "pod", node4)
	c.pod = l.openTUN(l.pod, "eth0", pod4)
	return c
}

func (l *lab) openTUN(ns netns.NsHandle, name string, addr netip.Addr) *os.File {
	l.t.Helper()
	var fd int
	in(ns, func() {
		var err error
		fd, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		must(l.t, err)
		device, err := unix.NewIfreq(name)
		must(l.t, err)
		device.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
		must(l.t, unix.IoctlIfreq(fd, unix.TUNSETIFF, device))
		configure(l.t, name, addr)
	})
	file := os.NewFile(uintptr(fd), name)
	l.t.Cleanup(func() { _ = file.Close() })
	return file
}

// take takes the next packet with these flags off one end, with content or without; the others before it are lost.
func (c *carrier) take(from *os.File, flags byte, content bool) []byte {
	c.t.Helper()
	must(c.t, from.SetReadDeadline(time.Now().Add(patience)))
	for {
		packet := make([]byte, 2048)
		n, err := from.Read(packet)
		must(c.t, err)
		packet = packet[:n]
		if n < 40 || packet[0] != 0x45 || packet[9] != unix.IPPROTO_TCP {
			continue // the kernel talks IPv6 to itself
		}
		header := 20 + int(packet[32]>>4)*4
		if packet[33]&flagsMask == flags && (int(binary.BigEndian.Uint16(packet[2:])) > header) == content {
			return packet
		}
	}
}

func (c *carrier) put(to *os.File, packet []byte) {
	c.t.Helper()
	_, err := to.Write(packet)
	must(c.t, err)
}

// halfway connects from a port up to the client's ACK, which is not delivered: the client is connected, the server does not know.
func (c *carrier) halfway(s socket, w wish) (ack []byte) {
	c.t.Helper()
	if err := w.connect(s); err != unix.EINPROGRESS {
		c.t.Fatalf("connect: %v", err)
	}
	c.put(c.host, c.take(c.pod, flagsSYN, false))
	c.put(c.pod, c.take(c.host, flagsSYNACK, false))
	return c.take(c.pod, flagsACK, false)
}

// said lets the client say what it wants, and takes the packet.
func (c *carrier) said(s socket, w wish) []byte {
	c.t.Helper()
	must(c.t, w.say(s))
	return c.take(c.pod, flagsACK, true)
}

// reset lets the client close, and takes the packet.
func (c *carrier) reset(s socket) []byte {
	c.t.Helper()
	s.close()
	return c.take(c.pod, flagsRST, false)
}

// carried is a lab whose pod's packets are carried, with SYN cookies always on: the listener keeps nothing about a connection before its ACK.
func carried(t *testing.T) (*lab, *carrier, *exactServer, []wish) {
	l := newLab(t)
	c := l.addCarriedPod()
	k := l.open()
	must(t, k.SetPorts([]uint16{edgePort}))
	all := onePort(2)
	setWishes(t, k, all)
	sysctl(t, "tcp_syncookies", "2")
	s := l.listenExactly(k, node4)
	must(t, k.SetNodeAddrs(node4, netip.Addr{}))
	must(t, k.Attach())
	s.start()
	return l, c, s, all
}

// fromPort is a client of the pod with a port of its own, which may have been another's until just now.
func (l *lab) fromPort(port uint16) socket {
	l.t.Helper()
	var s socket
	in(l.pod, func() {
		var err error
		s, err = wish(0).ready(netip.AddrPortFrom(pod4, port))
		must(l.t, err)
	})
	return s
}

// TestAckIsOvertaken: a client has reset its connection and made another from the same port, by the same redirect port, before the ACK of the first
// is handled. Both arrive at their own destinations. With the 4-tuple alone as the key, the first would arrive at the second's and the second
// nowhere; with the entry deleted when the client's socket closes, the first nowhere.
func TestAckIsOvertaken(t *testing.T) {
	l, c, s, all := carried(t)
	first := l.fromPort(5555)
	ack1 := c.halfway(first, all[0])
	data1 := c.said(first, all[0])
	reset1 := c.reset(first)

	second := l.fromPort(5555)
	defer second.close()
	ack2 := c.halfway(second, all[1])
	data2 := c.said(second, all[1])

	c.put(c.host, ack1)
	c.put(c.host, data1)
	s.await(t, 1)
	c.put(c.host, reset1)
	c.put(c.host, ack2)
	c.put(c.host, data2)
	s.await(t, 2)
	if counted := s.complete(t); s.answered.Load() != 2 || counted.HandedOverPod != 2 {
		t.Errorf("%d of %d arrived where they wanted to", s.answered.Load(), counted.HandedOverPod)
	}
}

// TestMadeAnew is a limit: with SYN cookies, a packet that comes after its connection's reset makes the connection anew, long after the record was
// taken. It has no destination, and nobody at its other end.
func TestMadeAnew(t *testing.T) {
	l, c, s, all := carried(t)
	client := l.fromPort(5555)
	ack, data := c.halfway(client, all[0]), c.said(client, all[0])
	reset := c.reset(client)
	c.put(c.host, ack)
	c.put(c.host, data)
	s.await(t, 1)
	c.put(c.host, reset)
	c.put(c.host, data)
	s.await(t, 2)
	if s.answered.Load() != 1 || s.missing.Load() != 1 {
		t.Errorf("%d arrived, %d without a destination; want 1 and 1", s.answered.Load(), s.missing.Load())
	}
	if counted := stats(t, s.k); counted.AcceptedUnknown != 1 || counted.AcceptedPod != 1 {
		t.Errorf("counted %d unknown, %d accepted", counted.AcceptedUnknown, counted.AcceptedPod)
	}
}

// TestFloodDoesNotEvict: while the ACK of a connection is on its way, another process makes more hand-overs than any map has room for.
func TestFloodDoesNotEvict(t *testing.T) {
	l, c, s, all := carried(t)
	client := l.fromPort(5555)
	defer client.close()
	ack := c.halfway(client, all[0])
	data := c.said(client, all[0])

	f := l.startFlood(l.pod, flooding{Threads: 2, Pretend: true, Wishes: all, Enough: int64(2 * s.k.spec.Maps[kernelMapInFlightPods].MaxEntries)})
	f.stop()
	c.put(c.host, ack)
	c.put(c.host, data)
	s.await(t, 1)
	if counted := s.settle(t); s.answered.Load() != 1 || counted.AcceptedUnknown != 0 {
		t.Errorf("the connection did not arrive beside %d others", counted.HandedOverPod-1)
	}
}
