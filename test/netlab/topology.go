// SPDX-License-Identifier: Apache-2.0

package netlab

import (
	"context"
	"errors"
	"net/netip"
	"strings"
)

// Cloud makes a cloud node. It has no default route, so that an address it does not know is unreachable at once.
func (l *Lab) Cloud(name string) *Node {
	l.t.Helper()
	n, err := l.newNode(name, nil, true)
	if err == nil {
		err = n.attach(l.cloud, "eth0")
	}
	if err != nil {
		l.t.Fatalf("make cloud node %s: %v", name, err)
	}
	l.mu.Lock()
	n.number = l.cloud.used
	l.mu.Unlock()
	return n
}

// Site is an edge site: a network that only its NAT router connects to the cloud.
type Site struct {
	Router  *Node // eth0 in the cloud's network, lan0 in the site's
	network *Network
	gateway []netip.Addr
}

// Site makes a site. Prefixes are the site's own, one for each family that it has; none means the next free
// 10.99.S.0/24 and fd99:0:0:S::/64, starting with S = 0. Two sites may have the same, as private addresses do.
func (l *Lab) Site(name string, prefixes ...netip.Prefix) *Site {
	l.t.Helper()
	l.mu.Lock()
	number := byte(l.sites)
	l.sites++
	l.mu.Unlock()
	if len(prefixes) == 0 {
		prefixes = []netip.Prefix{
			netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 99, number, 0}), 24),
			netip.PrefixFrom(netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x99, 7: number}), 64),
		}
	}
	var v4, v6 netip.Prefix
	for _, p := range prefixes {
		if p.Addr().Is4() {
			v4 = p
		} else {
			v6 = p
		}
	}
	s := &Site{network: l.Network(v4, v6)}
	if err := s.makeRouter(l, name+"-router"); err != nil {
		l.t.Fatalf("make the router of site %s: %v", name, err)
	}
	return s
}

func (s *Site) makeRouter(l *Lab, name string) (err error) {
	if s.Router, err = l.newNode(name, nil, false); err != nil {
		return err
	}
	if err := s.Router.attach(l.cloud, "eth0"); err != nil {
		return err
	}
	lan, err := s.network.join(s.Router, "lan0")
	if err != nil {
		return err
	}
	for _, p := range lan {
		s.gateway = append(s.gateway, p.Addr())
	}
	if err := s.Router.Do(forward); err != nil {
		return err
	}
	return s.Router.nft(nat)
}

// nat lets connections out and only their answers in.
const nat = `
table inet edge {
	chain out {
		type nat hook postrouting priority srcnat
		oifname "eth0" masquerade
	}
	chain through {
		type filter hook forward priority filter; policy drop
		ct state established,related accept
		iifname "lan0" oifname "eth0" accept
	}
}
`

func forward() error {
	return errors.Join(sysctl("ipv4/ip_forward", "1"), sysctl("ipv6/conf/all/forwarding", "1"))
}

// nft loads rules into the node.
func (n *Node) nft(rules string) error {
	cmd := n.Command(context.Background(), "nft", "-f", "-")
	cmd.Stdin = strings.NewReader(rules)
	_, err := cmd.output()
	return err
}

// Edge makes an edge node in the site, with a default route through the router.
func (s *Site) Edge(name string) *Node {
	l := s.network.lab
	l.t.Helper()
	n, err := l.newNode(name, nil, true)
	if err == nil {
		err = n.attach(s.network, "eth0")
	}
	for _, via := range s.gateway {
		if err == nil {
			err = addDefaultRoute(n.link, via)
		}
	}
	if err != nil {
		l.t.Fatalf("make edge node %s: %v", name, err)
	}
	return n
}

// Pod makes a pod on a node: a namespace behind a bridge (cni0) of the node, its default route through the node, and no
// address translation between the two. Its processes are in a cgroup below the node's.
func (n *Node) Pod(name string) *Node {
	l := n.lab
	l.t.Helper()
	pod, err := l.newNode(name, n, false)
	if err == nil && n.pods == nil {
		err = n.makePodNetwork()
	}
	if err == nil {
		err = pod.attach(n.pods, "eth0")
	}
	for _, p := range n.podGateways() {
		if err == nil {
			err = addDefaultRoute(pod.link, p)
		}
	}
	if err != nil {
		l.t.Fatalf("make pod %s on %s: %v", name, n.Name, err)
	}
	return pod
}

func (n *Node) makePodNetwork() error {
	var v4, v6 netip.Prefix
	if n.V4.IsValid() {
		v4 = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, byte(n.number), 0}), 24)
	}
	if n.V6.IsValid() {
		v6 = netip.PrefixFrom(netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x44, 7: byte(n.number)}), 64)
	}
	network, err := newNetwork(n.lab, n.ns, "cni0", v4, v6)
	if err != nil {
		return err
	}
	n.pods = network
	for _, a := range network.next() {
		if err := addAddr(n.link, network.bridge, a); err != nil {
			return err
		}
	}
	return n.Do(forward)
}

// podGateways are the node's own addresses in its pods' network.
func (n *Node) podGateways() []netip.Addr {
	var gateways []netip.Addr
	if n.pods == nil {
		return nil
	}
	for _, p := range []netip.Prefix{n.pods.v4, n.pods.v6} {
		if p.IsValid() {
			gateways = append(gateways, p.Addr().Next())
		}
	}
	return gateways
}
