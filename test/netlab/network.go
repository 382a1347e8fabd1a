// SPDX-License-Identifier: Apache-2.0

package netlab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/edge-tunnel/edge-tunnel/test/linkemu"
)

// Network is a switch: a bridge, in a namespace of its own or in that of the node whose pods it joins.
type Network struct {
	lab    *Lab
	ns     netns.NsHandle
	owned  bool // ns is closed with the network
	link   *netlink.Handle
	bridge netlink.Link
	v4, v6 netip.Prefix // the zero value leaves the family out
	used   int          // host numbers given away
}

// Network makes a switch with an IPv4 and an IPv6 prefix; a zero prefix leaves that family out.
func (l *Lab) Network(v4, v6 netip.Prefix) *Network {
	l.t.Helper()
	ns, err := newNetns()
	if err != nil {
		l.t.Fatalf("%v", err)
	}
	n, err := newNetwork(l, ns, "br0", v4, v6)
	if err != nil {
		l.t.Fatalf("make a network: %v", errors.Join(err, ns.Close()))
	}
	n.owned = true
	l.mu.Lock()
	l.networks = append(l.networks, n)
	l.mu.Unlock()
	return n
}

func newNetwork(l *Lab, ns netns.NsHandle, name string, v4, v6 netip.Prefix) (*Network, error) {
	link, err := netlink.NewHandleAt(ns)
	if err != nil {
		return nil, err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	bridge := &netlink.Bridge{LinkAttrs: attrs}
	if err := errors.Join(link.LinkAdd(bridge), link.LinkSetUp(bridge)); err != nil {
		link.Close()
		return nil, fmt.Errorf("add bridge %s: %w", name, err)
	}
	return &Network{lab: l, ns: ns, link: link, bridge: bridge, v4: v4, v6: v6}, nil
}

func (n *Network) close() error {
	n.link.Close()
	if n.owned {
		return n.ns.Close()
	}
	return nil
}

// next gives away the following host number, the same in both families.
func (n *Network) next() []netip.Prefix {
	n.used++
	var addrs []netip.Prefix
	for _, p := range []netip.Prefix{n.v4, n.v6} {
		if p.IsValid() {
			addrs = append(addrs, netip.PrefixFrom(nth(p.Addr(), n.used), p.Bits()))
		}
	}
	return addrs
}

// nth is the address n after base. Host numbers stay below 256 here.
func nth(base netip.Addr, n int) netip.Addr {
	for range n {
		base = base.Next()
	}
	return base
}

// join puts an interface of that name into the node, with the network's next addresses.
func (n *Network) join(node *Node, name string) ([]netip.Prefix, error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	attrs.Namespace = netlink.NsFd(node.ns)
	// The other end stays at the bridge; its name tells whose it is.
	peer := netlink.NewLinkAttrs()
	peer.Name = ifname(node.Name)
	for i := 1; ; i++ {
		if _, err := n.link.LinkByName(peer.Name); err != nil {
			break
		}
		peer.Name = ifname(fmt.Sprintf("%d%s", i, node.Name))
	}
	if err := n.link.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: peer.Name, PeerNamespace: netlink.NsFd(n.ns)}); err != nil {
		return nil, fmt.Errorf("add veth: %w", err)
	}
	end, err := n.link.LinkByName(peer.Name)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(n.link.LinkSetMaster(end, n.bridge), n.link.LinkSetUp(end)); err != nil {
		return nil, err
	}
	if node.port.network == nil {
		node.port = port{n, end}
	}
	link, err := node.link.LinkByName(name)
	if err != nil {
		return nil, err
	}
	if err := node.link.LinkSetUp(link); err != nil {
		return nil, err
	}
	addrs := n.next()
	for _, a := range addrs {
		if err := addAddr(node.link, link, a); err != nil {
			return nil, err
		}
	}
	return addrs, nil
}

// port is where a node's first interface is plugged in.
type port struct {
	network *Network
	end     netlink.Link
}

// Emulate puts an emulated link into the cable of the node's first interface: Up is what the node sends, Down what it receives.
// The node sees nothing of it, but for the time and the losses: of a [Site], the router is the node whose uplink this is.
// It begins as a wire and lives as long as the lab. Connections from before remember the shorter way (TCP's least round
// trip, by which it leaves slow start), so do it first if speed is to be measured.
func (n *Node) Emulate(s linkemu.Settings) *linkemu.Link {
	n.lab.t.Helper()
	if n.emulated != nil {
		n.lab.t.Fatalf("%s has an emulated link already", n.Name)
	}
	if err := n.emulate(s); err != nil {
		n.lab.t.Fatalf("emulate the link of %s: %v", n.Name, err)
	}
	return n.emulated
}

// emulate makes a second switch: node ── TAP ~ link ~ TAP ── network, all of it in the network's namespace.
func (n *Node) emulate(s linkemu.Settings) error {
	network := n.port.network
	name := strconv.Itoa(n.port.end.Attrs().Index)
	near, far := "near"+name, "far"+name
	t, err := newThread(func() (err error) {
		if err := netns.Set(network.ns); err != nil {
			return err
		}
		nearTAP, err := linkemu.OpenTAP(near)
		if err != nil {
			return err
		}
		farTAP, err := linkemu.OpenTAP(far)
		if err != nil {
			return errors.Join(err, nearTAP.Close())
		}
		n.emulated, err = linkemu.New(nearTAP, farTAP)
		return err
	})
	if err != nil {
		return err
	}
	t.close()
	if err := n.emulated.Set(s); err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "long" + name
	bridge := &netlink.Bridge{LinkAttrs: attrs}
	h := network.link
	if err := errors.Join(h.LinkAdd(bridge), h.LinkSetUp(bridge)); err != nil {
		return err
	}
	for tap, master := range map[string]netlink.Link{near: bridge, far: network.bridge} {
		link, err := h.LinkByName(tap)
		if err != nil {
			return err
		}
		// The queue is the emulator's: the device's own must never be the one that is full.
		if err := errors.Join(h.LinkSetTxQLen(link, 10000), h.LinkSetMaster(link, master), h.LinkSetUp(link)); err != nil {
			return err
		}
	}
	return h.LinkSetMaster(n.port.end, bridge)
}

// ifname shortens a name to what the kernel allows.
func ifname(name string) string {
	return name[:min(len(name), unix.IFNAMSIZ-1)]
}

func addAddr(h *netlink.Handle, link netlink.Link, a netip.Prefix) error {
	addr := &netlink.Addr{IPNet: ipNet(a)}
	if a.Addr().Is6() {
		addr.Flags = unix.IFA_F_NODAD // usable at once
	}
	if err := h.AddrAdd(link, addr); err != nil {
		return fmt.Errorf("add address %s to %s: %w", a, link.Attrs().Name, err)
	}
	return nil
}

func addDefaultRoute(h *netlink.Handle, via netip.Addr) error {
	bits := via.BitLen()
	zero := net.IPNet{IP: make(net.IP, bits/8), Mask: net.CIDRMask(0, bits)}
	if err := h.RouteAdd(&netlink.Route{Dst: &zero, Gw: via.AsSlice()}); err != nil {
		return fmt.Errorf("add default route via %s: %w", via, err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// sysctl writes a setting of the network namespace that the calling thread is in.
func sysctl(key, value string) error {
	return os.WriteFile(filepath.Join("/proc/sys/net", key), []byte(value), 0)
}
