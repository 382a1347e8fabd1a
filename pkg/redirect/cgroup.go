// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// cgroup is an open folder of the cgroup2 hierarchy.
type cgroup struct {
	*os.File
	id uint64
}

// rootID is the id of the root of the cgroup2 hierarchy, on every kernel.
const rootID = 1

// openCgroup opens the folder to attach to, by default the mount of cgroup2. In a container with a cgroup namespace of its own what is mounted
// may begin at the container's cgroup: programs there would see the container alone, and so would the canary. Only who names such
// a folder gets it.
func openCgroup(path string) (*cgroup, error) {
	named := path != ""
	if !named {
		mounts, err := os.Open("/proc/self/mountinfo")
		if err != nil {
			return nil, explain("find the cgroup2 mount", err)
		}
		path, err = findCgroup2(mounts)
		_ = mounts.Close()
		if err != nil {
			return nil, fail("find the cgroup2 mount", err, "mount it (mount -t cgroup2 none /sys/fs/cgroup/unified), or name the folder with --cgroup-root")
		}
	}
	op := "use the cgroup " + path
	dir, err := os.Open(path)
	if err != nil {
		return nil, fail(op, err, "--cgroup-root has to be a folder of the cgroup2 hierarchy")
	}
	var stat unix.Statfs_t
	var ino unix.Stat_t
	err = errors.Join(unix.Fstatfs(int(dir.Fd()), &stat), unix.Fstat(int(dir.Fd()), &ino))
	if err == nil && stat.Type != unix.CGROUP2_SUPER_MAGIC {
		err = errors.New("not a folder of the cgroup2 hierarchy")
	}
	if err != nil {
		_ = dir.Close()
		return nil, fail(op, err, "on systems with cgroup v1 the cgroup2 hierarchy is at /sys/fs/cgroup/unified")
	}
	group := &cgroup{File: dir, id: ino.Ino} // the inode number is the kernel's cgroup id
	if !named && group.id != rootID {
		_ = dir.Close()
		return nil, fail(op, errors.New("it is a part of the cgroup2 hierarchy, not its root: the rest of the node would go direct"),
			"run in the host's cgroup namespace, or mount the host's hierarchy and name it with --cgroup-root; --cgroup-root "+path+" takes this part")
	}
	return group, nil
}

// findCgroup2 reads a mountinfo file. On hybrid systems cgroup2 is not at /sys/fs/cgroup, so the type decides, not the path.
// Of several mounts the one whose root is the hierarchy's root is preferred.
func findCgroup2(mountinfo io.Reader) (string, error) {
	var second string
	lines := bufio.NewScanner(mountinfo)
	for lines.Scan() {
		// 30 23 0:26 / /sys/fs/cgroup/unified rw,nosuid - cgroup2 cgroup2 rw
		before, after, ok := strings.Cut(lines.Text(), " - ")
		fields := strings.Fields(before)
		if !ok || len(fields) < 5 || !strings.HasPrefix(after, "cgroup2 ") {
			continue
		}
		path := unescape(fields[4])
		if fields[3] == "/" {
			return path, nil
		}
		if second == "" {
			second = path
		}
	}
	if err := lines.Err(); err != nil {
		return "", fmt.Errorf("read mountinfo: %w", err)
	}
	if second == "" {
		return "", errors.New("no cgroup2 filesystem is mounted")
	}
	return second, nil
}

// unescape resolves the octal escapes that mountinfo has for blanks and backslashes.
func unescape(path string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(path)
}
