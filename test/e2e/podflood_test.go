// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A pod begins connections and does not finish them, until the listeners' queues are full of them and SYN cookies are in use; a few it does finish, and
// aborts. Connections of the host and of another pod still arrive, each where it was sent.
func TestPodFloods(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	cloud, home := w.cloud("cloud-1"), w.site("home")
	hostile, pod := cloud.pod("hostile"), cloud.pod("pod-1")
	if err := cloud.Do(func() error { return os.WriteFile("/proc/sys/net/core/somaxconn", []byte("128"), 0) }); err != nil {
		t.Fatal(err)
	}
	nft(t, hostile.Node, `table inet deaf { chain in { type filter hook input priority 0;
		tcp flags & (syn | ack) == syn | ack numgen random mod 16 != 0 drop; }; }`)
	server := cloud.startServer("--tunneled-ports", "9100,9101,9102,9103")
	var services []netip.AddrPort
	for i := range 3 {
		edge := home.edge(fmt.Sprintf("edge-%d", i+1))
		for port := range uint16(4) {
			for _, at := range []netip.AddrPort{edge.at(9100 + port), edge.at6(9100 + port)} {
				services = append(services, at)
				edge.serveAt(at, func(conn *net.TCPConn) { // says where one has come to
					if _, err := io.WriteString(conn, at.String()+"\n"); err == nil {
						echo(conn)
					}
				})
			}
		}
		edge.startAgent([]*host{cloud})
		server.waitTarget(edge.V4, "online")
		server.waitTarget(edge.V6, "online")
	}

	args := []string{}
	for _, s := range services {
		args = append(args, s.String())
	}
	flood, err := hostile.StartCmd(hostile.helper(context.Background(), "connect-flood", args...))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := flood.WaitFor(ctx, "flowing"); err != nil {
		t.Fatal(err)
	}

	var (
		arrived atomic.Int64
		slowest atomic.Int64
		wg      sync.WaitGroup
	)
	until := time.Now().Add(8 * time.Second)
	for _, from := range []*host{cloud, pod} {
		for range 2 {
			wg.Go(func() {
				for time.Now().Before(until) {
					began := time.Now()
					if err := arrives(from, services[rand.IntN(len(services))]); err != nil {
						t.Errorf("from %s, after %v: %v", from.Name, time.Since(began), err)
						return
					}
					arrived.Add(1)
					slowest.Store(max(slowest.Load(), int64(time.Since(began))))
				}
			})
		}
	}
	wg.Wait()
	select {
	case <-flood.Exited():
		t.Fatalf("the flood has ended: %s", flood.Log())
	default:
	}
	flood.Kill()
	m := server.metrics()
	flooded := m.bpf("redirected_pod4") + m.bpf("redirected_pod6")
	t.Logf("%d connections arrived, the slowest in %v, beside %v of the flood", arrived.Load(), time.Duration(slowest.Load()), flooded)
	if arrived.Load() < 50 || flooded < 2000 {
		t.Errorf("%d connections arrived beside %v: too few to prove anything", arrived.Load(), flooded)
	}
	if cookies := cloud.netstat("TcpExtSyncookiesSent"); cookies == 0 {
		t.Error("the queues were never full")
	}
	for _, verdict := range []string{"accepted_unknown", "accept_failed", "hand_over_failed", "storage_failed", "no_family", "offline"} {
		if m.bpf(verdict) != 0 {
			t.Errorf("%s: %v", verdict, m.bpf(verdict))
		}
	}
	server.waitIdle()
	for _, from := range []*host{cloud, pod} {
		for _, to := range services {
			if err := arrives(from, to); err != nil {
				t.Errorf("afterwards, from %s: %v", from.Name, err)
			}
		}
	}
}

// arrives connects to a service that says its own address.
func arrives(from *host, to netip.AddrPort) error {
	conn, _, err := from.dialWith(to, dialOptions{timeout: patience})
	if err != nil {
		return fmt.Errorf("dial %s: %w", to, err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	want := to.String() + "\n"
	got := make([]byte, len(want))
	if _, err := io.ReadFull(conn, got); err != nil {
		return fmt.Errorf("connected to %s, read %q: %w", to, got, err)
	}
	if string(got) != want {
		return fmt.Errorf("connected to %s, arrived at %q", to, got)
	}
	return exchange(conn, "ping")
}

// netstat is a counter of the node's network namespace.
func (h *host) netstat(name string) int {
	h.t.Helper()
	fields := strings.Fields(h.mustRun("nstat", "-asz", name))
	for i, f := range fields {
		if f == name && i+1 < len(fields) {
			if n, err := strconv.Atoi(fields[i+1]); err == nil {
				return n
			}
		}
	}
	h.t.Fatalf("no counter %s: %q", name, fields)
	return 0
}

// connectFloodMain begins connections to the addresses until it is killed, some thousands a second on four threads, and gives each up at once.
func connectFloodMain(args []string) int {
	var addrs []netip.AddrPort
	for _, a := range args {
		addrs = append(addrs, netip.MustParseAddrPort(a))
	}
	var begun atomic.Int64
	for range 4 {
		go func() {
			for {
				if err := beginConnect(addrs[rand.IntN(len(addrs))], rand.IntN(4)); err != nil {
					fmt.Println(err)
					os.Exit(1)
				}
				if begun.Add(1) == 1000 {
					fmt.Println("flowing")
				}
				time.Sleep(time.Millisecond)
			}
		}()
	}
	select {}
}

// beginConnect makes half a connection, in one of four manners.
func beginConnect(to netip.AddrPort, manner int) error {
	family, addr := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()})
	if to.Addr().Is4() {
		family, addr = unix.AF_INET, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if manner&1 != 0 {
		if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
			return err
		}
	}
	_ = unix.Connect(fd, addr) // in progress, refused or without a free port: all the same here
	if manner&2 != 0 {
		_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, 5)
	}
	return nil
}

// A pod that keeps its connections open gets its share of all, and no more. There is room for everybody else.
func TestPodHasItsShare(t *testing.T) {
	t.Parallel()
	const all = 40
	for share, flags := range map[int][]string{
		all / 4: nil,
		4:       {"--max-connections-per-pod", "4"},
	} {
		t.Run(strconv.Itoa(share), func(t *testing.T) {
			t.Parallel()
			s := newSite(t, append([]string{"--max-connections", strconv.Itoa(all)}, flags...)...)
			hostile, pod := s.cloud.pod("hostile"), s.cloud.pod("pod-1")
			addr := s.edge.serve(servicePort, echo)
			for range share {
				if err := exchange(hostile.mustDial(addr), "mine"); err != nil {
					t.Fatal(err)
				}
			}
			for i := range 2 * all {
				hostile.wantReset(addr, dialOptions{}, patience)
				if i%10 == 0 {
					s.cloud.mustEcho(addr)
					pod.mustEcho(addr)
				}
			}
			s.server.waitEnded("pod_full", 2*all)
			m := s.server.metrics()
			if m["edge_tunnel_connections_overflowed_total"] != 0 || m[`edge_tunnel_connections_ended_total{reason="node_full"}`] != 0 {
				t.Errorf("%v connections overflowed", m["edge_tunnel_connections_overflowed_total"])
			}
		})
	}
}
