// SPDX-License-Identifier: Apache-2.0

package kubebed

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
)

// PrometheusPod is the pod that StartPrometheus makes in the default namespace; its API is on port 9090.
const PrometheusPod = "prometheus"

// ExporterPort is where each node has a node-exporter.
const ExporterPort = "9100"

// prometheusConfig asks each node at its address. Debian's Prometheus cannot find nodes by itself: it is built without client-go.
func (c *Cluster) prometheusConfig() string {
	targets := func(port string) string {
		var list []string
		for _, n := range c.Nodes() {
			list = append(list, fmt.Sprintf("%q", n.V4.String()+":"+port))
		}
		return "[" + strings.Join(list, ", ") + "]"
	}
	kubelet := `
  scheme: https
  tls_config: {ca_file: /etc/prometheus/kubelets.crt}
  authorization: {credentials_file: /var/run/secrets/kubernetes.io/serviceaccount/token}
  static_configs: [{targets: ` + targets("10250") + `}]
`
	return `
global: {scrape_interval: 3s, scrape_timeout: 3s}
scrape_configs:
- job_name: kubelet` + kubelet + `
- job_name: cadvisor
  metrics_path: /metrics/cadvisor` + kubelet + `
- job_name: node
  static_configs: [{targets: ` + targets(ExporterPort) + `}]
`
}

const prometheusRights = `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: prometheus}
rules:
- {apiGroups: [""], resources: [nodes/metrics], verbs: [get]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: prometheus}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: prometheus}
subjects: [{kind: ServiceAccount, name: default, namespace: default}]
`

// StartPrometheus starts Prometheus in a pod on the second cloud node.
func (c *Cluster) StartPrometheus() error {
	const name = "edge-tunnel.test/prometheus:v1"
	files, err := c.withLibraries("prometheus")
	if err != nil {
		return err
	}
	archive := c.node.Path("prometheus.tar")
	if err := (&image{name: name, files: files, command: []string{"/bin/prometheus"}}).write(archive); err != nil {
		return err
	}
	at := c.Cloud[1]
	if err := at.importImage(archive); err != nil {
		return err
	}
	ca, err := os.ReadFile(c.CA())
	if err != nil {
		return err
	}
	config, err := json.Marshal(Object{
		"apiVersion": "v1", "kind": "ConfigMap", "metadata": Object{"name": PrometheusPod, "namespace": "default"},
		"data": Object{"prometheus.yml": c.prometheusConfig(), "kubelets.crt": string(ca)},
	})
	if err != nil {
		return err
	}
	c.Apply(prometheusRights + "---\n" + string(config))
	c.Create("/api/v1/namespaces/default/pods", Object{
		"metadata": Object{"name": PrometheusPod},
		"spec": Object{
			"nodeName": at.Name, "terminationGracePeriodSeconds": 1,
			"volumes": []Object{{"name": "config", "configMap": Object{"name": PrometheusPod}}, {"name": "data", "emptyDir": Object{}}},
			"containers": []Object{{
				"name": "main", "image": name, "imagePullPolicy": "Never",
				"args":         []string{"--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/data"},
				"volumeMounts": []Object{{"name": "config", "mountPath": "/etc/prometheus"}, {"name": "data", "mountPath": "/data"}},
			}},
		},
	})
	return nil
}

// withLibraries has a program, at /bin, and what its loader needs: path in an image to file here.
func (c *Cluster) withLibraries(name string) (map[string]string, error) {
	program, err := c.program(name)
	if err != nil {
		return nil, err
	}
	files := map[string]string{"/bin/" + name: program}
	needs, err := c.node.Run("ldd", program)
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(needs) {
		for _, word := range strings.Fields(line) {
			if !strings.HasPrefix(word, "/") {
				continue
			}
			if files[word], err = c.copyOut(word); err != nil {
				return nil, fmt.Errorf("library of %s: %w", name, err)
			}
		}
	}
	return files, nil
}
