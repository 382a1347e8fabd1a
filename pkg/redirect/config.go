// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// maxOptOuts is the size of the map.
const maxOptOuts = 4096

// initConfig puts the options into the configuration, for Attach.
func (k *Kernel) initConfig() error {
	layout, err := k.layout()
	if err != nil {
		return err
	}
	netns, err := hostNetns(k.opts)
	if err != nil {
		return err
	}
	if netns != 0 {
		k.config.HostNetns = netns
	} else {
		k.learn = true // at Attach; until then what a predecessor learnt is in force
	}
	k.netns.Store(k.config.HostNetns)
	k.config.Layout = layout
	k.config.RedirectPort = k.opts.RedirectPort
	k.config.HostOnly = flag(k.opts.HostOnly)
	k.config.OptOuts = flag(len(k.optOuts) > 0)
	k.config.Moving = 0
	k.config.Host4, k.config.Host6 = [16]byte{}, [16]byte{}
	for _, addr := range loopbacks() {
		if addr.Is4() {
			k.config.Host4 = to16(addr)
		} else {
			k.config.Host6 = to16(addr)
		}
	}
	return nil
}

func flag(on bool) uint8 {
	if on {
		return 1
	}
	return 0
}

// writeConfig publishes k.config, from Attach on.
func (k *Kernel) writeConfig() error {
	if !k.inForce {
		return nil
	}
	return k.putConfig(&k.config)
}

// putConfig writes the map. The lock flag makes the programs see an address change at once.
func (k *Kernel) putConfig(config *kernelConfig) error {
	if err := k.maps[kernelMapConfig].Update(uint32(0), config, ebpf.UpdateLock); err != nil {
		return explain("write the config map", err)
	}
	return nil
}

// SetNodeAddrs sets the addresses at which the network namespaces of pods reach this node; an invalid Addr stands for a family
// that the node has no address of. There have to be listeners on them (see [Kernel.Listen]) before this is called. Before Attach it is noted only.
func (k *Kernel) SetNodeAddrs(v4, v6 netip.Addr) error {
	if v4.IsValid() && (!v4.Is4() || checkAddr(v4) != nil || v4.IsLoopback()) {
		return fmt.Errorf("%s is not an IPv4 address that pods can reach", v4)
	}
	if v6.IsValid() && (v6.Is4() || checkAddr(v6) != nil || v6.IsLoopback()) {
		return fmt.Errorf("%s is not an IPv6 address that pods can reach", v6)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.config.Pod4, k.config.Pod6 = to16(v4), to16(v6)
	return k.writeConfig()
}

// NodeAddrs returns what is set; right after Open that is what the predecessor left.
func (k *Kernel) NodeAddrs() (v4, v6 netip.Addr) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return from16(k.config.Pod4), from16(k.config.Pod6)
}

// HostAddrs returns the loopback addresses to which connections of the host's namespace are redirected: one for each family that the
// host has. There have to be listeners on each.
func (k *Kernel) HostAddrs() []netip.Addr {
	k.mu.Lock()
	defer k.mu.Unlock()
	var addrs []netip.Addr
	for _, b := range [][16]byte{k.config.Host4, k.config.Host6} {
		if addr := from16(b); addr.IsValid() {
			addrs = append(addrs, addr)
		}
	}
	return addrs
}

// RedirectPorts returns the eight ports on which there have to be listeners.
func (k *Kernel) RedirectPorts() []uint16 {
	var all []uint16
	for i := range uint16(Ports) {
		all = append(all, k.opts.RedirectPort+i)
	}
	return all
}

// SetOptOut sets the cgroups (ids of the cgroup2 hierarchy) whose processes, and those of all cgroups below, are left alone.
func (k *Kernel) SetOptOut(cgroups []uint64) error {
	want := map[uint64]struct{}{}
	for _, id := range cgroups {
		want[id] = struct{}{}
	}
	if len(want) > maxOptOuts {
		return fmt.Errorf("%d cgroups are opted out, there is room for %d", len(want), maxOptOuts)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	m := k.maps[kernelMapOptOuts]
	for id := range k.optOuts {
		if _, keep := want[id]; keep {
			continue
		}
		if err := m.Delete(kernelCgroupKey{Cgroup: id}); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return explain("opt a cgroup in", err)
		}
		delete(k.optOuts, id)
	}
	for id := range want {
		if err := m.Put(kernelCgroupKey{Cgroup: id}, kernelCgroupValue{OptedOut: 1}); err != nil {
			return explain("opt a cgroup out", err)
		}
		k.optOuts[id] = struct{}{}
	}
	k.config.OptOuts = flag(len(want) > 0)
	return k.writeConfig()
}

// soNetnsCookie is SO_NETNS_COOKIE, Linux 5.14.
const soNetnsCookie = 71

// hostNetns returns the cookie of this thread's network namespace, or 0 if the kernel cannot tell.
func hostNetns(opts Options) (uint64, error) {
	if opts.noNetnsCookie {
		return 0, nil
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, explain("open a socket", err)
	}
	defer func() { _ = unix.Close(fd) }()
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, soNetnsCookie)
	if errors.Is(err, unix.ENOPROTOOPT) {
		return 0, nil
	}
	if err != nil {
		return 0, explain("ask for the network namespace's cookie", err)
	}
	return cookie, nil
}

// learnNetns finds the cookie where the kernel does not tell it: connect() of a socket with a BYPASS record leaves it in the record.
// The connection itself goes nowhere: TCP refuses to broadcast, after the hook. The port has to be one that the hook looks at.
func (k *Kernel) learnNetns() (uint64, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return 0, explain("open a socket", err)
	}
	defer func() { _ = unix.Close(fd) }()
	if err := k.mark(fd, kernelSockRecord{Kind: kernelSockKindSOCK_BYPASS}); err != nil {
		return 0, err
	}
	_ = unix.Connect(fd, &unix.SockaddrInet4{Addr: [4]byte{255, 255, 255, 255}, Port: int(k.opts.RedirectPort)})
	rec, err := k.record(fd)
	if err != nil {
		return 0, err
	}
	if rec.Origin.Netns == 0 {
		return 0, fail("learn the network namespace's cookie", errors.New("the hook on connect() did not run"),
			"the daemon has to run in a cgroup below the one that the programs are attached to")
	}
	return rec.Origin.Netns, nil
}

// loopbacks are the loopback addresses that this thread's network namespace has: IPv6 can be disabled.
func loopbacks() []netip.Addr {
	var have []netip.Addr
	if canBind(unix.AF_INET, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}) {
		have = append(have, netip.AddrFrom4([4]byte{127, 0, 0, 1}))
	}
	if canBind(unix.AF_INET6, &unix.SockaddrInet6{Addr: netip.IPv6Loopback().As16()}) {
		have = append(have, netip.IPv6Loopback())
	}
	return have
}

func canBind(family int, addr unix.Sockaddr) bool {
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer func() { _ = unix.Close(fd) }()
	return unix.Bind(fd, addr) == nil
}
