// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"slices"

	"github.com/cilium/ebpf/link"
)

// Cleanup detaches the programs and removes everything that is pinned below a bpf filesystem (empty: /sys/fs/bpf): what a daemon never
// does by itself. From then on connections to targets go direct. Open connections go on. Nothing there is no error; the
// error wraps [ErrInUse] while a daemon runs.
func Cleanup(bpffs string) error {
	p := pins{Options{BPFFS: bpffs}.withDefaults().BPFFS}
	if err := p.check(); err != nil {
		return err
	}
	if _, err := os.Stat(p.root()); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	lock, err := p.tryLock()
	if err != nil {
		if errors.Is(err, ErrInUse) {
			return fail("clean up", err, "stop the tunnel-server first")
		}
		return err
	}
	defer func() { _ = lock.Close() }()

	return p.remove()
}

// Leave is [Cleanup] by the daemon that runs: connections go direct from then on, and the Kernel is good for nothing but to be closed. Open
// connections go on.
func (k *Kernel) Leave() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed {
		return fail("leave", net.ErrClosed, "")
	}
	return k.pins.remove()
}

// remove detaches the programs and removes the pins. Called with the lock held.
func (p pins) remove() error {
	// What redirects goes first, what understands the records of connections goes last.
	var all []error
	for _, h := range slices.Backward(hooks()) {
		all = append(all, p.detach(h.name))
	}
	if err := errors.Join(all...); err != nil {
		return err
	}
	if err := os.RemoveAll(p.root()); err != nil {
		return explain("remove "+p.root(), err)
	}
	return nil
}

// detach ends a pinned link now: to remove its pin would do that later, in the background, if nobody else holds it.
func (p pins) detach(name string) error {
	l, err := link.LoadPinnedLink(p.linkPin(name), nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return explain("open the pinned link of "+name, err)
	}
	defer func() { _ = l.Close() }()
	if on, err := cgroupOf(l); err != nil || on == 0 {
		return err // nothing runs
	}
	if err := l.Detach(); err != nil {
		return explain("detach "+name, err)
	}
	return nil
}
