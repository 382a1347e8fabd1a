// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"errors"
	"maps"
	"slices"

	"github.com/cilium/ebpf"
)

// SetPorts makes the list the whole set of tunneled ports. Open connections are left alone.
func (k *Kernel) SetPorts(list []uint16) error {
	want := make(map[uint16]struct{}, len(list))
	for _, port := range list {
		if port == 0 {
			return errors.New("port 0 cannot be tunneled")
		}
		want[port] = struct{}{}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	m := k.maps[kernelMapPorts]
	for port := range k.ports {
		if _, keep := want[port]; keep {
			continue
		}
		if err := m.Delete(kernelPortKey{Port: port}); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return explain("remove a tunneled port", err)
		}
		delete(k.ports, port)
	}
	for port := range want {
		if _, there := k.ports[port]; there {
			continue
		}
		if err := m.Put(kernelPortKey{Port: port}, kernelPortValue{Tunneled: 1}); err != nil {
			return explain("add a tunneled port", err)
		}
		k.ports[port] = struct{}{}
	}
	return nil
}

// TunneledPorts returns what is in force, sorted.
func (k *Kernel) TunneledPorts() []uint16 {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Sorted(maps.Keys(k.ports))
}

func readPorts(m *ebpf.Map) ([]uint16, error) {
	var list []uint16
	var key kernelPortKey
	var value kernelPortValue
	entries := m.Iterate()
	for entries.Next(&key, &value) {
		list = append(list, key.Port)
	}
	if err := entries.Err(); err != nil {
		return nil, explain("read the port map", err)
	}
	slices.Sort(list)
	return list, nil
}
