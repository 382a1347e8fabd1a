// SPDX-License-Identifier: Apache-2.0

// Package k8s tests the tunnel on real Kubernetes ([kubebed]) with clients that nobody here wrote. Each check is made three times: before there
// is a tunnel and after it is gone, when it has to fail, and with the tunnel, when it has to pass.
package k8s

import (
	"fmt"
	"net/http"
	"os/exec"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/edge-tunnel/edge-tunnel/test/kubebed"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is for what takes a moment, on a machine that is busy with other tests.
const patience = 3 * time.Minute

// world is a cluster with our programs.
type world struct {
	*kubebed.Cluster
	t       *testing.T
	bin     string                    // the programs of the image, static
	audited func() ([]request, error) // what our accounts asked the API server for
}

func newWorld(t *testing.T) *world {
	t.Helper()
	flags, audited := audit(t)
	w := &world{t: t, bin: t.TempDir(), Cluster: kubebed.New(t, flags...), audited: audited}
	t.Cleanup(func() {
		if t.Failed() {
			w.showPods()
		}
	})
	build := exec.Command("make", "--no-print-directory", "-C", module, "build", "BIN="+w.bin)
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the programs: %v: %s", err, out)
	}
	w.buildImage()
	w.labelNodes()
	return w
}

// eventually repeats a check until it succeeds. Its last error ends the test.
func (w *world) eventually(check func() error) {
	w.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			w.t.Fatalf("after %v: %v", patience, err)
		}
	}
}

// runPods makes pods on each node: host-NODE in the node's network, pod-NODE in one of its own, twice-NODE whose first container ends,
// and static-NODE, which only the kubelet knows the origin of.
func (w *world) runPods() {
	w.t.Helper()
	for _, n := range w.Nodes() {
		twice := workload("twice", n)
		container := twice["spec"].(kubebed.Object)["containers"].([]kubebed.Object)[0]
		container["command"] = []string{"sh", "-c", "[ ! -e /life/1 ] || exec workload serve :8080; touch /life/1; echo life 1"}
		container["volumeMounts"] = []kubebed.Object{{"name": "life", "mountPath": "/life"}}
		twice["spec"].(kubebed.Object)["volumes"] = []kubebed.Object{{"name": "life", "emptyDir": kubebed.Object{}}}
		host := workload("host", n)
		host["spec"].(kubebed.Object)["hostNetwork"] = true
		host["spec"].(kubebed.Object)["containers"].([]kubebed.Object)[0]["args"] = []string{"serve", ":" + nodePort}
		chat := workload("chat", n)
		chat["spec"].(kubebed.Object)["containers"].([]kubebed.Object)[0]["args"] = []string{"chat", fmt.Sprint(chatRate)}
		for _, pod := range []kubebed.Object{workload("pod", n), host, twice, chat} {
			w.Create("/api/v1/namespaces/default/pods", pod)
		}
		static := workload("static", n)
		static["metadata"] = kubebed.Object{"name": "static"} // the kubelet adds the node
		if err := n.AddStaticPod("static", static); err != nil {
			w.t.Fatal(err)
		}
	}
	w.eventually(w.podsRun)
}

// workload is a pod NAME-NODE with the workload.
func workload(name string, n *kubebed.Node) kubebed.Object {
	field := func(name, path string) kubebed.Object {
		return kubebed.Object{"name": name, "valueFrom": kubebed.Object{"fieldRef": kubebed.Object{"fieldPath": path}}}
	}
	return kubebed.Object{
		"apiVersion": "v1", "kind": "Pod",
		"metadata": kubebed.Object{"name": name + "-" + n.Name},
		"spec": kubebed.Object{
			"nodeName": n.Name, "terminationGracePeriodSeconds": 1,
			"containers": []kubebed.Object{{
				"name": "main", "image": kubebed.WorkloadImage, "imagePullPolicy": "Never", "args": []string{"serve", ":8080"},
				"env": []kubebed.Object{field("NODE_NAME", "spec.nodeName"), field("POD_NAME", "metadata.name")},
			}},
		},
	}
}

func (w *world) podsRun() error {
	var list struct {
		Items []struct {
			Metadata struct{ Name string }
			Status   struct {
				ContainerStatuses []struct {
					Ready bool
					State any
				}
			}
		}
	}
	if err := w.Do(http.MethodGet, "/api/v1/namespaces/default/pods", nil, &list); err != nil {
		return err
	}
	if want := 5 * len(w.Nodes()); len(list.Items) != want {
		return fmt.Errorf("%d pods of %d", len(list.Items), want)
	}
	for _, pod := range list.Items {
		if c := pod.Status.ContainerStatuses; len(c) == 0 || !c[0].Ready {
			return fmt.Errorf("pod %s: %v", pod.Metadata.Name, c)
		}
	}
	return nil
}
