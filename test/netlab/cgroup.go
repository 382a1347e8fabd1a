// SPDX-License-Identifier: Apache-2.0

package netlab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// findCgroup2 finds the mount by its type: on hybrid systems it is not /sys/fs/cgroup.
func findCgroup2() (string, error) {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 2 && f[2] == "cgroup2" {
			return f[1], nil
		}
	}
	return "", errors.New("no cgroup2 hierarchy is mounted: mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified")
}

// findCgroup1 finds where the hierarchies of cgroup v1 are mounted; on a system with cgroup2 alone there are none.
func findCgroup1() ([]string, error) {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return nil, err
	}
	var roots []string
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 2 && f[2] == "cgroup" {
			roots = append(roots, f[1])
		}
	}
	return roots, nil
}

// makeCgroup1 makes a folder of that name in every hierarchy of cgroup v1.
func makeCgroup1(name string) error {
	roots, err := findCgroup1()
	for _, root := range roots {
		dir := filepath.Join(root, name)
		err = errors.Join(err, os.MkdirAll(dir, 0o755))
		// A new folder of this controller is empty, and nothing can be put into it until it has these.
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
			if value, readErr := os.ReadFile(filepath.Join(root, file)); readErr == nil {
				err = errors.Join(err, os.WriteFile(filepath.Join(dir, file), value, 0))
			}
		}
	}
	return err
}

// removeCgroup1 removes what makeCgroup1 made, when the processes are dead.
func removeCgroup1(pattern string) error {
	roots, err := findCgroup1()
	for _, root := range roots {
		dirs, _ := filepath.Glob(filepath.Join(root, pattern)) // the pattern is ours
		for _, dir := range dirs {
			err = errors.Join(err, removeTree(dir))
		}
	}
	return err
}

// removeCgroup kills every process below the folder and removes it with its children.
func removeCgroup(dir string) error {
	if err := os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0); err != nil {
		if errors.Is(err, fs.ErrNotExist) && !exists(dir) {
			return nil
		}
		return fmt.Errorf("kill %s: %w", dir, err)
	}
	return removeTree(dir)
}

// removeTree removes a folder whose processes are dead.
func removeTree(dir string) error {
	var dirs []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return err
	})
	if err != nil {
		return err
	}
	slices.Reverse(dirs) // children first
	for _, d := range dirs {
		if err := RemoveCgroup(d); err != nil {
			return err
		}
	}
	return nil
}

// RemoveCgroup removes a folder whose processes have left or were killed. It waits for the threads that are just ending: the kernel
// leaves them where they are when their process moves.
func RemoveCgroup(dir string) error {
	deadline := time.Now().Add(10 * time.Second)
	for {
		err := unix.Rmdir(dir)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return fmt.Errorf("remove %s: %w", dir, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
