// SPDX-License-Identifier: Apache-2.0

package k8s

import (
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"

	"github.com/edge-tunnel/edge-tunnel/test/kubebed"
)

const module = "../.." // this module's folder

// buildImage makes the image that the manifests name, as "make image" does, and gives it to the nodes. What goes in is in bin.
func (w *world) buildImage() {
	w.t.Helper()
	manifest, err := os.ReadFile(filepath.Join(module, "deploy", "manifests", "edge-tunnel.yaml"))
	if err != nil {
		w.t.Fatal(err)
	}
	ref := regexp.MustCompile(`image: "(.+)"`).FindSubmatch(manifest)
	if ref == nil {
		w.t.Fatal("the manifests name no image")
	}
	file := filepath.Join(w.Lab.Dir(), "edge-tunnel.tar")
	out, err := exec.Command("go", "run", "-C", filepath.Join(module, "tools", "release"), "./image", "-ref", string(ref[1]), "-version", "test", "-out", file,
		runtime.GOARCH+"="+w.bin).CombinedOutput()
	if err != nil {
		w.t.Fatalf("make the image: %v: %s", err, out)
	}
	if err := w.ImportImage(file); err != nil {
		w.t.Fatal(err)
	}
}

// tunnelUp does what an operator does, and waits until servers and agents are ready and the servers know every edge.
func (w *world) tunnelUp() {
	w.t.Helper()
	// Nothing is changed but this: here all nodes share one kernel, so each has to keep to its own part of the cgroup hierarchy.
	const bpffs = "- --bpffs=/host/sys/fs/bpf\n"
	own := strings.TrimSuffix(w.Cloud[0].Cgroup(), w.Cloud[0].Name) + "$(NODE_NAME)"
	w.Install(bpffs, bpffs+"            - --cgroup-root="+own+"\n")
	w.eventually(w.installed)
	w.eventually(w.mountNames)
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

// names is the file of the nodes' names for the cluster's DNS.
func (w *world) names() string { return w.Cloud[0].Path("tunnel-nodes") }

// mountNames gives the names to CoreDNS, which is no pod here and cannot have the ConfigMap as a volume.
func (w *world) mountNames() error {
	var names struct{ Data map[string]string }
	if err := w.Do(http.MethodGet, configMaps+"/edge-tunnel-nodes", nil, &names); err != nil {
		return err
	}
	for _, n := range w.Nodes() {
		if line := n.V4.String() + "\t" + n.Name + "\n"; !strings.Contains(names.Data["tunnel-nodes"], line) {
			return fmt.Errorf("names lack %q:\n%s", line, names.Data["tunnel-nodes"])
		}
	}
	return os.WriteFile(w.names(), []byte(names.Data["tunnel-nodes"]), 0o644)
}

func (w *world) addPorts() {
	w.t.Helper()
	w.Create(configMaps, kubebed.Object{
		"metadata": kubebed.Object{"name": "edge-tunnel-server-cfg"}, "data": kubebed.Object{"http-proxy-ports": nodePort + ", " + kubebed.ExporterPort},
	})
}

// dropPorts deletes the ConfigMap of ports: soon none of them is tunneled any more.
func (w *world) dropPorts() {
	w.t.Helper()
	if err := w.Do(http.MethodDelete, portsConfigMap, nil, nil); err != nil {
		w.t.Fatal(err)
	}
	w.eventually(func() error {
		out, err := w.Cloud[0].Run(filepath.Join(w.bin, "tunnelctl"), "status")
		if err == nil && strings.Contains(out, nodePort) {
			err = fmt.Errorf("%s is still tunneled: %s", nodePort, out)
		}
		return err
	})
}

const (
	configMaps     = "/api/v1/namespaces/kube-system/configmaps"
	portsConfigMap = configMaps + "/edge-tunnel-server-cfg"
)

const workloads = "/apis/apps/v1/namespaces/kube-system/"

// installed says what is not ready yet.
func (w *world) installed() error {
	var errs []error
	for name, want := range map[string]int{"daemonsets/tunnel-server": len(w.Cloud), "daemonsets/tunnel-agent": len(w.Edge), "deployments/tunnel-controller": 2} {
		var object struct {
			Status struct{ NumberReady, ReadyReplicas int }
		}
		if err := w.Do(http.MethodGet, workloads+name, nil, &object); err != nil {
			return err
		}
		if ready := object.Status.NumberReady + object.Status.ReadyReplicas; ready != want {
			errs = append(errs, fmt.Errorf("%s: %d ready of %d", name, ready, want))
		}
	}
	return errors.Join(errs...)
}

// showPods logs what our pods wrote last.
func (w *world) showPods() {
	out, err := w.Kubectl("get", "pods", "--namespace=kube-system", "--output=wide")
	w.t.Logf("%s %v", out, err)
	for _, n := range w.Nodes() {
		out, err := n.Run("sh", "-c", "tail --lines=100 /var/log/pods/kube-system_*/*/*.log")
		w.t.Logf("%s: %s %v", n.Name, out, err)
	}
}

// tunnelDown does what an operator does: after the cleanup nothing of ours is in a kernel, then the rest is taken away.
func (w *world) tunnelDown() {
	w.t.Helper()
	file := func(name string) string { return "--filename=" + filepath.Join(w.manifests(), name) }
	w.kubectl("apply", file("cleanup.yaml"))
	w.kubectl("wait", "--namespace=kube-system", "--for=condition=complete", "--timeout=50s", "job/tunnel-cleanup")
	for _, n := range w.Cloud {
		if pins, err := os.ReadDir(filepath.Join(n.BPFFS(), "edge-tunnel")); !errors.Is(err, fs.ErrNotExist) {
			w.t.Errorf("%s has pins: %v, %v", n.Name, pins, err)
		}
	}
	w.kubectl("delete", file("cleanup.yaml"), file("edge-tunnel.yaml"), "--wait=false")
	w.eventually(func() error {
		out, err := w.Kubectl("get", "pods", "--namespace=kube-system", "--selector=app.kubernetes.io/name=edge-tunnel", "--output=name")
		if err == nil && strings.Contains(out, "pod/") {
			err = fmt.Errorf("left: %s", out)
		}
		return err
	})
}

// breakServer replaces one server by what never starts: its programs stay in the kernel, and connects are refused.
func (w *world) breakServer() {
	w.t.Helper()
	w.kubectl("set", "image", "--namespace=kube-system", "daemonset/tunnel-server", "tunnel-server=absent.test/server:v1")
	w.eventually(func() error {
		var set struct {
			Status struct{ NumberReady, UpdatedNumberScheduled int }
		}
		err := w.Do(http.MethodGet, workloads+"daemonsets/tunnel-server", nil, &set)
		if s := set.Status; err == nil && (s.NumberReady != 1 || s.UpdatedNumberScheduled != 1) {
			err = fmt.Errorf("%+v", s)
		}
		return err
	})
	for _, n := range w.Cloud {
		if _, err := os.Stat(filepath.Join(n.BPFFS(), "edge-tunnel")); err != nil {
			w.t.Errorf("%s has no pins: %v", n.Name, err)
		}
	}
}

func (w *world) kubectl(args ...string) {
	w.t.Helper()
	if _, err := w.Kubectl(args...); err != nil {
		w.t.Fatal(err)
	}
}

// manifests is the folder, as a program of a node sees it.
func (w *world) manifests() string {
	dir, err := filepath.Abs(filepath.Join(module, "deploy", "manifests"))
	if err != nil {
		w.t.Fatal(err)
	}
	return dir
}

// labelNodes makes them what they are.
func (w *world) labelNodes() {
	w.t.Helper()
	for _, n := range w.Edge {
		w.patch("/api/v1/nodes/"+n.Name, kubebed.Object{"metadata": kubebed.Object{"labels": kubebed.Object{"alibabacloud.com/is-edge-worker": "true"}}})
	}
	w.patch("/api/v1/nodes/"+w.Cloud[0].Name, kubebed.Object{"spec": kubebed.Object{"taints": []kubebed.Object{{"key": "node-role.kubernetes.io/control-plane", "effect": "NoSchedule"}}}})
	w.addPorts()
}

func (w *world) patch(path string, object kubebed.Object) {
	w.t.Helper()
	if err := w.Do(http.MethodPatch, path, object, nil); err != nil {
		w.t.Fatal(err)
	}
}
