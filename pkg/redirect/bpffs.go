// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// pins knows where things are pinned. Below the folder of a layout version, because another version of the maps may have to stand
// beside it during an upgrade.
//
//	<bpffs>/edge-tunnel             locked by the process that owns the state
//	<bpffs>/edge-tunnel/v1/maps     one pin for each map
//	<bpffs>/edge-tunnel/v1/links    one pin for each hook
//	<bpffs>/edge-tunnel/v1/staging  what is about to be renamed into place
type pins struct {
	bpffs string
}

func (p pins) root() string              { return filepath.Join(p.bpffs, "edge-tunnel") }
func (p pins) version() string           { return filepath.Join(p.root(), "v1") }
func (p pins) maps() string              { return filepath.Join(p.version(), "maps") }
func (p pins) links() string             { return filepath.Join(p.version(), "links") }
func (p pins) staging() string           { return filepath.Join(p.version(), "staging") }
func (p pins) mapPin(name string) string { return filepath.Join(p.maps(), name) }
func (p pins) linkPin(h string) string   { return filepath.Join(p.links(), h) }

// check makes sure that there is a bpf filesystem.
func (p pins) check() error {
	var stat unix.Statfs_t
	op := "use " + p.bpffs
	if err := unix.Statfs(p.bpffs, &stat); err != nil {
		return fail(op, err, "mount a bpf filesystem there: mkdir -p "+p.bpffs+" && mount -t bpf bpf "+p.bpffs)
	}
	if stat.Type != unix.BPF_FS_MAGIC {
		return fail(op, errors.New("not a bpf filesystem"), "mount one there: mount -t bpf bpf "+p.bpffs+" (in a container: mount the host's)")
	}
	return nil
}

// MountBPFFS mounts a bpf filesystem at a folder, unless there is one; done tells whether there was none. In a container the folder has to
// be the host's, and what is mounted there has to reach the host (mountPropagation: Bidirectional): pins in a filesystem of the container's own would
// end with it.
func MountBPFFS(dir string) (done bool, err error) {
	p := pins{bpffs: dir}
	if p.check() == nil {
		return false, nil
	}
	if err := unix.Mount("bpf", dir, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC|unix.MS_RELATIME, "mode=0700"); err != nil {
		return false, fail("mount a bpf filesystem at "+dir, err, "it takes CAP_SYS_ADMIN, a folder that exists, and a kernel with CONFIG_BPF_SYSCALL")
	}
	return true, nil
}

// make creates the folders that are not there.
func (p pins) make() error {
	for _, dir := range []string{p.maps(), p.links(), p.staging()} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return explain("make the pin folders", err)
		}
	}
	return nil
}

// tidy removes the folders if nothing is pinned in them. Called with the lock held.
func (p pins) tidy() error {
	for _, dir := range []string{p.maps(), p.links(), p.staging(), p.version(), p.root()} {
		err := unix.Rmdir(dir)
		switch {
		case errors.Is(err, unix.ENOTEMPTY):
			return nil
		case err != nil && !errors.Is(err, fs.ErrNotExist):
			return explain("remove "+dir, err)
		}
	}
	return nil
}

// noLinks tells whether no link is pinned, alive or dead.
func (p pins) noLinks() bool {
	for _, h := range hooks() {
		if _, err := os.Lstat(p.linkPin(h.name)); !errors.Is(err, fs.ErrNotExist) {
			return false
		}
	}
	return true
}

// clearStaging removes what a process left behind that died halfway. Links there were attached but never in force officially.
func (p pins) clearStaging() error {
	left, err := os.ReadDir(p.staging())
	if err != nil {
		return explain("read the staging folder", err)
	}
	for _, entry := range left {
		if err := os.Remove(filepath.Join(p.staging(), entry.Name())); err != nil {
			return explain("clear the staging folder", err)
		}
	}
	return nil
}

// pinner is a map or a link.
type pinner interface{ Pin(path string) error }

// replace pins an object at a path, in the place of what is there, so that at no moment nothing is there.
func (p pins) replace(object pinner, path string) error {
	staged := filepath.Join(p.staging(), filepath.Base(path))
	if err := object.Pin(staged); err != nil {
		return explain("pin "+path, err)
	}
	if err := os.Rename(staged, path); err != nil {
		return errors.Join(explain("pin "+path, err), os.Remove(staged))
	}
	return nil
}

// lockPoll is how soon a successor notices that its predecessor is gone.
const lockPoll = 50 * time.Millisecond

// lock waits until this process is the only one that owns the pinned state. waiting is called once if it has to wait.
// The lock lives as long as the file, which the caller closes; a process that dies gives it up.
func (p pins) lock(ctx context.Context, waiting func()) (*os.File, error) {
	for {
		if err := os.MkdirAll(p.root(), 0o700); err != nil {
			return nil, explain("make the pin folder", err)
		}
		dir, err := p.tryLock()
		if err == nil {
			return dir, nil
		}
		if errors.Is(err, fs.ErrNotExist) {
			continue // it was removed just now
		}
		if !errors.Is(err, ErrInUse) {
			return nil, err
		}
		if waiting != nil {
			waiting()
			waiting = nil
		}
		select {
		case <-ctx.Done():
			return nil, fail("lock "+p.root(), fmt.Errorf("%w: %w", ErrInUse, context.Cause(ctx)), "another tunnel-server runs on this node; stop it first")
		case <-time.After(lockPoll):
		}
	}
}

// tryLock takes the lock or fails with ErrInUse.
func (p pins) tryLock() (*os.File, error) {
	dir, err := os.Open(p.root())
	if err != nil {
		return nil, explain("lock the pin folder", err)
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = dir.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, ErrInUse
		}
		return nil, explain("lock "+p.root(), err)
	}
	// Its owner may have removed the folder between the two calls; then this lock excludes nobody.
	mine, err := dir.Stat()
	if err == nil {
		var there os.FileInfo
		if there, err = os.Stat(p.root()); err == nil && os.SameFile(mine, there) {
			return dir, nil
		}
	}
	_ = dir.Close()
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		return nil, ErrInUse
	}
	return nil, explain("lock "+p.root(), err)
}
