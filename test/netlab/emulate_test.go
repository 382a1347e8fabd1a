// SPDX-License-Identifier: Apache-2.0

package netlab

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/edge-tunnel/edge-tunnel/test/linkemu"
)

// An emulated link is never faster than asked, which is checked strictly, and on a busy machine it may be slower.

// echo sends back the datagrams that come.
func echo(t *testing.T, node *Node) {
	t.Helper()
	var packets net.PacketConn
	if err := node.Do(func() (err error) {
		packets, err = net.ListenPacket("udp", ":9000")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 2000)
		for {
			n, from, err := packets.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = packets.WriteTo(buf[:n], from)
		}
	}()
	t.Cleanup(func() {
		packets.Close()
		<-done
	})
}

func TestEmulatedUplinkOfASite(t *testing.T) {
	ctx := testContext(t)
	lab := New(t)
	cloud := lab.Cloud("cloud-1")
	site := lab.Site("home")
	edge := site.Edge("edge-1")
	neighbour := lab.Site("work").Edge("edge-2")
	echo(t, cloud)
	link := site.Router.Emulate(linkemu.Settings{Delay: 40 * time.Millisecond})

	for _, to := range []netip.Addr{cloud.V4, cloud.V6} {
		conn, err := edge.Dial(ctx, "udp", netip.AddrPortFrom(to, 9000).String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if took, err := roundTrip(conn, 1, 5*time.Second); err != nil || took < 80*time.Millisecond {
			t.Errorf("round trip to %v over a link of 40 ms: %v, %v", to, took, err)
		}
	}

	// Every tenth packet is lost, each way: 0.81 of the answers come back.
	if err := link.Set(linkemu.Settings{Loss: 0.1, Seed: 3}); err != nil {
		t.Fatal(err)
	}
	conn, err := edge.Dial(ctx, "udp", netip.AddrPortFrom(cloud.V4, 9000).String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	const count = 1000
	before := link.Up.Stats().Lost + link.Down.Stats().Lost
	answers := 0
	for i := range count {
		lost := link.Up.Stats().Lost + link.Down.Stats().Lost
		begin := time.Now()
		if err := write(conn, uint64(i)); err != nil {
			t.Fatal(err)
		}
		// Either the answer comes or the link counts a loss: no waiting for what will not come.
		for came := false; !came && link.Up.Stats().Lost+link.Down.Stats().Lost == lost; {
			if time.Since(begin) > 5*time.Second {
				t.Fatalf("packet %d: neither an answer nor a loss", i)
			}
			if came, err = read(conn, uint64(i), 2*time.Millisecond); err != nil {
				t.Fatal(err)
			}
			if came {
				answers++
			}
		}
	}
	lost := link.Up.Stats().Lost + link.Down.Stats().Lost - before
	t.Logf("%d answers to %d packets, %d lost", answers, count, lost)
	if answers < 750 || answers > 870 || lost < count*13/100 {
		t.Errorf("%d answers to %d packets, %d lost", answers, count, lost)
	}

	if err := link.Set(linkemu.Settings{}); err != nil {
		t.Fatal(err)
	}
	link.SetOutage(true)
	if _, err := roundTrip(conn, count, 300*time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("an answer over a cut link: %v", err)
	}
	other, err := neighbour.Dial(ctx, "udp", netip.AddrPortFrom(cloud.V4, 9000).String())
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if _, err := roundTrip(other, 1, 5*time.Second); err != nil {
		t.Errorf("the neighbour's link is cut too: %v", err)
	}
	link.SetOutage(false)
	// The kernel may have given up on a neighbour in between, and asks again within seconds.
	for end := time.Now().Add(10 * time.Second); ; {
		if _, err = roundTrip(conn, count+1, time.Second); err == nil || time.Now().After(end) {
			break
		}
	}
	if err != nil {
		t.Errorf("after the outage: %v", err)
	}
}

func write(conn net.Conn, number uint64) error {
	_, err := conn.Write(binary.BigEndian.AppendUint64(nil, number))
	return err
}

// read waits for the answer of that number; other ones are late and do not count.
func read(conn net.Conn, number uint64, wait time.Duration) (bool, error) {
	if err := conn.SetReadDeadline(time.Now().Add(wait)); err != nil {
		return false, err
	}
	buf := make([]byte, 8)
	for {
		_, err := io.ReadFull(conn, buf)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return false, nil
		}
		if err != nil || binary.BigEndian.Uint64(buf) == number {
			return err == nil, err
		}
	}
}

func roundTrip(conn net.Conn, number uint64, wait time.Duration) (time.Duration, error) {
	begin := time.Now()
	if err := write(conn, number); err != nil {
		return 0, err
	}
	came, err := read(conn, number, wait)
	if err == nil && !came {
		err = os.ErrDeadlineExceeded
	}
	return time.Since(begin), err
}

func TestEmulatedRateCarriesTCP(t *testing.T) {
	ctx := testContext(t)
	lab := New(t)
	cloud, edge := lab.Cloud("cloud-1"), lab.Cloud("edge-1")
	const rate, total = 40e6, 4 << 20
	link := edge.Emulate(linkemu.Settings{Rate: rate, Queue: 256 << 10, Delay: 5 * time.Millisecond})
	listener, err := cloud.Listen(ctx, "tcp", ":9000")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		c, err := listener.Accept()
		if err != nil {
			return
		}
		_, _ = c.Write(make([]byte, total))
		c.Close()
	}()
	t.Cleanup(func() {
		listener.Close()
		<-done
	})
	conn, err := edge.Dial(ctx, "tcp", netip.AddrPortFrom(cloud.V4, 9000).String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	begin := time.Now()
	n, err := io.Copy(struct{ io.Writer }{io.Discard}, conn)
	took := time.Since(begin)
	if err != nil || n != total {
		t.Fatalf("%d bytes, %v", n, err)
	}
	got := float64(n) * 8 / took.Seconds()
	t.Logf("%.1f of %.1f Mbit/s, %+v", got/1e6, rate/1e6, link.Down.Stats())
	if got > rate || got < rate/20 {
		t.Errorf("%.1f Mbit/s over a link of %.1f", got/1e6, rate/1e6)
	}
}

func TestEmulatedLinkLeavesNothing(t *testing.T) {
	lab := New(t)
	node := lab.Cloud("edge-1")
	network := lab.cloud
	before, err := network.link.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	link := node.Emulate(linkemu.Settings{})
	if err := link.Close(); err != nil {
		t.Fatal(err)
	}
	if err := network.link.LinkSetMaster(node.port.end, network.bridge); err != nil {
		t.Fatal(err)
	}
	after, err := network.link.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	if len(after) != len(before)+1 { // the bridge goes with the namespace, the devices with the link
		t.Errorf("%d devices became %d", len(before), len(after))
	}
	node.emulated = nil // closed
}
