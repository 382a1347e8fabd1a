// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// What another program reads must be what was written. The kernel's own reader is tried by every run of vmtest.
func TestArchive(t *testing.T) {
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Skip("busybox, which reads the archive, is missing: make deps")
	}
	var b bytes.Buffer
	a := newArchive(&b)
	files := map[string][]byte{}
	for size := range 9 { // every padding of names and contents
		name := "/deep/er/" + "abcdefghi"[:size+1]
		files[name] = bytes.Repeat([]byte{'x'}, size)
		a.file(name, 0o755, files[name])
	}
	a.folder("/empty")
	a.folder("/empty")
	a.symlink("/link", "deep/er/a")
	if err := a.close(); err != nil {
		t.Fatal(err)
	}

	dir := t.TempDir()
	cmd := exec.Command(busybox, "cpio", "-i", "-d")
	cmd.Dir, cmd.Stdin = dir, &b
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("cpio: %v\n%s", err, out)
	}
	for name, want := range files {
		got, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %q (%v), want %q", name, got, err, want)
		}
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode() != 0o755 {
			t.Errorf("%s: %v (%v)", name, info.Mode(), err)
		}
	}
	if info, err := os.Stat(filepath.Join(dir, "empty")); err != nil || !info.IsDir() {
		t.Errorf("empty folder: %v", err)
	}
	if target, err := os.Readlink(filepath.Join(dir, "link")); target != "deep/er/a" {
		t.Errorf("link to %q (%v)", target, err)
	}
}

func TestArchiveErrors(t *testing.T) {
	a := newArchive(io.Discard)
	a.file("relative", 0o644, nil)
	if a.close() == nil {
		t.Error("a relative name was written")
	}
	a = newArchive(full{})
	a.file("/big", 0o644, make([]byte, 2<<20))
	if err := a.close(); !errors.Is(err, errFull) {
		t.Errorf("a full disk: %v", err)
	}
}

var errFull = errors.New("disk full")

type full struct{}

func (full) Write([]byte) (int, error) { return 0, errFull }
