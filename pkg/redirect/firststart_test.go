// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf/link"

	"github.com/edge-tunnel/edge-tunnel/test/netlab"
)

func (l *lab) wantNothing(when string) {
	l.t.Helper()
	if _, err := os.Lstat(filepath.Join(l.bpffs, "edge-tunnel")); !errors.Is(err, fs.ErrNotExist) {
		l.t.Errorf("%s: the pin folder is there (%v)", when, err)
	}
	group, err := openCgroup(l.cgroup)
	must(l.t, err)
	defer func() { _ = group.Close() }()
	for _, h := range hooks() {
		list, err := link.QueryPrograms(link.QueryOptions{Target: int(group.Fd()), Attach: h.attach})
		must(l.t, err)
		if n := len(list.Programs); n != 0 {
			l.t.Errorf("%s: %d programs on %s", when, n, h.name)
		}
	}
}

func TestFailedFirstStartLeavesNothing(t *testing.T) {
	l := newLab(t)
	k, err := Open(t.Context(), l.options())
	must(t, err)
	l.fill(k)
	must(t, k.Close())
	l.wantNothing("closed before Attach")

	for _, c := range []struct {
		what string
		opts func(*Options)
	}{
		{"no such cgroup", func(o *Options) { o.CgroupRoot = filepath.Join(l.cgroup, "missing") }},
		// Everything is attached before this turns out, on a cgroup that this process is not in.
		{"namespace not learnt", func(o *Options) { o.CgroupRoot, o.noNetnsCookie = l.newCgroup(l.cgroup), true }},
	} {
		opts := l.options()
		c.opts(&opts)
		k, err := Open(t.Context(), opts)
		must(t, err)
		l.fill(k)
		for range 2 { // the second time finds what the first has left
			if err := k.Attach(); err == nil {
				t.Errorf("%s: attached", c.what)
			}
			if _, err := ReadPinned(l.bpffs); !errors.Is(err, ErrNotInstalled) {
				t.Errorf("%s: after Attach: %v, want ErrNotInstalled", c.what, err)
			}
		}
		must(t, k.Close())
		l.wantNothing(c.what)
		if opts.noNetnsCookie {
			must(t, netlab.RemoveCgroup(opts.CgroupRoot))
		}
	}
}

// A later start that fails takes nothing away: connects go on being refused.
func TestFailedLaterStartKeepsThePins(t *testing.T) {
	l := newLab(t)
	k, s := l.ready()
	s.stop()
	must(t, k.Close())
	opts := l.options()
	opts.CgroupRoot = filepath.Join(l.cgroup, "missing")
	k, err := Open(t.Context(), opts)
	must(t, err)
	if err := k.Attach(); err == nil {
		t.Error("attached")
	}
	must(t, k.Close())
	pinned, err := ReadPinned(l.bpffs)
	must(t, err)
	if len(pinned.Detached) != 0 || len(pinned.Targets) != 2 {
		t.Errorf("detached %v, targets %v", pinned.Detached, pinned.Targets)
	}
}

// A successor that waits while a first start fails finds the folder gone that it wants to lock.
func TestSuccessorOfAFailedFirstStart(t *testing.T) {
	l := newLab(t)
	k := l.open()
	opts := l.options()
	opts.OnWait = func(string) { must(t, k.Close()) }
	successor, err := Open(t.Context(), opts)
	must(t, err)
	l.fill(successor)
	must(t, successor.Attach())
	must(t, successor.Close())
	if _, err := ReadPinned(l.bpffs); err != nil {
		t.Error(err)
	}
	must(t, Cleanup(l.bpffs))
}
