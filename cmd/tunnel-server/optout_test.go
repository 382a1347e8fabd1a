// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"testing/synctest"
)

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	info, err := os.Stat(path)
	must(t, err)
	return info.Sys().(*syscall.Stat_t).Ino
}

func TestOptOut(t *testing.T) {
	root := t.TempDir()
	a, b := filepath.Join(root, "a"), filepath.Join(root, "deep", "b")
	must(t, os.MkdirAll(a, 0o755))
	writeFile(t, filepath.Join(root, "file"), "", 0o644)
	var sets [][]uint64
	var refuses error
	o := &optOut{root: root, folders: []string{"a", "/deep/b", "file"}, log: silent, set: func(ids []uint64) error {
		if refuses != nil {
			return refuses
		}
		sets = append(sets, ids)
		return nil
	}}
	want := func(what string, n int, ids ...uint64) {
		t.Helper()
		if len(sets) != n || n > 0 && !slices.Equal(sets[n-1], ids) {
			t.Errorf("%s: the kernel was told %v, want %d lists and %v", what, sets, n, ids)
		}
	}
	must(t, o.apply())
	want("one is there", 1, inode(t, a))
	must(t, o.apply())
	want("nothing new", 1, inode(t, a))
	must(t, os.MkdirAll(b, 0o755))
	refuses = errors.New("no")
	if err := o.apply(); !errors.Is(err, refuses) {
		t.Errorf("%v", err)
	}
	refuses = nil
	must(t, o.apply())
	want("one has come, and was refused once", 2, inode(t, a), inode(t, b))
	must(t, os.Remove(a))
	must(t, o.apply())
	want("one is gone", 3, inode(t, b))
}

// Without the flag, the list of a predecessor that had it is cleared, once.
func TestOptOutClears(t *testing.T) {
	calls := 0
	o := &optOut{root: t.TempDir(), log: silent, set: func(ids []uint64) error {
		calls++
		if ids == nil || len(ids) != 0 {
			t.Errorf("%v", ids)
		}
		return nil
	}}
	must(t, o.apply())
	must(t, o.apply())
	if calls != 1 {
		t.Errorf("%d calls", calls)
	}
	must(t, o.run(t.Context())) // ends at once: there is nothing to follow
}

func TestOptOutFollows(t *testing.T) {
	root := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		found := 0
		o := &optOut{root: root, folders: []string{"a"}, log: silent, set: func(ids []uint64) error { found = len(ids); return nil }}
		must(t, o.apply())
		must(t, os.Mkdir(filepath.Join(root, "a"), 0o755))
		ctx, cancel := context.WithTimeout(t.Context(), 2*optOutInterval)
		defer cancel()
		must(t, o.run(ctx))
		if found != 1 {
			t.Errorf("%d found", found)
		}
	})
}
