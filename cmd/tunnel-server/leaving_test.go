// SPDX-License-Identifier: Apache-2.0

package main

import (
	"net/http"
	"testing"

	"github.com/edge-tunnel/edge-tunnel/test/kubebed"
)

// What is in the kernel outlives the process, unless the API server says that the node is left for good.
func TestLeavesWithItsDaemonSet(t *testing.T) {
	n := newNode(t)
	api := kubebed.APIServer(t)
	api.Install()
	api.Create("/api/v1/nodes", kubebed.Object{"metadata": kubebed.Object{"name": "cloud-1", "labels": kubebed.Object{"kubernetes.io/os": "linux"}}})
	label := func(value any) {
		t.Helper()
		must(t, api.Do(http.MethodPatch, "/api/v1/nodes/cloud-1", kubebed.Object{"metadata": kubebed.Object{"labels": kubebed.Object{
			"openyurt.io/is-edge-worker": value,
		}}}, nil))
	}
	flags := []string{"--nodes-from", "kubernetes", "--node-name", "cloud-1", "--kubeconfig", api.ServiceAccount("kube-system", "tunnel-server"),
		"--daemonset", "kube-system/tunnel-server"}
	ends := func(log, why string, left bool) {
		t.Helper()
		p := n.start(flags...)
		if why == "it is away" {
			api.Kill()
			defer api.Start()
		}
		p.stop()
		p.wantEnd(0)
		record := p.logged(log)
		if record == nil {
			t.Errorf("%q is not in the log", log)
		} else if got, _ := record["why"].(string); why != "it is away" && got != why {
			t.Errorf("why: %q, want %q", got, why)
		}
		if left {
			n.wantNothingLeft()
		} else if n.attached() == 0 {
			t.Error("the programs are gone")
		}
	}
	const stays, leaves = "a successor is expected, so what is in the kernel stays", "this node is left for good, so nothing stays in the kernel"
	ends(stays, "", false)
	label("true")
	ends(leaves, "the DaemonSet's node selector and affinity do not choose Node cloud-1", true)
	label(nil)
	ends("cannot tell whether this node is left for good, so what is in the kernel stays", "it is away", false)
	must(t, api.Do(http.MethodDelete, "/apis/apps/v1/namespaces/kube-system/daemonsets/tunnel-server", nil, nil))
	ends(leaves, "there is no DaemonSet kube-system/tunnel-server", true)
}

// Asked to leave, it leaves nothing but its process: one that ended would be started again.
func TestLeavesWhenAsked(t *testing.T) {
	n := newNode(t)
	p := n.start()
	must(t, p.control.Leave(t.Context()))
	eventually(t, "the process waits to be ended", func() bool {
		return p.logged("nothing is left on this node but this process, which waits to be ended") != nil
	})
	n.wantNothingLeft()
	eventually(t, "it is healthy and not ready", func() bool {
		healthy, _ := get(t, "/healthz")
		ready, _ := get(t, "/readyz")
		return healthy == http.StatusOK && ready == http.StatusServiceUnavailable
	})
	if len(p.status) > 0 {
		t.Error("it has ended")
	}
	p.stop()
	p.wantEnd(0)
}
