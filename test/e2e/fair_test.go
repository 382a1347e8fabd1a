// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Connections of one tunnel whose receivers do not read, at either end, stall nobody else; and they lose nothing by it.
func TestSlowReaders(t *testing.T) {
	t.Parallel()
	e := newEnds(t)
	others := e.edge.serve(10250, echo)
	const each = 4 // in each direction
	type transfer struct {
		from, to *net.TCPConn
		sent     int64 // when the sender has ended
	}
	var (
		transfers []*transfer
		senders   sync.WaitGroup
		enough    atomic.Bool
	)
	for i := range 2 * each {
		client := e.cloud.mustDial(e.edge.at(servicePort))
		tr := &transfer{from: client, to: <-e.accepted}
		if i%2 == 1 {
			tr.from, tr.to = tr.to, tr.from
		}
		transfers = append(transfers, tr)
		senders.Go(func() {
			for piece := make([]byte, 64<<10); !enough.Load(); {
				n, err := tr.from.Write(piece)
				tr.sent += int64(n)
				if err != nil {
					t.Errorf("send: %v", err)
					return
				}
			}
			tr.from.CloseWrite()
		})
	}
	// Until nothing moves any more, though everybody wants to send: all buffers on the way are full.
	moved := -1.0
	eventually(t, patience, func() error {
		before := moved
		moved = e.agent.metrics()[`edge_tunnel_agent_tunnel_bytes_total{direction="sent"}`] + e.server.metrics()[`edge_tunnel_tunnel_bytes_total{direction="sent"}`]
		if moved != before {
			time.Sleep(300 * time.Millisecond)
			return errors.New("data still moves")
		}
		return nil
	})
	for range 20 {
		e.cloud.mustEcho(others)
	}
	conn := e.cloud.mustDial(others)
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	passBulk(t, conn, conn)

	enough.Store(true)
	got := make([]int64, len(transfers))
	atOnce(t, len(transfers), len(transfers), func(i int) (err error) {
		_ = transfers[i].to.SetDeadline(time.Now().Add(3 * patience))
		got[i], err = io.Copy(io.Discard, transfers[i].to)
		return err
	})
	senders.Wait()
	for i, tr := range transfers {
		if got[i] != tr.sent {
			t.Errorf("a slow reader got %d bytes of %d", got[i], tr.sent)
		}
		tr.from.Close()
		tr.to.Close()
	}
	e.server.waitIdle()
	e.agent.waitIdle()
}

// Keystrokes and their echo, one after the other, while other connections of the same tunnel send as much as they can in both directions.
func TestKeystrokesBesideBulk(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	keys := s.edge.serve(10250, echo)
	down := s.edge.serve(servicePort, source(-1))
	up := s.edge.serve(10255, hold)
	var bulk sync.WaitGroup
	var conns []*net.TCPConn
	for range 2 {
		d, u := s.cloud.mustDial(down), s.cloud.mustDial(up)
		conns = append(conns, d, u)
		bulk.Go(func() { _, _ = io.Copy(io.Discard, d) }) // until they are closed
		bulk.Go(func() { _, _ = io.Copy(u, zeros{}) })
	}
	time.Sleep(500 * time.Millisecond)

	typist := s.cloud.mustDial(keys)
	took := make([]time.Duration, 50)
	for i := range took {
		began := time.Now()
		if err := exchange(typist, "k"); err != nil {
			t.Fatal(err)
		}
		took[i] = time.Since(began)
	}
	for _, conn := range conns {
		conn.Close()
	}
	bulk.Wait()
	slices.Sort(took)
	m := s.server.metrics()
	t.Logf("keystrokes beside bulk: median %v, slowest %v", took[len(took)/2], took[len(took)-1])
	// exchange has its patience; how long it takes is the benchmarks' matter.
	if sent := m[`edge_tunnel_tunnel_bytes_total{direction="sent"}`]; sent < 1<<20 {
		t.Errorf("no bulk beside them: %v bytes", sent)
	}
	typist.Close()
	s.server.waitIdle()
	s.agent.waitIdle()
}
