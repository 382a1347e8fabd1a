// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"encoding/json"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/edge-tunnel/edge-tunnel/test/netlab"
)

// flooding is what a flooder is told, and what it says when it has made enough and in the end.
type flooding struct {
	Threads int
	Wishes  []wish
	Pretend bool  // connections without a packet: hand-overs that nobody takes
	Enough  int64 // when to say that there is a flood
	Made    int64
}

// flood makes connections that are given up halfway, as fast as it can, until its input ends.
func flood(in *json.Decoder, out *json.Encoder) error {
	var f flooding
	if err := in.Decode(&f); err != nil {
		return err
	}
	var stop atomic.Bool
	var made atomic.Int64
	var wg sync.WaitGroup
	enough := make(chan struct{})
	failed := make(chan error, f.Threads)
	for thread := range f.Threads {
		wg.Go(func() {
			random := rand.New(rand.NewPCG(3, uint64(thread)))
			for !stop.Load() {
				w := f.Wishes[random.IntN(len(f.Wishes))]
				var err error
				if f.Pretend {
					err = w.repair(random.Uint32())
				} else {
					err = w.abort(2)
				}
				if err != nil {
					failed <- err
					return
				}
				if made.Add(1) == f.Enough {
					close(enough)
				}
			}
		})
	}
	select {
	case <-enough:
	case err := <-failed:
		return err
	}
	f.Made = made.Load()
	err := out.Encode(f)
	_ = in.Decode(&struct{}{}) // until its end
	stop.Store(true)
	wg.Wait()
	f.Made = made.Load()
	close(failed)
	return errors.Join(err, <-failed, out.Encode(f))
}

// repair makes a connection by declaration, without a packet. Everybody has the capability in a namespace of his own.
func (w wish) repair(seq uint32) error {
	s, err := w.open(0)
	if err != nil {
		return err
	}
	defer s.close()
	const sendQueue = 2
	err = errors.Join(
		unix.SetsockoptInt(int(s), unix.IPPROTO_TCP, unix.TCP_REPAIR, 1),
		unix.SetsockoptInt(int(s), unix.IPPROTO_TCP, unix.TCP_REPAIR_QUEUE, sendQueue),
		unix.SetsockoptInt(int(s), unix.IPPROTO_TCP, unix.TCP_QUEUE_SEQ, int(seq)))
	if err != nil {
		return err
	}
	return w.connect(s)
}

// flooder is a process in a cgroup of its own.
type flooder struct {
	*process
	made int64
}

// startFlood returns when the flood is at its height.
func (l *lab) startFlood(ns netns.NsHandle, f flooding) *flooder {
	l.t.Helper()
	dir := filepath.Join(l.cgroup, "flooder")
	must(l.t, os.Mkdir(dir, 0o755))
	l.t.Cleanup(func() { must(l.t, netlab.RemoveCgroup(dir)) })
	group, err := os.Open(dir)
	must(l.t, err)
	defer group.Close()
	p := &flooder{process: startRole(l.t, "flood", ns, group)}
	p.tell(f)
	p.hear(&f)
	return p
}

func (f *flooder) stop() {
	f.t.Helper()
	must(f.t, f.in.Close())
	var end flooding
	f.hear(&end)
	f.made = end.Made
	f.end()
}

// TestFloodingPod: while a process of a pod makes connections that it gives up halfway, or that it only pretends, as fast as it can, the
// connections of the host and of another pod arrive, each at its own destination.
func TestFloodingPod(t *testing.T) {
	for name, pretend := range map[string]bool{"given up": false, "pretended": true} {
		t.Run(name, func(t *testing.T) {
			l, s, all := crowded(t)
			s.start()
			neighbour := l.addNeighbour()
			spreadPackets(t, "neighbour")
			f := l.startFlood(neighbour, flooding{Threads: 2, Pretend: pretend, Wishes: onePort(64), Enough: 1000})
			connects := scaled(10_000)
			l.storm(all, connects, 2)
			f.stop()
			t.Log("flood:", f.made)
			if f.made < int64(connects/2) {
				t.Error("that was no flood")
			}
			if !pretend {
				s.account(t)
			} else if c := s.settle(t); c.AcceptedUnknown != 0 || s.wrong.Load() != 0 { // the flood's own are left and evicted
				t.Errorf("%d connections without a destination, %d with another's", c.AcceptedUnknown, s.wrong.Load())
			}
		})
	}
}
