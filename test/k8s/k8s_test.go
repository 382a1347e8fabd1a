// SPDX-License-Identifier: Apache-2.0

// Package k8s tests the tunnel on real Kubernetes ([kubebed]) with clients that nobody here wrote. Each check is made three times: before there
// is a tunnel and after it is gone, when it has to fail, and with the tunnel, when it has to pass.
package k8s

import (
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/edge-tunnel/edge-tunnel/test/kubebed"
	"github.com/edge-tunnel/edge-tunnel/test/netlab"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is for what takes a moment, on a machine that is busy with other tests.
const patience = time.Minute

// world is a cluster with our programs.
type world struct {
	*kubebed.Cluster
	t   *testing.T
	bin string

	servers, agents []*netlab.Process
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, bin: t.TempDir(), Cluster: kubebed.New(t)}
	args := []string{"build", "-o", w.bin + "/"}
	for _, name := range []string{"tunnel-server", "tunnel-agent", "tunnelctl"} {
		args = append(args, "github.com/edge-tunnel/edge-tunnel/cmd/"+name)
	}
	if out, err := exec.Command("go", args...).CombinedOutput(); err != nil {
		t.Fatalf("build the programs: %v: %s", err, out)
	}
	w.ctl("init")
	for _, n := range w.Cloud {
		w.ctl("issue-server", "--name", n.Name, "--host", n.V4.String())
	}
	for _, n := range w.Edge {
		w.ctl("issue-agent", "--node", n.Name, "--ip", n.V4.String())
	}
	return w
}

func (w *world) pki() string { return filepath.Join(w.Lab.Dir(), "pki") }

func (w *world) ctl(verb string, args ...string) {
	w.t.Helper()
	out, err := exec.Command(filepath.Join(w.bin, "tunnelctl"), append([]string{"pki", verb, "--dir", w.pki()}, args...)...).CombinedOutput()
	if err != nil {
		w.t.Fatalf("tunnelctl pki %s: %v: %s", verb, err, out)
	}
}

func (w *world) tls(n *kubebed.Node) []string {
	in := func(file string) string { return filepath.Join(w.pki(), file) }
	return []string{"--ca-cert", in("ca.crt"), "--cert", in(n.Name + ".crt"), "--key", in(n.Name + ".key")}
}

// tunnelUp starts a server on each cloud node and an agent on each edge node, and waits until the servers know every edge.
func (w *world) tunnelUp(flags ...string) {
	w.t.Helper()
	agent := []string{}
	for _, n := range w.Cloud {
		if err := os.MkdirAll(n.Path("state"), 0o700); err != nil {
			w.t.Fatal(err)
		}
		args := append(w.tls(n), "--cgroup-root", n.Cgroup(), "--state-dir", n.Path("state"))
		w.servers = append(w.servers, w.start(n, "tunnel-server", append(args, flags...)))
		agent = append(agent, "--server", n.V4.String())
	}
	for _, n := range w.Edge {
		w.agents = append(w.agents, w.start(n, "tunnel-agent", append(w.tls(n), agent...)))
	}
	for _, n := range w.Cloud {
		w.eventually(func() error {
			out, err := n.Run(filepath.Join(w.bin, "tunnelctl"), "targets")
			if err == nil && strings.Count(out, "online") != len(w.Edge) {
				err = fmt.Errorf("targets of %s:\n%s", n.Name, out)
			}
			return err
		})
	}
}

// tunnelDown ends all of them, and takes out of the kernel what servers leave there.
func (w *world) tunnelDown() {
	w.t.Helper()
	for _, p := range append(w.agents, w.servers...) {
		if err := p.Stop(patience); err != nil {
			w.t.Errorf("%v", err)
		}
	}
	w.agents, w.servers = nil, nil
	for _, n := range w.Cloud {
		if _, err := n.Run(filepath.Join(w.bin, "tunnelctl"), "cleanup"); err != nil {
			w.t.Fatal(err)
		}
	}
}

func (w *world) start(n *kubebed.Node, name string, args []string) *netlab.Process {
	w.t.Helper()
	p, err := n.Start(filepath.Join(w.bin, name), args...)
	if err != nil {
		w.t.Fatalf("start %s on %s: %v", name, n.Name, err)
	}
	return p
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
