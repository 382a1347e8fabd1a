// SPDX-License-Identifier: Apache-2.0

package kubecerts

import (
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/edge-tunnel/edge-tunnel/test/kubebed"
)

const records = "/api/v1/namespaces/kube-system/configmaps/edge-tunnel-nodes"

// TestRecords: names are kept by the one that leads, over an outage, and by the next when it ends.
func TestRecords(t *testing.T) {
	s := bed(t)
	address := func(node, addr string) {
		t.Helper()
		if err := s.Do(http.MethodPatch, "/api/v1/nodes/"+node+"/status", kubebed.Object{
			"status": kubebed.Object{"addresses": []kubebed.Object{{"type": "InternalIP", "address": addr}, {"type": "Hostname", "address": node}}},
		}, nil); err != nil {
			t.Fatal(err)
		}
	}
	want := func(text string) {
		t.Helper()
		eventually(t, text, func() bool {
			var c struct{ Data map[string]string }
			if err := s.Do(http.MethodGet, records, nil, &c); err != nil {
				t.Fatal(err)
			}
			return c.Data["tunnel-nodes"] == text
		})
	}
	for _, node := range []string{"cloud-1", "edge-1"} {
		s.Create("/api/v1/nodes", kubebed.Object{"metadata": kubebed.Object{"name": node}})
	}
	address("cloud-1", "10.0.0.1")
	address("edge-1", "10.1.0.1")
	c := startIn(t, s, []string{"NODE_NAME=cloud-1"})
	want("10.0.0.1\tcloud-1\n10.1.0.1\tedge-1\n")
	s.Kill()
	eventually(t, "leadership lost", func() bool { return !c.leads() })
	s.Start()
	address("edge-1", "10.1.0.2")
	want("10.0.0.1\tcloud-1\n10.1.0.2\tedge-1\n")
	eventually(t, "leads again", c.leads)
	second := startIn(t, s, []string{"NODE_NAME=cloud-1"})
	eventually(t, "second ready", second.ready)
	c.stop()
	address("edge-1", "10.1.0.3")
	want("10.0.0.1\tcloud-1\n10.1.0.3\tedge-1\n")
	eventually(t, "ready", func() bool { return second.leads() && second.ready() })
	second.stop()
}

// ofRecords tells the rights of the publisher from those to sign certificates.
func ofRecords(r right) bool {
	return r.role == leaseRole || r.resource == "events" && !ofStatus(r) || r.resource == "nodes" && r.verb != "get" || slices.Contains(r.names, "edge-tunnel-nodes")
}

// ofStatus tells the rights to say on Nodes how their tunnels are.
func ofStatus(r right) bool { return r.resource == "nodes/status" || r.role == eventRole }

// TestRightsToRecords takes each right away in turn, like [TestRights].
func TestRightsToRecords(t *testing.T) {
	s := bed(t)
	s.Create("/api/v1/nodes", kubebed.Object{"metadata": kubebed.Object{"name": "cloud-1"}})
	if err := s.Do(http.MethodPatch, "/api/v1/nodes/cloud-1/status", kubebed.Object{
		"status": kubebed.Object{"addresses": []kubebed.Object{{"type": "InternalIP", "address": "10.0.0.1"}}}}, nil); err != nil {
		t.Fatal(err)
	}
	put := func(data kubebed.Object) {
		t.Helper()
		if err := s.Do(http.MethodPatch, records, kubebed.Object{"data": data}, nil); err != nil {
			t.Fatal(err)
		}
	}
	touch := func(addr string) {
		t.Helper()
		if err := s.Do(http.MethodPatch, "/api/v1/nodes/cloud-1/status", kubebed.Object{
			"status": kubebed.Object{"addresses": []kubebed.Object{{"type": "InternalIP", "address": addr}}}}, nil); err != nil {
			t.Fatal(err)
		}
	}
	large := strings.Repeat("x", 900<<10)
	n := 0
	rights := func(r right) bool { return ofRecords(r) && r.verb != "delete" } // which takes an hour, see TestSweep
	eachRight(t, s, rights, func(t *testing.T, verb, resource string, env []string, back func()) {
		n++
		put(kubebed.Object{"tunnel-nodes": nil, "others": large})
		c := startIn(t, s, append(env, "NODE_NAME=cloud-1"), "--node-status=false")
		said := func() string { return c.get("/readyz") }
		if resource == "events" {
			said = c.log.String // nothing is worse without them
		}
		if verb+resource == "patchevents" { // which it does when it says the same again
			eventually(t, "written", c.ready)
			put(kubebed.Object{"others": nil})
			touch("10.0.0.2")
			eventually(t, "looked", func() bool { return strings.Contains(c.get("/metrics"), "edge_tunnel_controller_dns_bytes 17\n") })
			put(kubebed.Object{"others": large})
			touch("10.0.0.1")
		}
		eventually(t, "says which right is missing", func() bool { return cannot(verb, resource).MatchString(said()) })
		back()
		eventually(t, "ready", c.ready)
		c.stop()
	})
	if n != 8 {
		t.Errorf("%d rights", n)
	}
}

// TestRightsToNodeStatus takes each right away in turn. A server that nobody knows says which nodes it has.
func TestRightsToNodeStatus(t *testing.T) {
	s := bed(t)
	s.Create("/api/v1/nodes", kubebed.Object{"metadata": kubebed.Object{"name": "edge-1", "labels": kubebed.Object{"openyurt.io/is-edge-worker": "true"}}})
	if err := s.Do(http.MethodPatch, "/api/v1/nodes/edge-1/status", kubebed.Object{
		"status": kubebed.Object{"addresses": []kubebed.Object{{"type": "InternalIP", "address": "10.1.0.1"}}}}, nil); err != nil {
		t.Fatal(err)
	}
	const leases = "/apis/coordination.k8s.io/v1/namespaces/edge-tunnel-leases/leases"
	lease := func(name, kind, annotation, value string) {
		s.Create(leases, kubebed.Object{
			"metadata": kubebed.Object{"name": name, "labels": kubebed.Object{"edge-tunnel.io/registry": kind}, "annotations": kubebed.Object{annotation: value}},
			"spec":     kubebed.Object{"holderIdentity": "cloud-1"},
		})
	}
	lease("beat", "server", "edge-tunnel.io/peer", "192.0.2.1:10262")
	lease("nodes", "nodes", "edge-tunnel.io/nodes", "edge-1")
	lease("refused", "refused", "edge-tunnel.io/refused", "[]")
	beats := 0
	beat := func() {
		t.Helper()
		beats++
		if err := s.Do(http.MethodPatch, leases+"/beat", kubebed.Object{"spec": kubebed.Object{
			"renewTime": time.Now().UTC().Format("2006-01-02T15:04:05.000000Z07:00")}}, nil); err != nil {
			t.Fatal(err)
		}
	}
	refuse := func(text string) {
		t.Helper()
		if err := s.Do(http.MethodPatch, leases+"/refused", kubebed.Object{"metadata": kubebed.Object{"annotations": kubebed.Object{"edge-tunnel.io/refused": text}}}, nil); err != nil {
			t.Fatal(err)
		}
	}
	const denied = `[{"node":"edge-1","reason":"denied"}]`
	n := 0
	eachRight(t, s, ofStatus, func(t *testing.T, verb, resource string, env []string, back func()) {
		n++
		refuse("[]")
		if err := s.Do(http.MethodPatch, "/api/v1/nodes/edge-1/status", kubebed.Object{"status": kubebed.Object{"conditions": nil}}, nil); err != nil {
			t.Fatal(err)
		}
		beat()
		c := startIn(t, s, env)
		missing := func() bool {
			beat()
			if resource == "events" { // nothing is worse without them
				return cannot(verb, resource).MatchString(c.log.String())
			}
			return cannot(verb, resource).MatchString(c.get("/readyz"))
		}
		said := 0
		eventually(t, "says which right is missing", func() bool {
			if resource == "events" { // the same again is counted by a patch
				refuse([]string{denied, "[]"}[said/60%2])
				said++
			}
			return missing()
		})
		back()
		eventually(t, "ready", c.ready)
		eventually(t, "the condition", func() bool {
			beat()
			out, err := s.Kubectl("get", "node", "edge-1", "-o", `jsonpath={.status.conditions[?(@.type=="EdgeTunnelReady")].reason}`)
			return err == nil && out == "Connected"
		})
		c.stop()
	})
	if n != 3 || beats < 3 {
		t.Errorf("%d rights", n)
	}
}
