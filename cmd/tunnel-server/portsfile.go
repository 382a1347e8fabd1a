// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/edge-tunnel/edge-tunnel/pkg/kube/servercfg"
)

// portsFile keeps what the ConfigMap said across a reboot. An empty path keeps nothing.
type portsFile struct {
	path  string
	saved []uint16
}

func newPortsFile(stateDir string) *portsFile {
	if stateDir == "" {
		return &portsFile{}
	}
	return &portsFile{path: filepath.Join(stateDir, "ports.json")}
}

// load returns what was saved last, nothing if that was never.
func (f *portsFile) load() ([]uint16, error) {
	if f.path == "" {
		return nil, nil
	}
	data, err := os.ReadFile(f.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	list, err := servercfg.DecodePorts(data)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", f.path, err)
	}
	f.saved = list
	return list, nil
}

// save replaces the file: after a crash at any moment there is the old one or the new one, whole.
func (f *portsFile) save(list []uint16) error {
	if f.path == "" || f.saved != nil && slices.Equal(f.saved, list) {
		return nil
	}
	text, err := servercfg.EncodePorts(list)
	if err != nil {
		return err
	}
	temp := f.path + ".new"
	file, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = file.Write(append(text, '\n'))
	if err = errors.Join(err, file.Sync(), file.Close()); err == nil {
		err = os.Rename(temp, f.path)
	}
	if err != nil {
		_ = os.Remove(temp) // a full disk must not also keep half a file
		return err
	}
	f.saved = append([]uint16{}, list...)
	return nil
}
