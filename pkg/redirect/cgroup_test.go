// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// foundCgroup is what openCgroup says.
type foundCgroup struct {
	ID        uint64
	Err, Hint string
}

func find(path string) (found foundCgroup) {
	group, err := openCgroup(path)
	var hinted interface{ Hint() string }
	if errors.As(err, &hinted) {
		return foundCgroup{Err: err.Error(), Hint: hinted.Hint()}
	}
	defer func() { _ = group.Close() }()
	return foundCgroup{ID: group.id}
}

// findPrivateCgroup looks for the cgroup to attach to as a container's process does: first with the host's mount in sight, then, as
// most containers have it, with one of its own; last, that one is named.
func findPrivateCgroup(out *json.Encoder) error {
	mounts, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	path, err := findCgroup2(mounts)
	if err := errors.Join(err, mounts.Close()); err != nil {
		return err
	}
	found := []foundCgroup{find("")}
	if err := errors.Join(unix.Unmount(path, unix.MNT_DETACH), unix.Mount("none", path, "cgroup2", 0, "")); err != nil {
		return err
	}
	return out.Encode(append(found, find(""), find(path)))
}

// TestPrivateCgroupNamespace: the root of the mount is then not the hierarchy's.
func TestPrivateCgroupNamespace(t *testing.T) {
	l := newLab(t)
	group, err := openCgroup(l.cgroup)
	must(t, err)
	defer func() { _ = group.Close() }()
	self, err := os.Executable()
	must(t, err)
	cmd := exec.CommandContext(t.Context(), self)
	cmd.Env = append(os.Environ(), roleVariable+"=find cgroup")
	cmd.Stderr = os.Stderr
	// It is in the lab's cgroup, as this process is.
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWCGROUP | syscall.CLONE_NEWNS}
	text, err := cmd.Output()
	must(t, err)
	var found []foundCgroup
	must(t, json.Unmarshal(text, &found))
	if len(found) != 3 {
		t.Fatalf("%s", text)
	}
	if found[0].ID != rootID {
		t.Errorf("with the host's mount: %+v", found[0])
	}
	if !strings.Contains(found[1].Err, "not its root") || !strings.Contains(found[1].Hint, "the host's cgroup namespace") {
		t.Errorf("with a mount of its own: %+v, want an error with a hint", found[1])
	}
	if found[2].ID != group.id {
		t.Errorf("with its own mount, named: %+v, want %d", found[2], group.id)
	}
}
