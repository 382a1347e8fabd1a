// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// wish is which of a test's many destinations a client wants. Clients say it in their first bytes, so that whoever accepts can compare
// it with the record. Its upper bit is the family.
type wish uint32

const (
	wish6   wish = 1 << 31
	maxWish      = 1 << 16
)

func (w wish) addr() netip.Addr {
	a, b := byte(w>>8), byte(w)
	if w&wish6 != 0 {
		return netip.AddrFrom16([16]byte{0xfd, 0x64, 14: a, 15: b})
	}
	return netip.AddrFrom4([4]byte{10, 100, a, b})
}

func (w wish) family() int {
	if w&wish6 != 0 {
		return unix.AF_INET6
	}
	return unix.AF_INET
}

// wishOf is the reverse; what is no destination of a test is no wish of anybody.
func wishOf(o kernelOrigin) wish {
	w := wish(o.Addr[14])<<8 | wish(o.Addr[15])
	if o.Addr[0] == 0xfd {
		w |= wish6
	}
	if to16(w.addr()) != o.Addr || o.Port != edgePort {
		return ^wish(0)
	}
	return w
}

// wishes are n destinations of both families, all of them targets.
func wishes(t *testing.T, k *Kernel, n int) []wish {
	t.Helper()
	var all []wish
	for i := range n / 2 {
		all = append(all, wish(i), wish(i)|wish6)
	}
	setWishes(t, k, all)
	return all
}

// onePort are n destinations that have one redirect port, the first.
func onePort(n int) []wish {
	var all []wish
	for w := wish(0); len(all) < n; w++ {
		if redirectIndex(w.addr()) == 0 {
			all = append(all, w)
		}
	}
	return all
}

// redirectIndex is pick_port() of bpf/connect.h.
func redirectIndex(addr netip.Addr) uint32 {
	bytes := addr.As16()
	hash := uint32(edgePort)
	for i := range 4 {
		hash = (hash ^ binary.LittleEndian.Uint32(bytes[4*i:])) * 0x9e3779b1
	}
	return hash >> 16 & (Ports - 1)
}

func setWishes(t *testing.T, k *Kernel, all []wish) {
	t.Helper()
	var targets []Target
	for _, w := range all {
		targets = append(targets, Target{w.addr(), "edge", Online})
	}
	must(t, k.SetTargets(targets))
}

// exactServer accepts by plain system calls, one thread for each listener, and compares each connection's record with what its client says
// that it wanted.
type exactServer struct {
	k         *Kernel
	listeners []socket
	pause     time.Duration // after each accept
	hold      bool          // connections stay open until the process ends
	held      sync.Map      // files that would be closed if nobody knew them
	wg        sync.WaitGroup
	stopping  atomic.Bool

	accepted atomic.Int64
	answered atomic.Int64 // said what they wanted, and it is what they got
	silent   atomic.Int64 // were aborted before they could say anything
	missing  atomic.Int64 // had no record
	wrong    atomic.Int64 // had another's
}

// listenExactly opens the listeners on all redirect ports of addresses.
func (l *lab) listenExactly(k *Kernel, addrs ...netip.Addr) *exactServer {
	l.t.Helper()
	s := &exactServer{k: k}
	for _, addr := range addrs {
		for _, port := range k.RedirectPorts() {
			listener, err := k.Listen(l.t.Context(), netip.AddrPortFrom(addr, port))
			must(l.t, err)
			s.listeners = append(s.listeners, rawListener(l.t, listener.File))
			must(l.t, listener.Close())
		}
	}
	l.t.Cleanup(s.stop)
	return s
}

// rawListener is a blocking descriptor of a listener.
func rawListener(t *testing.T, file func() (*os.File, error)) socket {
	t.Helper()
	f, err := file()
	must(t, err)
	defer f.Close()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	must(t, err)
	must(t, unix.SetNonblock(fd, false))
	return socket(fd)
}

func (s *exactServer) start() {
	for _, listener := range s.listeners {
		s.wg.Go(func() { s.acceptAll(listener) })
	}
}

func (s *exactServer) acceptAll(listener socket) {
	for !s.stopping.Load() {
		fd, _, err := unix.Accept4(int(listener), unix.SOCK_CLOEXEC)
		if err != nil {
			time.Sleep(time.Millisecond) // no descriptor is left; or the listener was shut down
			continue
		}
		s.accepted.Add(1)
		s.check(fd)
		if s.pause > 0 {
			time.Sleep(s.pause)
		}
	}
}

// check compares the record with what the client says, if it says anything. It does not wait for that: some clients are gone, and where packets
// get lost nobody told.
func (s *exactServer) check(fd int) {
	rec, err := s.k.record(fd)
	if err != nil || rec.Kind != kernelSockKindSOCK_ACCEPTED {
		s.missing.Add(1)
		_ = unix.Close(fd)
		return
	}
	got := wishOf(rec.Origin)
	said := make([]byte, 4)
	n, _, err := unix.Recvfrom(fd, said, unix.MSG_DONTWAIT)
	if !errors.Is(err, unix.EAGAIN) {
		_, _ = unix.Write(fd, s.judge(got, said[:max(n, 0)]))
		if !s.hold {
			_ = unix.Close(fd)
		}
		return
	}
	s.wg.Go(func() {
		_ = unix.SetNonblock(fd, true)
		conn := os.NewFile(uintptr(fd), "connection")
		_ = conn.SetReadDeadline(time.Now().Add(patience))
		n, _ := conn.Read(said)
		_, _ = conn.Write(s.judge(got, said[:n]))
		if !s.hold {
			_ = conn.Close()
			return
		}
		s.held.Store(conn, true)
	})
}

// judge counts, and returns what to tell the client: what its connection was taken for.
func (s *exactServer) judge(got wish, said []byte) []byte {
	switch {
	case len(said) < 4:
		s.silent.Add(1)
		return nil
	case wish(binary.BigEndian.Uint32(said)) == got:
		s.answered.Add(1)
	default:
		s.wrong.Add(1)
	}
	return binary.BigEndian.AppendUint32(nil, uint32(got))
}

// stop ends it after the accept queues have run empty.
func (s *exactServer) stop() {
	if s.stopping.Swap(true) {
		return
	}
	for _, listener := range s.listeners {
		_ = unix.Shutdown(int(listener), unix.SHUT_RDWR)
	}
	s.wg.Wait()
	for _, listener := range s.listeners {
		listener.close()
	}
}

// settle waits until everything that the kernel has handed to the listeners is checked.
func (s *exactServer) settle(t *testing.T) Counters {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		c := stats(t, s.k)
		children := int64(c.AcceptedHost + c.AcceptedPod + c.AcceptedUnknown + c.AcceptFailed)
		if s.accepted.Load() == children && s.checked() == children {
			return c
		}
		if time.Now().After(deadline) {
			t.Errorf("accepted %d connections, the kernel counts %d", s.accepted.Load(), children)
			return c
		}
	}
}

// account settles, and proves that no connection had another's destination and none was without its own: each hand-over was taken, or is still
// there because its ACK never came. Whatever else was accepted was made anew, see TestMadeAnew.
func (s *exactServer) account(t *testing.T) Counters {
	t.Helper()
	c := s.settle(t)
	if n := s.wrong.Load(); n != 0 {
		t.Errorf("%d connections with another's destination", n)
	}
	if c.HandOverFailed != 0 || c.AcceptFailed != 0 || s.missing.Load() != int64(c.AcceptedUnknown) {
		t.Errorf("%d and %d hand-overs failed; %d connections without a destination, counted %d", c.HandOverFailed, c.AcceptFailed, s.missing.Load(), c.AcceptedUnknown)
	}
	left := map[string]uint64{}
	for _, name := range []string{kernelMapInFlightHost, kernelMapInFlightPods, kernelMapInFlightCrowd} {
		var flow kernelFlow
		var origin kernelOrigin
		entries := s.k.maps[name].Iterate()
		for entries.Next(&flow, &origin) {
			left[name]++
		}
		must(t, entries.Err())
	}
	var cgroup kernelCgroupKey
	var pending kernelPending
	var sum int64
	for entries := s.k.maps[kernelMapPending].Iterate(); entries.Next(&cgroup, &pending); {
		sum += pending.HandOvers
	}
	if sum != int64(c.HandedOverPod-c.AcceptedPod) {
		t.Errorf("%d hand-overs of pods count as pending, want %d", sum, c.HandedOverPod-c.AcceptedPod)
	}
	if c.HandedOverHost != c.AcceptedHost+left[kernelMapInFlightHost] || c.HandedOverPod != c.AcceptedPod+left[kernelMapInFlightPods]+left[kernelMapInFlightCrowd] {
		t.Errorf("handed over %d and %d, accepted %d and %d, left %v", c.HandedOverHost, c.HandedOverPod, c.AcceptedHost, c.AcceptedPod, left)
	}
	return c
}

// complete is the same where no connection can have been made anew.
func (s *exactServer) complete(t *testing.T) Counters {
	t.Helper()
	c := s.account(t)
	if c.AcceptedUnknown != 0 {
		t.Errorf("%d connections without a destination", c.AcceptedUnknown)
	}
	return c
}

// await waits until so many connections were accepted and checked.
func (s *exactServer) await(t *testing.T, n int64) {
	t.Helper()
	for deadline := time.Now().Add(patience); s.checked() < n; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d connections were accepted, want %d", s.checked(), n)
		}
	}
}

func (s *exactServer) checked() int64 {
	return s.answered.Load() + s.silent.Load() + s.missing.Load() + s.wrong.Load()
}

// open makes a socket for a wish that closes with a reset, and leaves nothing behind.
func (w wish) open(flags int) (socket, error) {
	fd, err := unix.Socket(w.family(), unix.SOCK_STREAM|unix.SOCK_CLOEXEC|flags, 0)
	if err != nil {
		return -1, err
	}
	if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return socket(fd), nil
}

// ready is the same with a port of its own, which may have been another's until just now.
func (w wish) ready(from netip.AddrPort) (socket, error) {
	s, err := w.open(unix.SOCK_NONBLOCK)
	if err != nil {
		return s, err
	}
	return s, errors.Join(unix.SetsockoptInt(int(s), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1), unix.Bind(int(s), sockaddr(w.family(), from)))
}

func (w wish) connect(s socket) error {
	for {
		err := unix.Connect(int(s), sockaddr(w.family(), netip.AddrPortFrom(w.addr(), edgePort)))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if errors.Is(err, unix.EISCONN) { // an earlier try, interrupted by a signal of the runtime
			return nil
		}
		return err
	}
}

// say tells the server what this end wanted.
func (w wish) say(s socket) error {
	_, err := unix.Write(int(s), binary.BigEndian.AppendUint32(nil, uint32(w)))
	return err
}

// confirm reads what the server took the connection for.
func (w wish) confirm(s socket) error {
	var got [4]byte
	n, err := s.Read(got[:])
	if err != nil || n < len(got) {
		return fmt.Errorf("no answer (%d bytes): %w", n, errors.Join(err, unix.ENODATA))
	}
	if g := wish(binary.BigEndian.Uint32(got[:])); g != w {
		return fmt.Errorf("wanted %#x, arrived as %#x", w, g)
	}
	return nil
}

// visit is one connection that lives: it arrives at its destination, or there is an error.
func (w wish) visit() error {
	s, err := w.open(0)
	if err != nil {
		return err
	}
	defer s.close()
	if err := w.connect(s); err != nil {
		return fmt.Errorf("connect to %s: %w", w.addr(), err)
	}
	if err := w.say(s); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	return w.confirm(s)
}

// abort is one connection that is reset: at once, after its client has said something, or at a random moment, in the middle of the handshake or
// after it.
func (w wish) abort(how uint32) error {
	var flags int
	if how%3 == 2 {
		flags = unix.SOCK_NONBLOCK
	}
	s, err := w.open(flags)
	if err != nil {
		return err
	}
	defer s.close()
	err = w.connect(s)
	switch {
	case how%3 == 2 && errors.Is(err, unix.EINPROGRESS):
		for wait := time.Now().Add(time.Duration(how>>8%100) * time.Microsecond); time.Now().Before(wait); {
		}
		return nil
	case err != nil:
		return fmt.Errorf("connect to %s: %w", w.addr(), err)
	case how%3 == 1:
		return w.say(s)
	}
	return nil
}
