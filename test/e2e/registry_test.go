// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"net/url"
	"testing"
)

// Servers in Kubernetes find each other by their Leases, without any list of peers, and reach each other's nodes, also those that have never
// logged in to them. A move while the API server is away is found as well.
func TestPeersFromKubernetes(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	clouds := []*host{w.cloud("cloud-1"), w.cloud("cloud-2")}
	edge := w.site("home").edge("edge-1")
	addr := edge.serve(10250, echo)
	c := newCluster(t, clouds[0])
	at, err := url.Parse(c.URL)
	if err != nil {
		t.Fatal(err)
	}
	clouds[1].bring(t, at.Host, at.Host)
	c.add(clouds[1], nil)
	c.add(edge, map[string]string{"alibabacloud.com/is-edge-worker": "true"})
	kubeconfig := c.ServiceAccount("kube-system", "tunnel-server")
	var servers []*daemon
	for _, h := range clouds {
		servers = append(servers, h.startServer("--nodes-from", "kubernetes", "--node-name", h.Name, "--kubeconfig", kubeconfig, "--lease-namespace", "edge-tunnel-leases"))
	}
	for _, d := range servers {
		d.waitMetric("edge_tunnel_registry_servers", 1)
		d.waitMetric("edge_tunnel_peers", 1)
	}
	everywhere := func() {
		t.Helper()
		for i, d := range servers {
			d.waitTarget(edge.V4, "online")
			clouds[i].mustEcho(addr)
		}
	}
	agent := edge.startAgent(clouds[:1])
	everywhere()
	servers[0].waitMetric("edge_tunnel_peer_streams_total", 1)
	servers[1].waitMetric("edge_tunnel_registry_nodes", 1)

	c.Kill()
	agent.stop()
	agent = edge.startAgent(clouds[1:])
	everywhere()
	servers[1].waitMetric("edge_tunnel_peer_streams_total", 1)
	c.Start()
	servers[0].waitMetric("edge_tunnel_registry_nodes", 1)
	servers[1].waitMetric("edge_tunnel_registry_nodes", 0)
	for _, d := range append(servers, agent) {
		d.waitIdle()
	}
}
