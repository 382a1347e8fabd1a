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
	"sync/atomic"
	"testing"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

const (
	halfOpen     = 10_000 // connections that are held against a server
	halfOpenKept = 4096   // those of them that it keeps
	halfOpenCost = 32     // KiB that each of these may cost it, garbage included
	raceCost     = 5      // times as much, under the race detector
)

// Ten thousand connections from one address that never log in, half of which have begun a handshake, and which come again when they are dropped: the
// server keeps a bounded number of them, and an agent gets in all the same.
func TestHalfOpenConnections(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	addr := s.edge.serve(servicePort, echo)
	stranger := s.world.cloud("stranger")
	second := s.home.edge("edge-2")
	open := s.cloud.mustDial(addr)
	before, memory := s.server.metrics(), residentMemory(t, s.server, "VmRSS")

	flood, err := stranger.StartCmd(stranger.helper(context.Background(), "half-open", s.cloud.at(wire.Port).String(), strconv.Itoa(halfOpen)))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	if err := flood.WaitFor(ctx, "all were there"); err != nil {
		t.Fatal(err)
	}
	eventually(t, patience, func() error {
		m, err := s.server.tryMetrics()
		if err != nil {
			return err
		}
		pending, files, dropped := m[`edge_tunnel_tunnels{state="pending"}`], m["process_open_fds"]-before["process_open_fds"], m.refused("dropped")
		if pending > halfOpenKept || files > halfOpenKept+100 || dropped+m.refused("timeout") < halfOpen-halfOpenKept {
			err = fmt.Errorf("%v connections are pending, %v more descriptors open, %v connections were dropped", pending, files, dropped)
		}
		return err
	})

	agent := second.startAgent([]*host{s.cloud})
	s.server.waitTarget(second.V4, "online")
	s.cloud.mustEcho(second.serve(servicePort, echo))
	if err := exchange(open, "still there"); err != nil {
		t.Error(err)
	}
	s.cloud.mustEcho(addr)

	peak := residentMemory(t, s.server, "VmHWM")
	m := s.server.metrics()
	t.Logf("%v accepted, %v dropped, %v timed out, %v KiB before and %v KiB at most",
		m["edge_tunnel_tunnel_connections_total"], m.refused("dropped"), m.refused("timeout"), memory, peak)
	limit := halfOpenKept * halfOpenCost
	if raceDetector() {
		limit *= raceCost
	}
	if peak > memory+limit {
		t.Errorf("%d KiB at most, %d KiB before, may grow by %d", peak, memory, limit)
	}

	flood.Kill()
	s.server.waitMetric(`edge_tunnel_tunnels{state="pending"}`, 0)
	eventually(t, patience, func() error {
		m = s.server.metrics()
		if got := m["go_goroutines"]; got > before["go_goroutines"]+50 {
			return fmt.Errorf("%v goroutines are left, %v before", got, before["go_goroutines"])
		}
		return nil
	})
	if up := m[`edge_tunnel_tunnels{state="up"}`]; up != 2 || agent.metrics()["edge_tunnel_agent_dials_total"] > 10 {
		t.Errorf("%v tunnels are up", up)
	}
}

// residentMemory is a line of the daemon's /proc/PID/status, in KiB.
func residentMemory(t *testing.T, d *daemon, line string) int {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", d.PID()))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), line+":")
	fields := strings.Fields(rest)
	if len(fields) == 0 {
		t.Fatalf("no %s in %s", line, status)
	}
	kib, err := strconv.Atoi(fields[0])
	if err != nil {
		t.Fatal(err)
	}
	return kib
}

// halfOpenMain holds that many connections to an address until it is killed. Every other one says a little, once.
func halfOpenMain(args []string) int {
	addr, err := netip.ParseAddrPort(args[0])
	if err != nil {
		return 2
	}
	n, err := strconv.Atoi(args[1])
	if err != nil {
		return 2
	}
	var (
		first   atomic.Int64 // of those that were open once
		dialing = make(chan struct{}, 64)
	)
	for i := range n {
		go func() {
			for came := false; ; {
				dialing <- struct{}{}
				conn, err := net.DialTCP("tcp", nil, net.TCPAddrFromAddrPort(addr))
				<-dialing
				if err != nil {
					time.Sleep(time.Second)
					continue
				}
				if i%2 == 0 {
					_, _ = io.WriteString(conn, "\x16\x03\x01\x02")
				}
				if !came && first.Add(1) == int64(n) {
					fmt.Println("all were there")
				}
				came = true
				_, _ = conn.Read(make([]byte, 1))
				conn.Close()
				// A storm of new connections would prove how fast this machine is, nothing else.
				time.Sleep(5*time.Second + rand.N(20*time.Second))
			}
		}()
	}
	select {}
}
