// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/edge-tunnel/edge-tunnel/test/netlab"
)

// world is a lab with the programs and a CA. Worlds do not know each other: tests with one each may run in parallel.
type world struct {
	t   *testing.T
	lab *netlab.Lab
	bin string // folder of the programs
	pki string // folder of the CA and of all certificates

	hosts   []*host
	daemons []*daemon
	links   map[uint32]string // ids of BPF links that were seen, with their names
}

// newWorld makes an empty one.
func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, links: make(map[uint32]string)}
	t.Cleanup(w.checkLeaks) // after everything else: the first to be registered
	w.lab = netlab.New(t)
	t.Cleanup(w.checkDaemons) // while their logs exist
	bin, err := programs()
	if err != nil {
		t.Fatal(err)
	}
	w.bin = bin
	w.pki = filepath.Join(w.lab.Dir(), "pki")
	if err := os.MkdirAll(w.lab.Dir(), 0o755); err != nil {
		t.Fatal(err)
	}
	w.ctl("pki", "init", "--dir", w.pki)
	return w
}

// program is the path of one of ours.
func (w *world) program(name string) string { return filepath.Join(w.bin, name) }

// ctl runs tunnelctl outside of all nodes, for certificates, and returns its output; see also [host.ctl].
func (w *world) ctl(args ...string) string {
	w.t.Helper()
	cmd := exec.Command(w.program("tunnelctl"), args...)
	cmd.Env = append(os.Environ(), raceVariable)
	out, err := cmd.CombinedOutput()
	if err != nil {
		w.t.Fatalf("tunnelctl %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// host is a node with hands and, but for pods and routers, a certificate NAME.crt for all of its addresses.
type host struct {
	*netlab.Node
	w     *world
	t     *testing.T
	hands *hands
	cert  string   // name of its certificate; another one may be set before a daemon is started
	flags []string // for each daemon that is started here
}

func (w *world) newHost(node *netlab.Node) *host {
	h := &host{Node: node, w: w, t: w.t, cert: node.Name}
	h.hands = h.newHands()
	w.hosts = append(w.hosts, h)
	return h
}

// cloud makes a cloud node with a server's certificate. It has no route to any edge.
func (w *world) cloud(name string) *host {
	w.t.Helper()
	h := w.newHost(w.lab.Cloud(name))
	w.issueServer(name, h.addrs()...)
	return h
}

// pod makes a pod on a cloud node.
func (h *host) pod(name string) *host {
	h.t.Helper()
	return h.w.newHost(h.Pod(name))
}

// site is an edge site behind a NAT router.
type site struct {
	*netlab.Site
	w *world
}

// site makes one; prefixes as for [netlab.Lab.Site].
func (w *world) site(name string, prefixes ...netip.Prefix) *site {
	w.t.Helper()
	return &site{w.lab.Site(name, prefixes...), w}
}

// edge makes an edge node with an agent's certificate for its addresses.
func (s *site) edge(name string) *host {
	s.w.t.Helper()
	h := s.w.newHost(s.Edge(name))
	s.w.issueAgent(name, h.addrs()...)
	return h
}

// addrs are the node's own addresses, one for each family.
func (h *host) addrs() []netip.Addr {
	var list []netip.Addr
	for _, a := range []netip.Addr{h.V4, h.V6} {
		if a.IsValid() {
			list = append(list, a)
		}
	}
	return list
}

// at is the node's first address with a port.
func (h *host) at(port uint16) netip.AddrPort { return netip.AddrPortFrom(h.addrs()[0], port) }

// at6 is the node's IPv6 address with a port.
func (h *host) at6(port uint16) netip.AddrPort { return netip.AddrPortFrom(h.V6, port) }

// issueServer writes NAME.crt and NAME.key with a server's certificate.
func (w *world) issueServer(name string, hosts ...netip.Addr) {
	w.t.Helper()
	args := []string{"pki", "issue-server", "--dir", w.pki, "--name", name}
	for _, a := range hosts {
		args = append(args, "--host", a.String())
	}
	w.ctl(args...)
}

// issueAgent writes NODE.crt and NODE.key with an agent's certificate that claims the addresses, also if others do.
func (w *world) issueAgent(node string, addrs ...netip.Addr) {
	w.t.Helper()
	args := []string{"pki", "issue-agent", "--dir", w.pki, "--node", node, "--reissue"}
	for _, a := range addrs {
		args = append(args, "--ip", a.String())
	}
	w.ctl(args...)
}

// helper prepares one of the helpers as a process of the node.
func (h *host) helper(ctx context.Context, name string, args ...string) *netlab.Cmd {
	cmd := h.Helper(ctx, name, args...)
	cmd.Env = append(cmd.Env, raceVariable)
	return cmd
}

// mustRun runs a program on the node and returns what it wrote.
func (h *host) mustRun(name string, args ...string) string {
	h.t.Helper()
	out, err := h.Run(name, args...)
	if err != nil {
		h.t.Fatalf("on %s: %v", h.Name, err)
	}
	return out
}

// nft loads rules into a node (a router is one too); `delete table inet NAME` takes them away again.
func nft(t *testing.T, node *netlab.Node, rules string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	cmd := node.Command(ctx, "nft", "-f", "-")
	cmd.Stdin = strings.NewReader(rules)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("nft on %s: %v: %s", node.Name, err, out)
	}
}

// cut drops everything that the router would forward, silently: no end ever sees a FIN, an RST or an ICMP message. mend ends it.
func (s *site) cut() {
	s.w.t.Helper()
	nft(s.w.t, s.Router, "table inet cut { chain through { type filter hook forward priority -10; policy drop; }; }")
}

// mend undoes cut.
func (s *site) mend() {
	s.w.t.Helper()
	nft(s.w.t, s.Router, "delete table inet cut")
}

// eventually repeats a check until it succeeds. Its last error ends the test after the limit.
func eventually(t *testing.T, limit time.Duration, check func() error) {
	t.Helper()
	for deadline := time.Now().Add(limit); ; time.Sleep(10 * time.Millisecond) {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %v: %v", limit, err)
		}
	}
}

// oneSite is the usual world, with everything started.
type oneSite struct {
	*world
	cloud, edge *host
	home        *site
	server      *daemon
	agent       *daemon
}

// servicePort is tunneled by newSite, beside 10250 and 10255. Unlike these, it is not one of the agent's --localhost-proxy-ports.
const servicePort = 9100

// newSite makes a world with one cloud node, one edge node behind a router, and starts both daemons; flags are the server's.
func newSite(t *testing.T, flags ...string) *oneSite {
	t.Helper()
	return newWorld(t).startSite(flags...)
}

// startSite is newSite in a world that is there already.
func (w *world) startSite(flags ...string) *oneSite {
	w.t.Helper()
	s := &oneSite{world: w, cloud: w.cloud("cloud-1"), home: w.site("home")}
	s.edge = s.home.edge("edge-1")
	s.server = s.cloud.startServer(append([]string{"--tunneled-ports", fmt.Sprint(servicePort)}, flags...)...)
	s.agent = s.edge.startAgent([]*host{s.cloud})
	s.server.waitTarget(s.edge.addrs()[0], "online")
	return s
}
