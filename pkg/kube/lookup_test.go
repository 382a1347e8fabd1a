// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/edge-tunnel/edge-tunnel/test/kubebed"
)

func TestPortOfService(t *testing.T) {
	https := corev1.ServicePort{Name: "https", Port: 10263, TargetPort: intstr.FromInt32(10263)}
	for _, c := range []struct {
		ports []corev1.ServicePort
		want  int32
	}{
		{[]corev1.ServicePort{https, {Name: "x", Port: 10262, NodePort: 31008}}, 10262},
		{[]corev1.ServicePort{https, {Name: "x", Port: 443, TargetPort: intstr.FromInt32(10262)}}, 443},
		{[]corev1.ServicePort{https, {Name: "tcp", Port: 443}}, 443},
		{[]corev1.ServicePort{{Name: "x", Port: 443}}, 443},
		{[]corev1.ServicePort{https, {Name: "x", Port: 443}}, 0},
		{nil, 0},
	} {
		got, err := portOf(&corev1.Service{Spec: corev1.ServiceSpec{Ports: c.ports}})
		if got.Port != c.want || (err == nil) != (c.want != 0) {
			t.Errorf("%+v: %d, %v; want %d", c.ports, got.Port, err, c.want)
		}
	}
}

func TestAddrsOfService(t *testing.T) {
	for _, c := range []struct {
		ingress    []corev1.LoadBalancerIngress
		annotation string
		want       []string
		bad        bool
	}{
		{nil, "", nil, false},
		{[]corev1.LoadBalancerIngress{{IP: "203.0.113.7"}, {Hostname: "LB.example.org"}, {IP: "2001:db8::7"}}, "", []string{"203.0.113.7:443", "lb.example.org:443", "[2001:db8::7]:443"}, false},
		{[]corev1.LoadBalancerIngress{{IP: "203.0.113.7"}}, " tunnel.example.org:10262 ", []string{"203.0.113.7:443", "tunnel.example.org:10262"}, false},
		{[]corev1.LoadBalancerIngress{{IP: "203.0.113.7"}}, "203.0.113.7", []string{"203.0.113.7:443"}, false},
		{[]corev1.LoadBalancerIngress{{IP: "127.0.0.1"}, {Hostname: "not a name"}}, "tunnel.example.org", []string{"tunnel.example.org:443"}, false},
		{[]corev1.LoadBalancerIngress{{IP: "203.0.113.7"}}, "https://tunnel.example.org", []string{"203.0.113.7:443"}, true},
	} {
		service := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{AnnotationExternalAddr: c.annotation}}}
		service.Status.LoadBalancer.Ingress = c.ingress
		got, err := addrsOf(service, 443)
		if !slices.Equal(got, c.want) || (err != nil) != c.bad {
			t.Errorf("%v, %q: %v, %v; want %v", c.ingress, c.annotation, got, err, c.want)
		}
	}
}

// lookupRights are what an agent needs to find servers, as the documentation of Lookup says; %s is what it may do with Services, EndpointSlices, Nodes.
const lookupRights = `{"apiVersion": "v1", "kind": "List", "items": [
	{"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": "find", "namespace": "kube-system"}, "rules": [
		{"apiGroups": [""], "resources": ["services"], "resourceNames": ["x-tunnel-server-svc"], "verbs": [%s]},
		{"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": [%s]}]},
	{"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": {"name": "find", "namespace": "kube-system"},
		"roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "find"},
		"subjects": [{"kind": "ServiceAccount", "namespace": "kube-system", "name": "agent"}]},
	{"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "find"}, "rules": [
		{"apiGroups": [""], "resources": ["nodes"], "verbs": [%s]}]},
	{"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "find"},
		"roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "find"},
		"subjects": [{"kind": "ServiceAccount", "namespace": "kube-system", "name": "agent"}]}]}`

// Servers are found with the rights that are named and no more, followed as they move, and found on disk when nobody can be asked.
func TestServers(t *testing.T) {
	s := kubebed.APIServer(t)
	const services, endpoints = "/api/v1/namespaces/kube-system/services", "/apis/discovery.k8s.io/v1/namespaces/kube-system/endpointslices"
	const service = services + "/x-tunnel-server-svc"
	patch := func(path string, o kubebed.Object) {
		t.Helper()
		must(t, s.Do("PATCH", path, o, nil))
	}
	allow := func(services, endpoints, nodes string) {
		t.Helper()
		s.Apply(fmt.Sprintf(lookupRights, services, endpoints, nodes))
	}
	s.Create("/api/v1/nodes", kubebed.Object{"metadata": kubebed.Object{"name": "cloud-1"}})
	patch("/api/v1/nodes/cloud-1/status", kubebed.Object{"status": kubebed.Object{"addresses": []kubebed.Object{
		{"type": "InternalIP", "address": "10.0.0.1"}, {"type": "Hostname", "address": "cloud-1"}, {"type": "ExternalIP", "address": "198.51.100.1"}}}})

	config, dir := s.ServiceAccount("kube-system", "agent"), t.TempDir()
	var told atomic.Int64
	look := func() *Lookup {
		t.Helper()
		client, err := NewClient(ClientOptions{Kubeconfig: config})
		must(t, err)
		f := NewLookup(LookupConfig{Client: client, Namespace: "kube-system", Service: "x-tunnel-server-svc", Dir: dir, Agent: "edge-1", Changed: func() { told.Add(1) }})
		f.soon, f.later, f.reread = 10*time.Millisecond, 10*time.Millisecond, time.Second
		ctx, stop := context.WithCancel(context.Background())
		done := make(chan error)
		go func() { done <- f.Run(ctx) }()
		t.Cleanup(func() {
			stop()
			must(t, <-done)
		})
		return f
	}
	var f *Lookup
	says := func(what string) {
		t.Helper()
		eventually(t, what, func() bool {
			stats := f.Stats()
			return strings.Contains(fmt.Sprint(stats.Err, stats.Problems), what)
		})
	}
	well := func() {
		t.Helper()
		eventually(t, "all is well", func() bool {
			stats := f.Stats()
			return stats.Err == nil && len(stats.Problems) == 0 && !stats.Stored && stats.Disk == ""
		})
	}
	want := func(ways ...string) {
		t.Helper()
		eventually(t, fmt.Sprint(ways), func() bool { return slices.Equal(f.Known().Ways(), ways) })
	}

	f = look()
	says(`cannot list resource "services"`)
	allow(`"list"`, `"none"`, `"none"`)
	says(`cannot watch resource "services"`)
	allow(`"list", "watch"`, `"none"`, `"none"`)
	says("there is no Service kube-system/x-tunnel-server-svc")
	s.Create(services, kubebed.Object{"metadata": kubebed.Object{"name": "x-tunnel-server-svc"}, "spec": kubebed.Object{"type": "NodePort", "clusterIP": "10.96.0.77",
		"ports": []kubebed.Object{{"name": "https", "port": 10263}, {"name": "tcp", "port": 10262, "nodePort": 31008}}}})
	says(`cannot list resource "endpointslices"`)
	patch(service, kubebed.Object{"metadata": kubebed.Object{"annotations": kubebed.Object{AnnotationExternalAddr: "https://tunnel.example.org"}}})
	says("annotation x-tunnel-server-external-addr")
	patch(service, kubebed.Object{"metadata": kubebed.Object{"annotations": kubebed.Object{AnnotationExternalAddr: "tunnel.example.org:443"}}})
	want("tunnel.example.org:443")
	allow(`"list", "watch"`, `"list"`, `"none"`)
	says(`cannot watch resource "endpointslices"`)
	allow(`"list", "watch"`, `"list", "watch"`, `"none"`)
	// As the controller manager makes it for pods on the host's network. A server that is not ready is none, and neither is a pod on no node.
	s.Create(endpoints, kubebed.Object{"metadata": kubebed.Object{"name": "x-tunnel-server-svc-1", "labels": kubebed.Object{"kubernetes.io/service-name": "x-tunnel-server-svc"}},
		"addressType": "IPv4", "ports": []kubebed.Object{{"name": "tcp", "port": 10262}}, "endpoints": []kubebed.Object{
			{"addresses": []string{"10.0.0.1"}, "nodeName": "cloud-1", "conditions": kubebed.Object{"ready": true}},
			{"addresses": []string{"10.0.0.2"}, "nodeName": "cloud-2", "conditions": kubebed.Object{"ready": false}},
			{"addresses": []string{"10.0.0.3"}}}})
	says(`cannot get resource "nodes"`)
	want("tunnel.example.org:443", "10.0.0.1:31008")
	allow(`"list", "watch"`, `"list", "watch"`, `"get"`)
	want("tunnel.example.org:443", "198.51.100.1:31008", "10.0.0.1:31008")
	well()
	if name := f.Known().Name("198.51.100.1:31008"); name != "10.96.0.77" {
		t.Errorf("asked for %s at a node", name)
	}

	// A load balancer comes, and moves.
	patch(service, kubebed.Object{"spec": kubebed.Object{"type": "LoadBalancer"}})
	ingress := func(ip string) {
		t.Helper()
		patch(service+"/status", kubebed.Object{"status": kubebed.Object{"loadBalancer": kubebed.Object{"ingress": []kubebed.Object{{"ip": ip}}}}})
	}
	ingress("203.0.113.7")
	all := []string{"203.0.113.7:10262", "tunnel.example.org:443", "198.51.100.1:31008", "10.0.0.1:31008"}
	want(all...)
	ingress("203.0.113.8")
	all[0] = "203.0.113.8:10262"
	want(all...)

	// Nobody can be asked: what is on disk counts, at once. Another Service's addresses would not.
	s.Kill()
	first := f
	f = look()
	if ways := f.Known().Ways(); !slices.Equal(ways, all) || !f.Stats().Stored {
		t.Errorf("from disk: %v, %+v", ways, f.Stats())
	}
	eventually(t, "it says what is wrong", func() bool { return f.Stats().Err != nil && !f.Stats().Since.IsZero() && first.Stats().Err != nil })
	other := NewLookup(LookupConfig{Client: f.c.Client, Namespace: "kube-system", Service: "other", Dir: dir, Changed: func() {}})
	if ways := other.Known().Ways(); len(ways) > 0 {
		t.Errorf("another Service is at %v", ways)
	}
	told.Store(0)
	s.Start()
	well()
	if told.Load() != 0 {
		t.Error("the same was told again")
	}

	// Whoever empties the Service, deletes it or all endpoints does not take the servers away.
	patch(endpoints+"/x-tunnel-server-svc-1", kubebed.Object{"endpoints": []kubebed.Object{}})
	must(t, s.Do("DELETE", service, nil, nil))
	says("there is no Service")
	want(all...)

	// Without a node port, servers are dialed where they listen, if that is on the node's network. And a disk that cannot be written is no reason not to.
	must(t, os.RemoveAll(dir))
	must(t, os.WriteFile(dir, nil, 0o600))
	s.Create(services, kubebed.Object{"metadata": kubebed.Object{"name": "x-tunnel-server-svc"}, "spec": kubebed.Object{
		"ports": []kubebed.Object{{"name": "tcp", "port": 443, "targetPort": 10262}}, "clusterIP": "10.96.0.78"}})
	says("has neither a load balancer")
	want(all...)
	patch(endpoints+"/x-tunnel-server-svc-1", kubebed.Object{"endpoints": []kubebed.Object{
		{"addresses": []string{"10.0.0.1"}, "nodeName": "cloud-1"}, {"addresses": []string{"10.244.0.7"}, "nodeName": "cloud-1"}}})
	want("198.51.100.1:10262", "10.0.0.1:10262")
	eventually(t, "the disk is reported", func() bool { return f.Stats().Disk != "" })
	must(t, os.Remove(dir))
	must(t, os.Mkdir(dir, 0o700))
	patch(service, kubebed.Object{"metadata": kubebed.Object{"annotations": kubebed.Object{AnnotationExternalAddr: "tunnel.example.org"}}})
	want("tunnel.example.org:443", "198.51.100.1:10262", "10.0.0.1:10262")
	well()
	if left, err := filepath.Glob(filepath.Join(dir, "*")); err != nil || !slices.Equal(left, []string{ServersFile(dir)}) {
		t.Errorf("%v, %v", left, err)
	}

	// A file that is not understood is as none.
	must(t, os.WriteFile(ServersFile(dir), []byte("{"), 0o600))
	if ways := NewLookup(f.c).Known().Ways(); len(ways) > 0 {
		t.Errorf("half a file gives %v", ways)
	}
}

// Each agent knows some of many nodes, not the same ones, and the same each time.
func TestServersSpread(t *testing.T) {
	seen := make(map[string]int)
	for agent := range 50 {
		var first []readyServer
		for range 2 {
			s := NewLookup(LookupConfig{Client: noClient(t), Namespace: "a", Service: "b", Dir: t.TempDir(), Agent: fmt.Sprint("edge-", agent)})
			s.slices.objects = many(100)
			got := s.ready(corev1.ServicePort{Name: "tcp", NodePort: 31008})
			if len(got) != maxServerNodes {
				t.Fatalf("%d nodes", len(got))
			}
			if first != nil && !slices.EqualFunc(first, got, func(a, b readyServer) bool { return a.node == b.node }) {
				t.Errorf("%v, then %v", first, got)
			}
			first = got
		}
		for _, server := range first {
			seen[server.node]++
		}
	}
	if len(seen) < 90 {
		t.Errorf("50 agents know %d of 100 nodes", len(seen))
	}
}

func noClient(t *testing.T) Client {
	t.Helper()
	file := filepath.Join(t.TempDir(), "config")
	must(t, os.WriteFile(file, []byte(`{"apiVersion": "v1", "kind": "Config", "current-context": "a", "clusters": [{"name": "a", "cluster": {"server": "http://127.0.0.1:1"}}],
		"contexts": [{"name": "a", "context": {"cluster": "a", "user": "a"}}], "users": [{"name": "a", "user": {}}]}`), 0o600))
	client, err := NewClient(ClientOptions{Kubeconfig: file})
	must(t, err)
	return client
}

func many(n int) map[string]*discoveryv1.EndpointSlice {
	name, port := "tcp", int32(10262)
	slice := &discoveryv1.EndpointSlice{Ports: []discoveryv1.EndpointPort{{Name: &name, Port: &port}}}
	for i := range n {
		node := fmt.Sprint("cloud-", i)
		slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{NodeName: &node, Addresses: []string{fmt.Sprintf("10.0.0.%d", i+1)}})
	}
	return map[string]*discoveryv1.EndpointSlice{"": slice}
}
