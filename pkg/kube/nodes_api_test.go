// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/route"
	"github.com/edge-tunnel/edge-tunnel/test/kubebed"
)

// followServer follows a real API server with the rights of a ServiceAccount.
func followServer(t *testing.T, kubeconfig string) *following {
	t.Helper()
	client, err := NewClient(ClientOptions{Kubeconfig: kubeconfig, UserAgent: "test"})
	must(t, err)
	f := &following{t: t, states: make(chan NodesState, 1)}
	f.Nodes = NewNodes(NodesConfig{Client: client, Edge: DefaultEdgeNodes(), Self: "cloud-1", Changed: f.changed})
	f.run()
	return f
}

const nodesRole = `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: nodes-test-%[2]s}
rules:
  - {apiGroups: [%[1]q], resources: [%[2]s], verbs: [%[3]s]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: nodes-test-%[2]s}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: nodes-test-%[2]s}
subjects: [{kind: ServiceAccount, name: server, namespace: default}]
`

func TestRealAPIServer(t *testing.T) {
	s := kubebed.APIServer(t)
	addNode := func(name, addr string, labels map[string]string) {
		t.Helper()
		s.Create("/api/v1/nodes", kubebed.Object{"metadata": kubebed.Object{"name": name, "labels": labels}})
		must(t, s.Do("PATCH", "/api/v1/nodes/"+name+"/status", kubebed.Object{"status": kubebed.Object{
			"addresses": []kubebed.Object{{"type": "InternalIP", "address": addr}},
		}}, nil))
	}
	label := func(name, mode string) {
		t.Helper()
		must(t, s.Do("PATCH", "/api/v1/nodes/"+name, kubebed.Object{"metadata": kubebed.Object{
			"labels": kubebed.Object{"alibabacloud.com/interconnection-mode": mode},
		}}, nil))
	}
	addNode("cloud-1", "10.0.0.1", nil)
	addNode("edge-1", "10.1.0.1", edge)
	addNode("edge-2", "10.1.0.2", private)
	s.Create("/apis/discovery.k8s.io/v1/namespaces/default/endpointslices", kubebed.Object{
		"metadata":    kubebed.Object{"name": "kubernetes", "labels": kubebed.Object{"kubernetes.io/service-name": "kubernetes"}},
		"addressType": "IPv4", "endpoints": []kubebed.Object{{"addresses": []string{"10.0.0.100"}}}, "ports": []kubebed.Object{},
	})

	// Without either verb the error names it, and nothing is concluded.
	f := followServer(t, s.ServiceAccount("default", "server"))
	eventually(t, "list is missing", func() bool { return strings.Contains(fmt.Sprint(f.Status().Err), `cannot list resource "nodes"`) })
	s.Apply(fmt.Sprintf(nodesRole, "", "nodes", "list"))
	eventually(t, "watch is missing", func() bool { return strings.Contains(fmt.Sprint(f.Status().Err), `cannot watch resource "nodes"`) })
	s.Apply(fmt.Sprintf(nodesRole, "", "nodes", "list, watch"))
	eventually(t, "endpointslices are missing", func() bool {
		return strings.Contains(fmt.Sprint(f.Status().Err), `cannot list resource "endpointslices"`)
	})
	s.Apply(fmt.Sprintf(nodesRole, "discovery.k8s.io", "endpointslices", "list, watch"))
	eventually(t, "servicecidrs are missing", func() bool {
		return strings.Contains(fmt.Sprint(f.Status().Err), `cannot list resource "servicecidrs"`)
	})
	if f.told.Load() != 0 {
		t.Error("something was concluded from half of it")
	}
	s.Apply(fmt.Sprintf(nodesRole, "networking.k8s.io", "servicecidrs", "list"))
	state := f.want("edge-1@10.1.0.1")
	if want := (route.Rules{
		Servers: addrs("10.0.0.1"), Direct: addrs("10.1.0.2"), APIServers: addrs("10.0.0.100"), Services: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16")},
	}); !reflect.DeepEqual(state.Rules, want) {
		t.Errorf("rules %+v, want %+v", state.Rules, want)
	}
	eventually(t, "all is well", func() bool { return f.Status().Err == nil })

	// Both ways, at once.
	began := time.Now()
	label("edge-1", "improved")
	f.want()
	label("edge-1", "normal")
	f.want("edge-1@10.1.0.1")
	t.Logf("two changes of a label took %v", time.Since(began))

	// What happens while it is away is not seen, and is caught up with afterwards.
	saved := s.Save()
	label("edge-2", "normal")
	f.want("edge-1@10.1.0.1", "edge-2@10.1.0.2")
	told := f.told.Load()
	s.Kill()
	eventually(t, "the outage is seen", func() bool { return f.Status().Err != nil && !f.Status().Since.IsZero() })
	if f.told.Load() != told {
		t.Error("the outage changed the state")
	}
	s.Start()
	label("edge-2", "private")
	f.want("edge-1@10.1.0.1")
	eventually(t, "the outage is over", func() bool { return f.Status().Err == nil })

	// Yesterday's data: resource versions go back.
	must(t, s.Do("DELETE", "/api/v1/nodes/edge-1", nil, nil))
	f.want()
	s.Restore(saved)
	f.want("edge-1@10.1.0.1")
}
