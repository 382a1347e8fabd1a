// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/edge-tunnel/edge-tunnel/test/kubebed"
)

// bring makes an address of the machine's loopback reachable at an address of the host.
func (h *host) bring(t *testing.T, at, addr string) {
	t.Helper()
	ln, err := h.Listen(t.Context(), "tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	wg.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer conn.Close()
				out, err := net.Dial("tcp", addr)
				if err != nil {
					return
				}
				defer out.Close()
				defer context.AfterFunc(ctx, func() { out.Close() })()
				wg.Go(func() { _, _ = io.Copy(out, conn); out.Close() })
				_, _ = io.Copy(conn, out)
			})
		}
	})
	t.Cleanup(func() {
		cancel()
		ln.Close()
		wg.Wait()
	})
}

// cluster is a real API server, with a Node for each host.
type cluster struct {
	*kubebed.Server
	t *testing.T
}

func newCluster(t *testing.T, cloud *host) *cluster {
	t.Helper()
	c := &cluster{Server: kubebed.APIServer(t), t: t}
	at, err := url.Parse(c.URL)
	if err != nil {
		t.Fatal(err)
	}
	cloud.bring(t, at.Host, at.Host)
	c.Install()
	c.add(cloud, nil)
	return c
}

// add makes a Node with the host's addresses, and more.
func (c *cluster) add(h *host, labels map[string]string, more ...netip.Addr) {
	c.t.Helper()
	c.Create("/api/v1/nodes", kubebed.Object{"metadata": kubebed.Object{"name": h.Name, "labels": labels}})
	var addrs []kubebed.Object
	for _, a := range append(h.addrs(), more...) {
		addrs = append(addrs, kubebed.Object{"type": "InternalIP", "address": a.String()})
	}
	c.patch("/api/v1/nodes/"+h.Name+"/status", kubebed.Object{"status": kubebed.Object{"addresses": addrs}})
}

func (c *cluster) mode(h *host, mode string) {
	c.t.Helper()
	c.patch("/api/v1/nodes/"+h.Name, kubebed.Object{"metadata": kubebed.Object{"labels": kubebed.Object{"alibabacloud.com/interconnection-mode": mode}}})
}

func (c *cluster) patch(path string, object kubebed.Object) {
	c.t.Helper()
	if err := c.Do("PATCH", path, object, nil); err != nil {
		c.t.Fatal(err)
	}
}

// Node objects say what is intercepted: labels, addresses, and whether there is a Node at all. While the API server is away all goes on as
// before, also across a restart of the server.
func TestTargetsFromKubernetes(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := &oneSite{world: w, cloud: w.cloud("cloud-1"), home: w.site("home")}
	s.edge = s.home.edge("edge-1")
	addr, edge := s.edge.serve(10250, echo), s.edge.addrs()[0]
	c := newCluster(t, s.cloud)
	flags := []string{"--nodes-from", "kubernetes", "--node-name", "cloud-1", "--kubeconfig", c.ServiceAccount("kube-system", "tunnel-server")}
	s.server = s.cloud.startServer(flags...)
	s.server.waitMetric("edge_tunnel_cluster_complete", 1)

	// No Node, no tunnel; and what the agent's certificate says about addresses is nobody's business.
	s.agent = s.edge.launchAgent([]*host{s.cloud})
	s.server.waitLog("started")
	s.server.waitMetric("edge_tunnel_known_nodes", 0)
	c.add(s.edge, map[string]string{"alibabacloud.com/is-edge-worker": "true"})
	s.server.waitTarget(edge, "online")
	s.cloud.mustEcho(addr)

	// Another mode: reached directly, which here means nowhere.
	open := s.cloud.mustDial(addr)
	if err := exchange(open, "before"); err != nil {
		t.Fatal(err)
	}
	c.mode(s.edge, "private")
	waitReset(t, open, patience)
	if r := s.server.record(open.LocalAddr()); r.Reason != "mode_changed" {
		t.Errorf("record %+v, want mode_changed", r)
	}
	s.server.waitTarget(edge, "")
	before := s.server.metrics()[`edge_tunnel_bpf_total{verdict="missed"}`]
	if conn, err := s.cloud.dial(addr); err == nil {
		conn.Close()
		t.Error("a node that is not tunneled was reached")
	}
	if missed := s.server.metrics()[`edge_tunnel_bpf_total{verdict="missed"}`]; missed <= before {
		t.Error("the connect was not let go direct")
	}
	c.mode(s.edge, "normal")
	s.server.waitTarget(edge, "online")
	s.cloud.mustEcho(addr)

	c.Kill()
	s.cloud.mustEcho(addr)
	s.server.stop()
	s.server = s.cloud.startServer(flags...)
	s.server.waitTarget(edge, "online")
	s.cloud.mustEcho(addr)
	eventually(t, patience, func() error { // client-go tries again for a while before it says so
		status, err := s.server.client().Status(t.Context())
		if err != nil {
			return err
		}
		if c := status.Server.Cluster; c.Complete || c.Error == "" || c.Since.IsZero() {
			return fmt.Errorf("without an API server: %+v", c)
		}
		return nil
	})
	c.Start()
	s.server.waitMetric("edge_tunnel_cluster_complete", 1)
	s.cloud.mustEcho(addr)

	open = s.cloud.mustDial(addr)
	if err := c.Do("DELETE", "/api/v1/nodes/edge-1", nil, nil); err != nil {
		t.Fatal(err)
	}
	waitReset(t, open, patience)
	s.server.waitTarget(edge, "")
}

// Whoever claims the address at which the server reaches the API server does not cut it off: its own connections are not redirected.
func TestAPIServerAtAClaimedAddress(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	cloud, balancer := w.cloud("cloud-1"), w.cloud("cloud-2")
	edge := w.site("home").edge("edge-1")
	c := newCluster(t, cloud)
	at := netip.MustParseAddrPort(strings.TrimPrefix(c.URL, "https://"))
	claimed := netip.AddrPortFrom(balancer.addrs()[0], at.Port())
	balancer.bring(t, claimed.String(), at.String())
	config, err := os.ReadFile(c.ServiceAccount("kube-system", "tunnel-server"))
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "kubeconfig")
	there := strings.Replace(string(config), `"`+c.URL+`"`, fmt.Sprintf(`"https://%v", "tls-server-name": "%v"`, claimed, at.Addr()), 1)
	if err := os.WriteFile(file, []byte(there), 0o600); err != nil {
		t.Fatal(err)
	}
	c.add(edge, map[string]string{"openyurt.io/is-edge-worker": "true"}, claimed.Addr())
	server := cloud.startServer("--nodes-from", "kubernetes", "--node-name", "cloud-1", "--kubeconfig", file, "--tunneled-ports", fmt.Sprint(at.Port()))
	server.waitTarget(claimed.Addr(), "offline")
	c.Kill() // it has to connect anew, while everybody else's connections are refused
	c.Start()
	if conn, err := cloud.dial(claimed); err == nil {
		conn.Close()
		t.Error("the claimed address is not intercepted")
	}
	c.mode(edge, "improved")
	server.waitTarget(claimed.Addr(), "")
}
