// SPDX-License-Identifier: Apache-2.0

package kubecerts

import (
	"net/http"
	"slices"
	"strings"
	"testing"

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
	return r.role == leaseRole || r.resource == "events" || r.resource == "nodes" && r.verb != "get" || slices.Contains(r.names, "edge-tunnel-nodes")
}

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
		c := startIn(t, s, append(env, "NODE_NAME=cloud-1"))
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
