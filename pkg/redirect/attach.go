// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Attach puts the programs of this process, with its maps, into force on all hooks, or leaves everything as it was. If it fails
// where nothing was attached before, everything that it pinned is gone again: without a daemon behind them the programs would only
// refuse connections.
//
// A pinned link is kept and its program swapped. There is no comparison with the program that it has: a swap is atomic, costs
// nothing, and is right whatever was there. A link whose cgroup has died, or that is on another cgroup than the options say, is
// replaced. Where other programs run after ours on a hook where ours has to be last, it is attached anew.
func (k *Kernel) Attach() (err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	defer func() {
		if err != nil && k.first {
			err = errors.Join(err, k.takeBack())
			return
		}
		k.first = false
	}()
	group, err := openCgroup(k.opts.CgroupRoot)
	if err != nil {
		return err
	}
	defer func() { _ = group.Close() }()

	restore, err := k.publishConfig()
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, restore())
		}
	}()

	// While a link is being replaced, a program runs twice for one call. See keep_while_moving() in bpf/connect.h.
	k.config.Moving = 1
	if err := k.writeConfig(); err != nil {
		return err
	}
	err = k.attachAll(group)
	waitForPrograms()
	k.config.Moving = 0
	if err := errors.Join(err, k.writeConfig()); err != nil {
		return err
	}

	if k.learn {
		netns, err := k.learnNetns()
		if err != nil {
			return err
		}
		k.netns.Store(netns)
		k.config.HostNetns = netns
		k.learn = false
		return k.writeConfig()
	}
	return nil
}

// publishConfig lets writeConfig write, and returns what undoes that: programs that stay in force after a failure go on as before.
func (k *Kernel) publishConfig() (restore func() error, err error) {
	var former kernelConfig
	if err := k.maps[kernelMapConfig].Lookup(uint32(0), &former); err != nil {
		return nil, explain("read the config map", err)
	}
	was, isNew := k.inForce, k.unpinned[kernelMapConfig]
	k.inForce = true
	return func() error {
		k.inForce = was
		if isNew {
			return nil // nobody else's programs read it
		}
		return k.putConfig(&former)
	}, nil
}

// takeBack detaches and unpins everything. What redirects goes first, as in Cleanup.
func (k *Kernel) takeBack() error {
	var all []error
	remove := func(path string) {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			all = append(all, explain("remove "+path, err))
		}
	}
	for _, h := range slices.Backward(hooks()) {
		all = append(all, k.pins.detach(h.name))
		remove(k.pins.linkPin(h.name))
		if l := k.links[h.name]; l != nil {
			all = append(all, l.Close())
			delete(k.links, h.name)
		}
	}
	for name := range mapSet(k.maps).names(k.spec) {
		remove(k.pins.mapPin(name))
		k.unpinned[name] = true
	}
	return errors.Join(all...)
}

func (k *Kernel) attachAll(group *cgroup) (err error) {
	var changes []*change
	defer func() {
		for _, c := range changes {
			if err != nil {
				err = errors.Join(err, c.undo())
			}
			c.release()
		}
	}()
	for _, h := range hooks() {
		c, err := k.prepare(group, h)
		if err != nil {
			return err
		}
		changes = append(changes, c)
	}
	// All programs run. What follows renames and unpins.
	for name := range k.unpinned {
		if err := k.pins.replace(k.maps[name], k.pins.mapPin(name)); err != nil {
			return err
		}
		delete(k.unpinned, name)
	}
	for _, c := range changes {
		if err := k.commit(c); err != nil {
			return err
		}
	}
	k.former.Store(nil)
	for _, h := range hooks() {
		if err := k.moveLast(group, h); err != nil {
			return err
		}
	}
	return nil
}

// change is what was done to one hook: either the program of a link was swapped, or a new link made. It can be undone until it is
// committed.
type change struct {
	hook      hook
	link      link.Link
	staged    string        // where a new link is pinned until the change is committed
	before    *ebpf.Program // what a kept link ran
	old       link.Link     // what a new link replaces
	committed bool
}

func (c *change) undo() error {
	switch {
	case c.committed:
		return nil
	case c.staged != "":
		return errors.Join(c.link.Detach(), os.Remove(c.staged), c.link.Close())
	}
	return errors.Join(c.link.Update(c.before), c.link.Close())
}

// release closes what only an undo needs.
func (c *change) release() {
	if c.before != nil {
		_ = c.before.Close()
	}
	if c.old != nil {
		_ = c.old.Close()
	}
}

// prepare makes a hook run its program.
func (k *Kernel) prepare(group *cgroup, h hook) (*change, error) {
	op := "attach " + h.name
	pinned, err := link.LoadPinnedLink(k.pins.linkPin(h.name), nil)
	if errors.Is(err, fs.ErrNotExist) {
		return k.attachNew(group, h, nil)
	}
	if err != nil {
		return nil, fail("open the pinned link of "+h.name, err, hintOr(err, "tunnelctl cleanup removes what is pinned"))
	}
	info, err := pinned.Info()
	if err != nil {
		_ = pinned.Close()
		return nil, explain(op, err)
	}
	if on := info.Cgroup(); on == nil || on.CgroupId != group.id {
		k.log.Warn("Replacing a link that is not on the cgroup", "hook", h.name, "cgroup", group.Name())
		return k.attachNew(group, h, pinned)
	}
	before, err := ebpf.NewProgramFromID(info.Program)
	if err != nil {
		_ = pinned.Close()
		return nil, explain(op, err)
	}
	err = pinned.Update(k.programs[h.name])
	switch {
	case err == nil:
		return &change{hook: h, link: pinned, before: before}, nil
	case errors.Is(err, unix.ENOLINK): // the cgroup died just now
		_ = before.Close()
		return k.attachNew(group, h, pinned)
	}
	_, _ = before.Close(), pinned.Close()
	return nil, explain(op, err)
}

// attachNew makes a new link, pinned in the staging folder. The old one, if any, works on until the change is committed.
func (k *Kernel) attachNew(group *cgroup, h hook, old link.Link) (*change, error) {
	staged := filepath.Join(k.pins.staging(), h.name)
	// Never the older way of attaching, which cannot be pinned and which anybody's detach removes.
	var l link.Link
	raw, err := link.AttachRawLink(link.RawLinkOptions{Target: int(group.Fd()), Program: k.programs[h.name], Attach: h.attach})
	if err == nil {
		err = raw.Pin(staged)
		if err == nil {
			l, err = link.LoadPinnedLink(staged, nil) // a raw link cannot say which cgroup it is on
		}
		_ = raw.Close()
	}
	if err != nil {
		if old != nil {
			_ = old.Close()
		}
		hint := hintFor(err)
		if errors.Is(err, unix.EPERM) && len(missingCapabilities()) == 0 {
			hint = "a program was attached to this cgroup or one above it that allows no other beside it (without BPF_F_ALLOW_MULTI); bpftool cgroup tree shows it"
		}
		return nil, fail("attach "+h.name+" to "+group.Name(), err, hint)
	}
	return &change{hook: h, link: l, staged: staged, old: old}, nil
}

// commit makes a change the state that a successor finds.
func (k *Kernel) commit(c *change) error {
	if c.staged != "" {
		if err := os.Rename(c.staged, k.pins.linkPin(c.hook.name)); err != nil {
			return explain("pin the link of "+c.hook.name, err)
		}
	}
	c.committed = true
	if former := k.links[c.hook.name]; former != nil {
		_ = former.Close()
	}
	k.links[c.hook.name] = c.link
	if c.old == nil {
		return nil
	}
	if on, err := cgroupOf(c.old); err != nil || on == 0 {
		return err // it is detached
	}
	if err := c.old.Detach(); err != nil && !errors.Is(err, unix.ENOLINK) {
		return explain("detach the former link of "+c.hook.name, err)
	}
	return nil
}

// moveLast attaches a hook's program anew if others run after it. The order within a cgroup is that of attaching.
func (k *Kernel) moveLast(group *cgroup, h hook) error {
	if !h.last {
		return nil
	}
	list, err := k.programsOn(group, h)
	if err != nil {
		return err
	}
	if n := len(list); n == 0 || list[n-1].Ours {
		return nil
	}
	pinned, err := link.LoadPinnedLink(k.pins.linkPin(h.name), nil)
	if err != nil {
		return explain("open the pinned link of "+h.name, err)
	}
	c, err := k.attachNew(group, h, pinned)
	if err != nil {
		return err
	}
	defer c.release()
	if err := k.commit(c); err != nil {
		return errors.Join(err, c.undo())
	}
	k.log.Info("Moved a program behind the others on its hook", "hook", h.name, "others", len(list)-1)
	return nil
}

// waitForPrograms returns when no program of before the call still runs: the kernel's membarrier waits for a grace period, which
// programs hold up.
func waitForPrograms() {
	const membarrierGlobal = 1
	if _, _, errno := unix.Syscall(unix.SYS_MEMBARRIER, membarrierGlobal, 0, 0); errno != 0 {
		time.Sleep(100 * time.Millisecond) // kernels with nohz_full refuse; a program runs for a microsecond
	}
}
