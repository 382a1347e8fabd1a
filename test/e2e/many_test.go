// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// A thousand connections that are all open at once, from the host and from a pod, over both families. Each carries something of its own to
// an echo and has it come back.
func TestThousandAtOnce(t *testing.T) {
	t.Parallel()
	const total, size = 1000, 64 << 10
	s := newSite(t)
	pod := s.cloud.pod("pod-1")
	to := []netip.AddrPort{s.edge.serve(servicePort, echo), s.edge.serveAt(s.edge.at6(servicePort), echo)}
	hosts := []*host{s.cloud, pod}

	conns := make([]*net.TCPConn, total)
	atOnce(t, total, 50, func(i int) error {
		var err error
		conns[i], err = hosts[i%2].dial(to[i/2%2])
		return err
	})
	s.server.waitMetric("edge_tunnel_connections", total)
	s.agent.waitMetric("edge_tunnel_agent_connections", total)
	// All of them at the same time.
	atOnce(t, total, total, func(i int) error {
		conn := conns[i]
		if err := conn.SetDeadline(time.Now().Add(3 * patience)); err != nil {
			return err
		}
		want := make([]byte, size)
		_, _ = rand.NewChaCha8(sha256.Sum256([]byte{byte(i), byte(i >> 8)})).Read(want)
		sent := make(chan error, 1)
		go func() {
			_, err := conn.Write(want)
			sent <- errors.Join(err, conn.CloseWrite())
		}()
		got, err := io.ReadAll(conn)
		if err = errors.Join(err, <-sent); err == nil && !bytes.Equal(got, want) {
			err = fmt.Errorf("connection %d: %d bytes came back, or others; want %d", i, len(got), len(want))
		}
		conn.Close()
		return err
	})
	s.server.waitEnded("closed", total)
	s.agent.waitEnded("closed", total)
	s.server.waitIdle()
	s.agent.waitIdle()
	m := s.server.metrics()
	for _, verdict := range []string{"redirected_host4", "redirected_host6", "redirected_pod4", "redirected_pod6"} {
		canaries := 0.0 // the server's own, in the host's namespace
		if strings.Contains(verdict, "host") {
			canaries = 10
		}
		if got := m.bpf(verdict); got < total/4 || got > total/4+canaries {
			t.Errorf("%s: %v, want %d", verdict, got, total/4)
		}
	}
}

// Connections that come and go, in each of the ways in which they can, leave nothing in either daemon.
func TestTenThousandCycles(t *testing.T) {
	t.Parallel()
	const warmUp, total, workers = 1000, 10_000, 16
	s := newPlainWorld(t).startSite()
	pod := s.cloud.pod("pod-1")
	to := []netip.AddrPort{s.edge.serve(servicePort, echo), s.edge.serveAt(s.edge.at6(servicePort), echo)}
	hosts := []*host{s.cloud, pod}
	cycle := func(i int) error {
		conn, err := hosts[i%2].dial(to[i/2%2])
		if err != nil {
			return err
		}
		defer conn.Close()
		switch i / 4 % 4 {
		case 0: // nothing was said
			return nil
		case 1: // the client is done at once
			return exchange(conn, fmt.Sprint("number ", i))
		case 2: // each end is done in its turn
			if err := exchange(conn, fmt.Sprint("number ", i)); err != nil {
				return err
			}
			if err := conn.CloseWrite(); err != nil {
				return err
			}
			_, err := io.Copy(io.Discard, conn)
			return err
		default: // aborted
			return errors.Join(exchange(conn, fmt.Sprint("number ", i)), conn.SetLinger(0))
		}
	}
	atOnce(t, warmUp, workers, cycle)
	before := map[*daemon]usage{s.server: settled(s.server), s.agent: settled(s.agent)}
	began := time.Now()
	atOnce(t, total, workers, cycle)
	t.Logf("%d connections in %.1f s", total, time.Since(began).Seconds())
	for d, was := range before {
		is := settled(d)
		t.Logf("%s: before %+v, after %+v", d.name, was, is)
		// Some more are at work at any time: timers, the look itself.
		if is.goroutines > was.goroutines+5 || is.files > was.files+5 {
			t.Errorf("%s has %d goroutines and %d files, before %d and %d", d.name, is.goroutines, is.files, was.goroutines, was.files)
		}
		// Less than 1 KiB for each of them.
		if grown := is.resident - was.resident; grown > total {
			t.Errorf("%s has grown by %d KiB", d.name, grown)
		}
	}
	m := s.server.metrics()
	if ended := m[`edge_tunnel_node_connections_ended_total{node="edge-1"}`]; ended != warmUp+total {
		t.Errorf("of %d connections %v have ended", warmUp+total, ended)
	}
	for _, verdict := range []string{"hand_over_failed", "accept_failed", "accepted_unknown", "storage_failed"} {
		if n := m.bpf(verdict); n != 0 {
			t.Errorf("%s: %v", verdict, n)
		}
	}
}

// usage is what a daemon has of what can leak.
type usage struct {
	goroutines, files int
	resident          int // KiB
}

// settled waits until no connection is open and for half a second more, in which the last goroutines end, and looks at what is left.
func settled(d *daemon) usage {
	d.t.Helper()
	d.waitIdle()
	time.Sleep(500 * time.Millisecond)
	m := d.metrics()
	return usage{goroutines: int(m["go_goroutines"]), files: int(m["process_open_fds"]), resident: residentMemory(d.t, d, "VmRSS")}
}

// atOnce calls f for 0 to n-1, so many at a time, and ends the test with the first error.
func atOnce(t *testing.T, n, workers int, f func(i int) error) {
	t.Helper()
	var (
		next   atomic.Int64
		wg     sync.WaitGroup
		failed = make(chan error, workers)
	)
	for range workers {
		wg.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= n || len(failed) > 0 {
					return
				}
				if err := f(i); err != nil {
					failed <- fmt.Errorf("number %d: %w", i, err)
					return
				}
			}
		})
	}
	wg.Wait()
	select {
	case err := <-failed:
		t.Fatal(err)
	default:
	}
}
