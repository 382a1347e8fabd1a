// SPDX-License-Identifier: Apache-2.0

package kubebed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/edge-tunnel/edge-tunnel/test/netlab"
)

// Cluster is a whole Kubernetes: two cloud nodes, the first of which has the control plane, and two edge nodes in networks of their own
// behind NAT routers. Nothing in the cloud has a route to an edge.
type Cluster struct {
	*Server
	Lab   *netlab.Lab
	Cloud []*Node
	Edge  []*Node

	tools string // see Runtime
}

// Service addresses.
const (
	services = "10.96.0.0/16"
	dnsAddr  = "10.96.0.10"
)

// New starts a cluster and waits until its nodes are ready and pods may be made. Flags are further ones for kube-apiserver.
func New(t netlab.T, flags ...string) *Cluster {
	t.Helper()
	tools, err := Runtime(context.Background(), io.Discard)
	if err != nil {
		t.Fatalf("get containerd: %v", err)
	}
	c := &Cluster{Lab: netlab.New(t), tools: tools}
	for i := range 2 {
		c.Cloud = append(c.Cloud, c.newNode(c.Lab.Cloud(fmt.Sprintf("cloud-%d", i+1)), nil, i+1))
	}
	for i, name := range []string{"home", "office"} {
		site := c.Lab.Site(name)
		c.Edge = append(c.Edge, c.newNode(site.Edge(fmt.Sprintf("edge-%d", i+1)), site, 10+i+1))
	}
	master := c.Cloud[0]
	master.prepare(t)
	c.Server = newServer(t, master.Node, netip.AddrPortFrom(master.V4, 6443), append([]string{
		"--kubelet-preferred-address-types=InternalIP", "--enable-aggregator-routing",
	}, flags...))
	if err := c.start(); err != nil {
		t.Fatalf("start the cluster: %v", err)
	}
	return c
}

// Nodes are all of them.
func (c *Cluster) Nodes() []*Node { return append(append([]*Node(nil), c.Cloud...), c.Edge...) }

func (c *Cluster) start() error {
	if err := c.startControllers(); err != nil {
		return err
	}
	images, err := c.buildImages()
	if err != nil {
		return err
	}
	for _, n := range c.Nodes()[1:] {
		n.prepare(c.t)
	}
	if err := c.routePods(); err != nil {
		return err
	}
	var starts errgroup.Group
	for _, n := range c.Nodes() {
		n.images = images
		starts.Go(n.start)
	}
	if err := starts.Wait(); err != nil {
		return err
	}
	return c.waitNodes()
}

func (c *Cluster) startControllers() error {
	for _, user := range []string{"kube-controller-manager", "kube-scheduler", "kube-proxy"} {
		if err := c.writeKubeconfig(user, "system:"+user); err != nil {
			return err
		}
	}
	auth := func(user string) []string {
		config := c.pki.path(user + ".conf")
		return []string{"--kubeconfig=" + config, "--authentication-kubeconfig=" + config, "--authorization-kubeconfig=" + config, "--leader-elect=false"}
	}
	_, err := c.launch("kube-controller-manager", append(auth("kube-controller-manager"),
		"--use-service-account-credentials", "--service-account-private-key-file=pki/accounts.key", "--root-ca-file=pki/ca.crt",
		"--cluster-signing-cert-file=pki/ca.crt", "--cluster-signing-key-file=pki/ca.key",
		// A node that is off shall be noticed while a test waits.
		"--node-monitor-grace-period=20s", "--node-monitor-period=2s")...)
	if err != nil {
		return err
	}
	_, err = c.launch("kube-scheduler", auth("kube-scheduler")...)
	return err
}

// routePods lets the cloud nodes' pods reach each other, as a routed pod network does, and their hosts ask for Services: kube-proxy translates what
// has a route, and these nodes have no default one.
func (c *Cluster) routePods() error {
	var errs []error
	for _, from := range c.Cloud {
		_, err := from.Run("ip", "route", "add", services, "dev", "eth0")
		errs = append(errs, err)
		for _, to := range c.Cloud {
			if from != to {
				_, err := from.Run("ip", "route", "add", to.pods.String(), "via", to.V4.String())
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// waitNodes waits until every node is Ready and the ServiceAccount of pods that name none exists.
func (c *Cluster) waitNodes() error {
	var last error
	for deadline := time.Now().Add(startPatience); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		if last = c.nodesReady(); last == nil {
			return nil
		}
		for _, n := range c.Nodes() {
			for _, p := range []*netlab.Process{n.kubelet, n.containerd, n.proxy} {
				select {
				case <-p.Exited():
					return fmt.Errorf("a program of %s ended:\n%s", n.Name, p.Log())
				default:
				}
			}
		}
	}
	return last
}

func (c *Cluster) nodesReady() error {
	if err := c.Do(http.MethodGet, "/api/v1/namespaces/default/serviceaccounts/default", nil, nil); err != nil {
		return err
	}
	for _, n := range c.Nodes() {
		if err := c.nodeReady(n.Name); err != nil {
			return err
		}
	}
	return nil
}

func (c *Cluster) nodeReady(name string) error {
	var node struct {
		Status struct {
			Conditions []struct{ Type, Status, Message string }
		}
	}
	if err := c.Do(http.MethodGet, "/api/v1/nodes/"+name, nil, &node); err != nil {
		return err
	}
	for _, condition := range node.Status.Conditions {
		if condition.Type == "Ready" && condition.Status == "True" {
			return nil
		}
	}
	return fmt.Errorf("node %s is not ready: %v", name, node.Status.Conditions)
}

// StartDNS starts a CoreDNS on the first cloud node behind the Service address that pods ask. Blocks are further ones of its zone ".".
func (c *Cluster) StartDNS(blocks ...string) error {
	master := c.Cloud[0]
	corefile := fmt.Sprintf(".:53 {\nbind %s\nerrors\nready %s:8181\nkubernetes cluster.local in-addr.arpa {\nkubeconfig %s\n}\n%s\n}\n",
		master.V4, master.V4, c.Admin(), strings.Join(blocks, "\n"))
	if err := master.writeFile("Corefile", corefile); err != nil {
		return err
	}
	if _, err := c.launch("coredns", "-conf", "Corefile"); err != nil {
		return err
	}
	ports := []Object{{"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "dns-tcp", "port": 53, "protocol": "TCP"}}
	return c.exposeProcess("kube-dns", dnsAddr, ports, ports, master)
}

// StartMetricsServer starts a metrics-server on the second cloud node, for "kubectl top", which has an answer some 15 seconds later.
func (c *Cluster) StartMetricsServer() error {
	at := c.Cloud[1]
	cert := "metrics-server"
	if err := c.pki.issue(c.pki.ca, cert, "admin", []string{"system:masters"}, nil, nil); err != nil {
		return err
	}
	cmd := at.Command(context.Background(), c.Program("metrics-server"), "--kubeconfig="+c.Admin(),
		"--authentication-kubeconfig="+c.Admin(), "--authorization-kubeconfig="+c.Admin(),
		"--bind-address="+at.V4.String(), "--secure-port=4443", "--cert-dir="+at.Path("metrics-server"),
		"--metric-resolution=10s", "--kubelet-request-timeout=5s", "--kubelet-preferred-address-types=InternalIP",
		"--kubelet-certificate-authority="+c.CA(), "--kubelet-client-certificate="+c.pki.path(cert+".crt"), "--kubelet-client-key="+c.pki.path(cert+".key"))
	if _, err := at.StartCmd(cmd); err != nil {
		return err
	}
	if err := c.exposeProcess("metrics-server", "", []Object{{"name": "https", "port": 443, "targetPort": 4443}},
		[]Object{{"name": "https", "port": 4443}}, at); err != nil {
		return err
	}
	return c.Do(http.MethodPost, "/apis/apiregistration.k8s.io/v1/apiservices", Object{"metadata": Object{"name": "v1beta1.metrics.k8s.io"},
		"spec": Object{"service": Object{"name": "metrics-server", "namespace": "kube-system"}, "group": "metrics.k8s.io", "version": "v1beta1",
			"insecureSkipTLSVerify": true, "groupPriorityMinimum": 100, "versionPriority": 100}}, nil)
}

// exposeProcess puts a Service in kube-system before a process on a node.
func (c *Cluster) exposeProcess(name, addr string, service, slice []Object, at *Node) error {
	spec := Object{"ports": service}
	if addr != "" {
		spec["clusterIP"] = addr
	}
	return errors.Join(
		c.Do(http.MethodPost, "/api/v1/namespaces/kube-system/services", Object{"metadata": Object{"name": name}, "spec": spec}, nil),
		c.Do(http.MethodPost, "/apis/discovery.k8s.io/v1/namespaces/kube-system/endpointslices", Object{
			"metadata":    Object{"name": name + "-process", "labels": Object{"kubernetes.io/service-name": name}},
			"addressType": "IPv4", "ports": slice,
			"endpoints": []Object{{"addresses": []string{at.V4.String()}, "conditions": Object{"ready": true}}},
		}, nil))
}
