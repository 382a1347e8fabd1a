// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Debian moved the modules from /lib to /usr/lib between 12 and 13.
func TestArrange(t *testing.T) {
	for _, lib := range []string{"lib", "usr/lib"} {
		root, folder := t.TempDir(), filepath.Join(t.TempDir(), "kernel")
		for _, name := range []string{"boot/vmlinuz-6", "boot/config-6", lib + "/modules/6/kernel/a.ko"} {
			write(t, filepath.Join(root, name))
		}
		if err := arrange(root, folder); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"vmlinuz", "config", "modules/kernel/a.ko"} {
			if _, err := os.Stat(filepath.Join(folder, name)); err != nil {
				t.Error(err)
			}
		}
	}
	if err := arrange(t.TempDir(), filepath.Join(t.TempDir(), "kernel")); err == nil || !strings.Contains(err.Error(), "0 files boot/vmlinuz-*") {
		t.Errorf("an empty package: %v", err)
	}
}

func write(t *testing.T, name string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte("content"), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestFetchKernelRefusesUnknown(t *testing.T) {
	_, err := fetchKernel(context.Background(), t.Output(), t.TempDir(), "2.4")
	if err == nil || !strings.Contains(err.Error(), "hint: ") {
		t.Errorf("%v", err)
	}
}

// A module that cannot be read is an error, one that does not exist is not: it may be built into the kernel.
func TestModules(t *testing.T) {
	folder := t.TempDir()
	write(t, filepath.Join(folder, "net/bad-one.ko"))
	got, err := modules(context.Background(), folder, "busybox", "veth")
	if len(got) != 0 || err != nil {
		t.Errorf("absent: %v (%v)", got, err)
	}
	if _, err := modules(context.Background(), folder, "busybox", "bad_one"); err == nil {
		t.Error("a file that is no module was taken")
	}
}

func TestQuote(t *testing.T) {
	if got, want := quote([]string{"a b", "it's"}), `'a b' 'it'\''s'`; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}
