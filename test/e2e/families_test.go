// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

// withoutIPv6 takes IPv6 away from a node, as ipv6.disable_ipv6 does. Its pods come after it.
func (h *host) withoutIPv6() {
	h.t.Helper()
	if err := h.Do(func() error { return os.WriteFile("/proc/sys/net/ipv6/conf/all/disable_ipv6", []byte("1"), 0) }); err != nil {
		h.t.Fatal(err)
	}
	h.V6 = netip.Addr{}
}

// withoutIPv4 takes the node's own IPv4 address away; loopback keeps its.
func (h *host) withoutIPv4() {
	h.t.Helper()
	if err := h.DelAddr("eth0", netip.PrefixFrom(h.V4, 24)); err != nil {
		h.t.Fatal(err)
	}
	h.V4 = netip.Addr{}
}

// dualEdge starts an agent on an edge node with both families and returns where its echo is.
func (w *world) dualEdge(cloud *host, server *daemon) (v4, v6 netip.AddrPort) {
	w.t.Helper()
	edge := w.site("home").edge("edge-1")
	edge.startAgent([]*host{cloud})
	server.waitTarget(edge.V4, "online")
	server.waitTarget(edge.V6, "online")
	return edge.serve(servicePort, echo), edge.serveAt(edge.at6(servicePort), echo)
}

// A cloud node with IPv4 only serves both families of its edge nodes: IPv6 sockets can be redirected to an IPv4 address, unless they refuse to.
func TestCloudWithoutIPv6(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	cloud := w.cloud("cloud-1")
	cloud.withoutIPv6()
	pod := cloud.pod("pod-1")
	server := cloud.startServer("--tunneled-ports", fmt.Sprint(servicePort))
	v4, v6 := w.dualEdge(cloud, server)
	for _, from := range []*host{cloud, pod} {
		from.mustEcho(v4)
		from.mustEcho(v6)
		conn, _, err := from.dialWith(netip.AddrPortFrom(netip.AddrFrom16(v4.Addr().As16()), v4.Port()), dialOptions{})
		if err != nil {
			t.Fatalf("an IPv4 address in IPv6 from %s: %v", from.Name, err)
		}
		if err := exchange(conn, "mapped"); err != nil {
			t.Error(err)
		}
		// A socket for IPv6 alone: there is nowhere to go, and it does not go anywhere.
		if _, _, err := from.dialWith(v6, dialOptions{network: "tcp6", timeout: patience}); err == nil {
			t.Errorf("an IPv6-only socket of %s has connected", from.Name)
		}
	}
	status, err := server.client().Status(t.Context())
	if err != nil || len(status.Server.NodeAddrs) != 1 || status.Server.NodeAddrs[0] != cloud.V4 || !status.Ready {
		t.Errorf("status %+v, %v", status, err)
	}
}

// A cloud node with IPv6 only: its processes reach both families, as loopback has both. For its pods' IPv4 sockets there is no way; that is refused and
// counted.
func TestCloudWithoutIPv4(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	cloud := w.cloud("cloud-1")
	cloud.withoutIPv4()
	pod := cloud.pod("pod-1")
	server := cloud.startServer("--tunneled-ports", fmt.Sprint(servicePort))
	v4, v6 := w.dualEdge(cloud, server)
	cloud.mustEcho(v4)
	cloud.mustEcho(v6)
	pod.mustEcho(v6)
	before := server.metrics()
	_, err := pod.dial(v4)
	wantErrno(t, err, syscall.EHOSTUNREACH)
	m := server.metrics()
	if got := m.bpf("no_family") - before.bpf("no_family"); got != 1 {
		t.Errorf("%v connects counted, want 1", got)
	}
	status, err := server.client().Status(t.Context())
	if err != nil || len(status.Server.NodeAddrs) != 1 || status.Server.NodeAddrs[0] != cloud.V6 || !status.Ready {
		t.Errorf("status %+v, %v", status, err)
	}

	// It gets an address after all.
	got := netip.MustParsePrefix("10.80.0.77/24")
	if err := cloud.AddAddr("eth0", got); err != nil {
		t.Fatal(err)
	}
	eventually(t, patience, func() error {
		status, err := server.client().Status(t.Context())
		if err == nil && len(status.Server.NodeAddrs) != 2 {
			err = fmt.Errorf("node addresses %v", status.Server.NodeAddrs)
		}
		return err
	})
	if before, now := m.bpf("redirected_host4"), server.metrics().bpf("redirected_host4"); now < before {
		t.Errorf("counters went back from %v to %v", before, now)
	}
}

// The node's address is replaced while its pods and processes connect. The host's connects notice nothing. The pods' are refused in the moment of change,
// at worst, and work again with the new address.
func TestNodeAddressChanges(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	cloud := w.cloud("cloud-1")
	pod := cloud.pod("pod-1")
	edge := w.site("home").edge("edge-1")
	server := cloud.startServer("--tunneled-ports", fmt.Sprint(servicePort))
	edge.launchAgent(nil, "--server", cloud.at6(wire.Port).String()) // IPv6 stays
	server.waitTarget(edge.V4, "online")
	addr := edge.serve(servicePort, echo)

	var (
		wg              sync.WaitGroup
		made            [2]atomic.Int64
		failed          atomic.Int64
		lastFailure     atomic.Pointer[error]
		changed, ending = make(chan struct{}), make(chan struct{})
	)
	for i, from := range []*host{cloud, pod} {
		for range 2 {
			wg.Go(func() {
				for {
					select {
					case <-ending:
						return
					default:
					}
					settled := false
					select {
					case <-changed:
						settled = true
					default:
					}
					err := from.tryEcho(addr, 3*time.Second)
					switch {
					case err == nil:
						made[i].Add(1)
					case settled || from == cloud:
						t.Errorf("from %s: %v", from.Name, err)
						return
					default:
						failed.Add(1)
						lastFailure.Store(&err)
					}
				}
			})
		}
	}
	nodeAddr := func(want netip.Addr) {
		t.Helper()
		eventually(t, patience, func() error {
			status, err := server.client().Status(t.Context())
			if err == nil && status.Server.NodeAddrs[0] != want {
				err = fmt.Errorf("pods are sent to %v, want %v", status.Server.NodeAddrs, want)
			}
			return err
		})
	}
	former := netip.PrefixFrom(cloud.V4, 24)
	for i := range 3 {
		next := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 80, 0, byte(100 + i)}), 24)
		if err := cloud.AddAddr("eth0", next); err != nil {
			t.Fatal(err)
		}
		if err := cloud.DelAddr("eth0", former); err != nil {
			t.Fatal(err)
		}
		// The kernel takes secondary addresses away with their primary one.
		if err := cloud.AddAddr("eth0", next); err != nil && !errors.Is(err, os.ErrExist) {
			t.Fatal(err)
		}
		nodeAddr(next.Addr())
		former = next
		if i < 2 {
			time.Sleep(time.Second)
		}
	}
	close(changed)
	podsBefore := made[1].Load()
	eventually(t, patience, func() error {
		if n := made[1].Load() - podsBefore; n < 20 {
			return fmt.Errorf("%d connections of the pod since the last change", n)
		}
		return nil
	})
	close(ending)
	wg.Wait()
	t.Logf("%d connections of the host and %d of the pod were made, %d failed", made[0].Load(), made[1].Load(), failed.Load())
	if err := lastFailure.Load(); err != nil {
		t.Log(*err)
	}
	m := server.metrics()
	if m.bpf("accepted_unknown") != 0 || m.bpf("hand_over_failed") != 0 {
		t.Errorf("%v connections without a destination", m.bpf("accepted_unknown"))
	}
	if got := m["edge_tunnel_redirect_listeners"]; got != 4*8 {
		t.Errorf("%v redirect listeners, want 8 on each loopback and node address", got)
	}
	// What a pod had open to an address that is gone cannot be told so. It ends with TCP's keepalive; nothing else is left.
	eventually(t, patience, func() error {
		if open := server.metrics()["edge_tunnel_connections"]; open > float64(failed.Load()) {
			return fmt.Errorf("%v connections are open, %d have failed", open, failed.Load())
		}
		return nil
	})
}

// tryEcho connects to an echo and uses it, all within the limit or twice of it.
func (h *host) tryEcho(addr netip.AddrPort, limit time.Duration) error {
	conn, _, err := h.dialWith(addr, dialOptions{timeout: limit})
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(limit)); err != nil {
		return err
	}
	if _, err := io.WriteString(conn, "ping"); err != nil {
		return err
	}
	_, err = io.ReadFull(conn, make([]byte, 4))
	return err
}
