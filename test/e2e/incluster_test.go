// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/edge-tunnel/edge-tunnel/test/kubebed"
)

// Everything comes from Kubernetes, with the rights that the manifests give: certificates, targets, ports, and where the servers are, of which the load balancer
// is gone. Then the API server goes as well, and the controller: the programs start again from what they have on disk, and nobody notices.
func TestEverythingFromKubernetes(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	cloud, edge := w.cloud("cloud-1"), w.site("home").edge("edge-1")
	addr := edge.serve(10250, echo)
	c := newCluster(t, cloud)
	at, err := url.Parse(c.URL)
	if err != nil {
		t.Fatal(err)
	}
	edge.bring(t, at.Host, at.Host)
	c.add(edge, map[string]string{"alibabacloud.com/is-edge-worker": "true"})
	const service = "/api/v1/namespaces/kube-system/services/x-tunnel-server-svc"
	c.patch(service, kubebed.Object{"metadata": kubebed.Object{"annotations": kubebed.Object{"x-tunnel-server-external-addr": cloud.at(10262).String()}}})
	c.patch(service+"/status", kubebed.Object{"status": kubebed.Object{"loadBalancer": kubebed.Object{"ingress": []kubebed.Object{{"ip": "203.0.113.7"}}}}})

	controller := cloud.launch("tunnel-controller", []string{"--kubeconfig", c.ServiceAccount("kube-system", "tunnel-controller"),
		"--lease-namespace", "edge-tunnel-leases"})
	ca := filepath.Join(w.pki, "cluster-ca.crt")
	eventually(t, time.Minute, func() error { // as a kubelet does with a ConfigMap that a pod has as a volume
		var trust struct{ Data map[string]string }
		if err := c.Do(http.MethodGet, "/api/v1/namespaces/kube-system/configmaps/edge-tunnel-ca", nil, &trust); err != nil {
			return err
		}
		if trust.Data["ca.crt"] == "" {
			return errors.New("no CA is published")
		}
		return os.WriteFile(ca, []byte(trust.Data["ca.crt"]), 0o644) //nolint:gosec // certificates
	})
	accounts := map[string]string{
		"tunnel-server": c.PodToken("kube-system", "tunnel-server", cloud.Name), "tunnel-agent": c.PodToken("kube-system", "tunnel-agent", edge.Name),
	}
	start := func(h *host, program string, flags ...string) *daemon {
		t.Helper()
		return h.launch(program, append([]string{"--certificate-from", "kubernetes", "--ca-cert", ca, "--kubeconfig", accounts[program], "--node-name", h.Name,
			"--certificate-dir", h.Path("kept"), "--state-dir", h.Path("state"), "--log-format", "json", "--log-level", "debug"}, flags...))
	}
	for _, h := range []*host{cloud, edge} {
		if err := os.MkdirAll(h.Path("state"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	run := func() (server, agent *daemon) {
		t.Helper()
		server = start(cloud, "tunnel-server", "--nodes-from", "kubernetes", "--lease-namespace", "edge-tunnel-leases", "--cgroup-root", cloud.Cgroup())
		agent = start(edge, "tunnel-agent")
		server.waitReady()
		agent.waitReady()
		server.waitTarget(edge.V4, "online")
		cloud.mustEcho(addr)
		return server, agent
	}
	server, agent := run()
	server.waitMetric("edge_tunnel_cluster_complete", 1)
	agent.waitMetric("edge_tunnel_agent_lookup_addresses", 2)

	controller.stop()
	c.Kill()
	cloud.mustEcho(addr)
	agent.stop()
	server.stop()
	server, agent = run()
	server.waitMetric("edge_tunnel_cluster_complete", 0)
	agent.waitMetric("edge_tunnel_agent_certificates_issued_total", 0)
	status, err := agent.client().Status(t.Context())
	if err != nil || !status.Agent.Lookup.Stored {
		t.Errorf("%+v, %v", status, err)
	}
	c.Start()
	server.waitMetric("edge_tunnel_cluster_complete", 1)
	eventually(t, time.Minute, func() error {
		if status, err := agent.client().Status(t.Context()); err != nil || status.Agent.Lookup.Stored || status.Agent.Lookup.Error != "" {
			return errors.Join(err, errors.New("the agent has not heard from the API server"))
		}
		return nil
	})
	cloud.mustEcho(addr)
}
