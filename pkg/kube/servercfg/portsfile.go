// SPDX-License-Identifier: Apache-2.0

package servercfg

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
)

const (
	portsFileVersion = 1
	maxPortsFile     = 1 << 20 // bytes; all ports there are need 400 KB
)

// EncodePorts is the content of a file that keeps ports: {"version":1,"ports":[9100,9256]}.
func EncodePorts(list []uint16) ([]byte, error) {
	return json.Marshal(map[string]any{"version": portsFileVersion, "ports": append([]uint16{}, list...)})
}

// DecodePorts reads such a file. The ports are sorted, each is there once.
func DecodePorts(data []byte) ([]uint16, error) {
	if len(data) > maxPortsFile {
		return nil, fmt.Errorf("more than %d bytes", maxPortsFile)
	}
	var stored struct {
		Version int      `json:"version"`
		Ports   []uint16 `json:"ports"`
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	if err := dec.Decode(&stored); err != nil {
		return nil, err
	}
	if stored.Version != portsFileVersion {
		return nil, fmt.Errorf("version %d, this program reads %d", stored.Version, portsFileVersion)
	}
	if slices.Contains(stored.Ports, 0) {
		return nil, errors.New("0 is no port")
	}
	slices.Sort(stored.Ports)
	return slices.Compact(stored.Ports), nil
}
