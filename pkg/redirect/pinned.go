// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"errors"
	"io/fs"
	"net/netip"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// Pinned is what is in force in the kernel, as read without the daemon.
type Pinned struct {
	Targets      []Target // sorted by address
	Ports        []uint16 // tunneled, sorted
	RedirectPort uint16   // the first of eight
	NodeAddrs    []netip.Addr
	HostOnly     bool
	Counters     Counters
	Detached     []string // hooks whose program does not run (any more); all of them before the first start is complete
}

// ReadPinned reads the pinned maps below a bpf filesystem (empty: /sys/fs/bpf), whether a daemon runs or not, and changes nothing.
// Its error wraps [ErrNotInstalled] if there is nothing.
func ReadPinned(bpffs string) (*Pinned, error) {
	p := pins{Options{BPFFS: bpffs}.withDefaults().BPFFS}
	if err := p.check(); err != nil {
		return nil, err
	}
	maps := mapSet{}
	defer func() { closeAll(maps) }()
	spec, err := loadKernel()
	if err != nil {
		return nil, fail("read the embedded programs", err, "")
	}
	for _, name := range []string{kernelMapConfig, kernelMapCounters, kernelMapPorts, kernelMapTargets, kernelMapTargetNodes} {
		m, err := ebpf.LoadPinnedMap(p.mapPin(name), &ebpf.LoadPinOptions{ReadOnly: true})
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fail("read "+p.version(), ErrNotInstalled, "start a tunnel-server on this node, or name its bpf filesystem with --bpffs")
		}
		if err != nil {
			return nil, explain("open the pinned map "+name, err)
		}
		maps[name] = m
		if m.ValueSize() != spec.Maps[name].ValueSize || m.KeySize() != spec.Maps[name].KeySize {
			return nil, otherVersion(name)
		}
	}
	var layout uint16
	if err := spec.Variables[kernelVarLayout].Get(&layout); err != nil {
		return nil, fail("read the embedded layout", err, "")
	}
	var cfg kernelConfig
	if err := maps[kernelMapConfig].Lookup(uint32(0), &cfg); err != nil {
		return nil, explain("read the config map", err)
	}
	if cfg.Layout != layout {
		return nil, otherVersion(kernelMapConfig)
	}

	out := &Pinned{RedirectPort: cfg.RedirectPort, HostOnly: cfg.HostOnly != 0}
	for _, b := range [][16]byte{cfg.Pod4, cfg.Pod6} {
		if addr := from16(b); addr.IsValid() {
			out.NodeAddrs = append(out.NodeAddrs, addr)
		}
	}
	if out.Targets, err = readTargets(maps[kernelMapTargets], maps[kernelMapTargetNodes]); err != nil {
		return nil, err
	}
	if out.Ports, err = readPorts(maps[kernelMapPorts]); err != nil {
		return nil, err
	}
	if out.Counters, err = readCounters(maps[kernelMapCounters]); err != nil {
		return nil, err
	}
	for _, h := range hooks() {
		if !p.linkAlive(h.name) {
			out.Detached = append(out.Detached, h.name)
		}
	}
	return out, nil
}

func otherVersion(name string) error {
	return fail("read the pinned map "+name, errors.New("it has the layout of another version"), "use the tunnelctl of the tunnel-server's version")
}

func (p pins) linkAlive(name string) bool {
	l, err := link.LoadPinnedLink(p.linkPin(name), nil)
	if err != nil {
		return false
	}
	defer func() { _ = l.Close() }()
	on, err := cgroupOf(l)
	return err == nil && on != 0
}
