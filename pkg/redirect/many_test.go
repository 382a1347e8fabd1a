// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// tally is what the processes of TestFortyThousandAtOnce say: how many connections they have open, and of those accepted, how many are not what
// they should be.
type tally struct{ Open, Missing, Wrong int64 }

// holding tells a process what to do: accept from its first so many descriptors, the next is the map of records; or make so many connections.
type holding struct {
	Listeners int
	Visits    int
	Wishes    []wish
}

func acceptAndHold(in *json.Decoder, out *json.Encoder) error {
	var h holding
	if err := in.Decode(&h); err != nil {
		return err
	}
	const firstFile = 3
	records, err := ebpf.NewMapFromFD(firstFile + h.Listeners)
	if err != nil {
		return err
	}
	s := &exactServer{k: &Kernel{sockets: records}, hold: true}
	for i := range h.Listeners {
		s.listeners = append(s.listeners, socket(firstFile+i))
	}
	s.start()
	var failed error
	for failed == nil && in.Decode(&struct{}{}) == nil {
		failed = out.Encode(tally{s.answered.Load(), s.missing.Load() + s.silent.Load(), s.wrong.Load()})
	}
	s.stop()
	return errors.Join(failed, records.Close())
}

func visitAndHold(in *json.Decoder, out *json.Encoder) error {
	var h holding
	if err := in.Decode(&h); err != nil {
		return err
	}
	var open []socket
	for i := range h.Visits {
		w := h.Wishes[i%len(h.Wishes)]
		s, err := w.open(0)
		if err == nil {
			err = unix.SetsockoptTimeval(int(s), unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 20})
		}
		if err == nil {
			err = w.connect(s)
		}
		if err == nil {
			err = w.say(s)
		}
		if err == nil {
			err = w.confirm(s)
		}
		if err != nil {
			return fmt.Errorf("connection %d: %w", i, err)
		}
		open = append(open, s)
	}
	// All are made; told once more, count those that are still there.
	failed := out.Encode(tally{Open: int64(len(open))})
	for failed == nil && in.Decode(&struct{}{}) == nil {
		var alive int64
		for _, s := range open {
			if _, _, err := unix.Recvfrom(int(s), make([]byte, 1), unix.MSG_PEEK|unix.MSG_DONTWAIT); errors.Is(err, unix.EAGAIN) {
				alive++
			}
		}
		failed = out.Encode(tally{Open: alive})
	}
	return failed
}

// TestFortyThousandAtOnce: one client address has more connections open than it has ports, because there are eight redirect ports. Each is at its own
// destination. Several processes, because a process can have too few descriptors for them.
func TestFortyThousandAtOnce(t *testing.T) {
	const acceptors, clients = 4, 3
	connections := scaled(40_000)
	l := newLab(t)
	k := l.open()
	must(t, k.SetPorts([]uint16{edgePort}))
	var all []wish
	for w := range wish(4096) {
		all = append(all, w)
	}
	setWishes(t, k, all)
	must(t, k.Attach())

	var accepting, visiting []*process
	ports := k.RedirectPorts()
	for i := range acceptors {
		h := holding{Listeners: len(ports) / acceptors}
		var files []*os.File
		for _, port := range ports[i*h.Listeners:][:h.Listeners] {
			listener, err := k.Listen(t.Context(), netip.AddrPortFrom(loopback4, port))
			must(t, err)
			files = append(files, os.NewFile(uintptr(rawListener(t, listener.File)), "listener"))
			must(t, listener.Close())
		}
		records, err := unix.FcntlInt(uintptr(k.sockets.FD()), unix.F_DUPFD_CLOEXEC, 0)
		must(t, err)
		files = append(files, os.NewFile(uintptr(records), "records"))
		p := startRole(t, "accept", l.host, nil, files...)
		for _, f := range files {
			must(t, f.Close())
		}
		p.tell(h)
		accepting = append(accepting, p)
	}
	for i := range clients {
		p := startRole(t, "visit", l.host, nil)
		p.tell(holding{Visits: connections*(i+1)/clients - connections*i/clients, Wishes: all})
		visiting = append(visiting, p)
	}

	count := func(processes []*process) (sum tally) {
		for _, p := range processes {
			var n tally
			p.hear(&n)
			sum.Open += n.Open
			sum.Missing += n.Missing
			sum.Wrong += n.Wrong
		}
		return sum
	}
	want := tally{Open: int64(connections)}
	if made := count(visiting); made != want {
		t.Errorf("made: %+v", made)
	}
	for _, p := range append(visiting, accepting...) {
		p.tell(struct{}{})
	}
	if alive, accepted := count(visiting), count(accepting); alive != want || accepted != want {
		t.Errorf("open at once: %+v at the clients, %+v at the servers", alive, accepted)
	}
	for _, p := range append(visiting, accepting...) {
		p.end()
	}
	if c := stats(t, k); c.RedirectedHost4 != uint64(connections) || c.AcceptedHost != uint64(connections) || c.AcceptedUnknown != 0 {
		t.Errorf("redirected %d, accepted %d, %d without a destination", c.RedirectedHost4, c.AcceptedHost, c.AcceptedUnknown)
	}
}
