// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"errors"
	"net"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestNoStorage: a socket whose record cannot be had is refused, and does not go direct.
func TestNoStorage(t *testing.T) {
	const sysctl = "/proc/sys/net/core/optmem_max"
	l := newLab(t)
	l.addPod()
	k, s := l.ready()
	in(l.pod, func() {
		before, err := os.ReadFile(sysctl)
		if err == nil {
			err = os.WriteFile(sysctl, []byte("0"), 0)
		}
		if err != nil {
			t.Error(err)
			return
		}
		if _, err := dialer().Dial("tcp4", dst4.String()); !errors.Is(err, unix.ENOMEM) {
			t.Errorf("with optmem_max at its floor: %v, want ENOMEM", err)
		}
		if err := os.WriteFile(sysctl, []byte(strings.TrimSpace(string(before))), 0); err != nil {
			t.Error(err)
		}
		if got, err := ask(dialer(), "tcp4", dst4.String()); got != dst4.String() {
			t.Errorf("afterwards: %q (%v)", got, err)
		}
	})
	if c := stats(t, k); c.StorageFailed != 1 || c.RedirectedPod4 != 1 {
		t.Errorf("counted %d failed, %d redirected", c.StorageFailed, c.RedirectedPod4)
	}

	// The same in the host's namespace, where the listener's own record is wanted, too.
	s.stop()
	before, err := os.ReadFile(sysctl)
	must(t, err)
	must(t, os.WriteFile(sysctl, []byte("0"), 0))
	t.Cleanup(func() { must(t, os.WriteFile(sysctl, before, 0)) })
	_, err = k.Listen(t.Context(), s.listeners[0].Addr().(*net.TCPAddr).AddrPort())
	var hinted interface{ Hint() string }
	if !errors.As(err, &hinted) || !strings.Contains(hinted.Hint(), "optmem_max") {
		t.Errorf("listen: %v, want a hint at optmem_max", err)
	}
}
