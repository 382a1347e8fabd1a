// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"slices"
	"strings"
	"testing"
)

func TestPortsFile(t *testing.T) {
	dir := t.TempDir()
	f := newPortsFile(dir)
	if list, err := f.load(); err != nil || list != nil {
		t.Errorf("before the first save: %v, %v", list, err)
	}
	for _, list := range [][]uint16{{9100, 9256}, {9100}, {}} {
		must(t, f.save(list))
		if got, err := newPortsFile(dir).load(); err != nil || !slices.Equal(got, list) {
			t.Errorf("saved %v, loaded %v, %v", list, got, err)
		}
	}
	// What is the same is not written again; a disk that takes nothing leaves the old one in place.
	must(t, f.save([]uint16{9100}))
	must(t, os.Remove(f.path))
	must(t, f.save([]uint16{9100}))
	if _, err := os.Stat(f.path); err == nil {
		t.Error("written without need")
	}
	must(t, os.Mkdir(f.path+".new", 0o700))
	if err := f.save([]uint16{1}); err == nil {
		t.Error("no error")
	}
	if got := newPortsFile(""); got.save([]uint16{1}) != nil {
		t.Error("without a folder there is nothing to fail")
	}
	writeFile(t, f.path, `{"version":2,"ports":[1]}`, 0o600)
	if _, err := newPortsFile(dir).load(); err == nil || !strings.Contains(err.Error(), "version 2") {
		t.Errorf("another version: %v", err)
	}
}
