// SPDX-License-Identifier: Apache-2.0

package main

import (
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
	"github.com/edge-tunnel/edge-tunnel/pkg/redirect"
	"github.com/edge-tunnel/edge-tunnel/test/kubebed"
)

// The ConfigMap of a real API server says what is tunneled, with the rights that we ship, across an outage and a restart.
func TestServesPortsOfConfigMap(t *testing.T) {
	n := newNode(t)
	api := kubebed.APIServer(t)
	config := api.ServiceAccount("kube-system", "tunnel-server")
	api.Install()
	const maps = "/api/v1/namespaces/kube-system/configmaps"
	object := kubebed.Object{"metadata": kubebed.Object{"name": "edge-tunnel-server-cfg"}, "data": kubebed.Object{"http-proxy-ports": "9200"}}
	api.Create(maps, object)
	put := func(key string, value any) {
		t.Helper()
		must(t, api.Do(http.MethodPatch, maps+"/edge-tunnel-server-cfg", kubebed.Object{"data": kubebed.Object{key: value}}, nil))
	}
	want := func(ports ...uint16) {
		t.Helper()
		eventually(t, "these ports", func() bool {
			pinned, err := redirect.ReadPinned(n.bpffs)
			must(t, err)
			return slices.Equal(pinned.Ports, ports)
		})
	}
	flags := []string{"--nodes-from", "kubernetes", "--node-name", "cloud-1", "--kubeconfig", config, "--tunneled-ports", "9100", "--state-dir", t.TempDir()}
	p := n.start(flags...)
	view := func() admin.PortsConfig {
		s, err := p.control.Status(t.Context())
		must(t, err)
		return *s.Server.PortsConfig
	}

	want(9100, 9200, 10250, 10255)
	put("http-proxy-ports", "9300, 9200=10264")
	want(9100, 9300, 10250, 10255)
	if v := view(); !v.Complete || !v.Exists || v.Error != "" || len(v.Problems) != 1 || !strings.Contains(v.Problems[0], "9200=10264") {
		t.Errorf("%+v", v)
	}
	if _, metrics := get(t, "/metrics"); !strings.Contains(metrics, `edge_tunnel_config_bad_entries{entry="9200=10264",key="http-proxy-ports"} 1`) {
		t.Error("the bad entry is in no metric")
	}

	// What the ConfigMap said is in force again before anybody can ask what it says.
	api.Kill()
	p.stop()
	p.wantEnd(0)
	p = n.start(flags...)
	want(9100, 9300, 10250, 10255)
	if v := view(); v.Complete || v.Problems != nil {
		t.Errorf("without an API server: %+v", v)
	}

	// A reboot takes what is pinned.
	p.stop()
	p.wantEnd(0)
	must(t, redirect.Cleanup(n.bpffs))
	p = n.start(flags...)
	want(9100, 9300, 10250, 10255)
	api.Start()
	put("http-proxy-ports", "x")
	eventually(t, "an unusable ConfigMap", func() bool { v := view(); return v.Complete && v.Kept })
	want(9100, 9300, 10250, 10255)
	must(t, api.Do(http.MethodDelete, maps+"/edge-tunnel-server-cfg", nil, nil))
	want(9100, 10250, 10255)
	if v := view(); v.Exists || v.Kept || v.Problems != nil {
		t.Errorf("after the deletion: %+v", v)
	}
}
