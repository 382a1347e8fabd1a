// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"strings"
	"testing"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// TestNoStorage: a socket whose record cannot be had is refused, and does not go direct.
func TestNoStorage(t *testing.T) {
	l := newLab(t)
	l.addPod()
	k, s := l.ready()
	restore := l.setOptmem(l.pod, "0")
	in(l.pod, func() {
		want := refusal(t, k, unix.ENOMEM)
		if _, err := dialer().Dial("tcp4", dst4.String()); !errors.Is(err, want) {
			t.Errorf("with optmem_max at its floor: %v, want %v", err, want)
		}
	})
	restore()
	in(l.pod, func() {
		if got, err := ask(dialer(), "tcp4", dst4.String()); got != dst4.String() {
			t.Errorf("afterwards: %q (%v)", got, err)
		}
	})
	if c := stats(t, k); c.StorageFailed != 1 || c.RedirectedPod4 != 1 {
		t.Errorf("counted %d failed, %d redirected", c.StorageFailed, c.RedirectedPod4)
	}

	// The same in the host's namespace, where the listener's own record is wanted, too.
	s.stop()
	defer l.setOptmem(l.host, "0")()
	_, err := k.Listen(t.Context(), s.listeners[0].Addr().(*net.TCPAddr).AddrPort())
	var hinted interface{ Hint() string }
	if !errors.As(err, &hinted) || !strings.Contains(hinted.Hint(), "optmem_max") {
		t.Errorf("listen: %v, want a hint at optmem_max", err)
	}
}

// setOptmem sets what the sockets of a namespace may have of memory beside their buffers, until it is restored. Before Linux 6.8 that is one
// setting for the machine, which only its first namespace shows.
func (l *lab) setOptmem(ns netns.NsHandle, value string) (restore func()) {
	const path = "/proc/sys/net/core/optmem_max"
	var before []byte
	set := func(to []byte) (err error) {
		in(ns, func() {
			if before == nil {
				before, err = os.ReadFile(path)
			}
			if err == nil {
				err = os.WriteFile(path, to, 0)
			}
		})
		return err
	}
	err := set([]byte(value))
	if errors.Is(err, fs.ErrNotExist) {
		ns = l.home
		err = set([]byte(value))
	}
	must(l.t, err)
	return func() { must(l.t, set(before)) }
}
