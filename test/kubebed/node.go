// SPDX-License-Identifier: Apache-2.0

package kubebed

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"text/template"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/edge-tunnel/edge-tunnel/test/netlab"
)

// Node is a machine with a kubelet, containerd, kube-proxy and a node-exporter. All of it, pods included, is in the node's cgroup2 folder.
type Node struct {
	*netlab.Node
	Site *netlab.Site // of an edge node

	cluster    *Cluster
	pods       netip.Prefix
	cgroupRoot string
	images     []string // archives

	containerd, kubelet, proxy *netlab.Process
}

// PID is the kubelet's process, which is in the node's namespaces.
func (n *Node) PID() int { return n.kubelet.PID() }

func (c *Cluster) newNode(node *netlab.Node, site *netlab.Site, number int) *Node {
	return &Node{Node: node, Site: site, cluster: c, pods: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, byte(number), 0}), 24)}
}

// settings of the whole machine that a kubelet changes; it shall change copies.
var settings = []string{"vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops", "kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes"}

// prepare readies the machine, before any program runs.
func (n *Node) prepare(t netlab.T) {
	t.Helper()
	var err error
	n.cgroupRoot, err = n.Kubelet()
	// /var/lib/kubelet, /var/lib/cni, /var/log/containers: compiled in, and the same on each node.
	errs := []error{err, n.Overlay("/var/lib"), n.Overlay("/var/log")}
	for _, s := range settings {
		errs = append(errs, n.Mask("/proc/sys/"+s))
	}
	if err := errors.Join(errs...); err != nil {
		t.Fatalf("prepare node %s: %v", n.Name, err)
	}
}

// Tools is the folder that containerd and its like are in.
func (n *Node) Tools() string { return n.cluster.tools }

// tool prepares one of them.
func (n *Node) tool(name string, args ...string) *netlab.Cmd {
	cmd := n.Command(context.Background(), filepath.Join(n.Tools(), "usr/bin", name), args...)
	cmd.Env = append(cmd.Env, fmt.Sprintf("PATH=%[1]s/usr/bin:%[1]s/usr/sbin:%[2]s", n.Tools(), os.Getenv("PATH")))
	return cmd
}

// containerdConfig: restrict_oom_score_adj because a machine without CAP_SYS_RESOURCE cannot lower it.
var containerdConfig = template.Must(template.New("containerd").Parse(`version = 2
root = "{{.Path "containerd"}}"
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs"]
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "` + pauseImage + `"
  disable_apparmor = true
  restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "{{.Tools}}/usr/lib/cni"
  conf_dir = "{{.Path "cni"}}"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
  SystemdCgroup = false
`))

func (n *Node) start() error {
	if err := n.configure(); err != nil {
		return fmt.Errorf("configure %s: %w", n.Name, err)
	}
	var err error
	if n.containerd, err = n.StartCmd(n.tool("containerd", "--config", n.Path("containerd.toml"))); err != nil {
		return err
	}
	if err := n.importImages(); err != nil {
		return fmt.Errorf("%s: %w", n.Name, err)
	}
	c := n.cluster
	if n.kubelet, err = n.Start(c.Program("kubelet"), "--config="+n.Path("kubelet.json"), "--kubeconfig="+c.pki.path("kubelet-"+n.Name+".conf"),
		"--hostname-override="+n.Name, "--node-ip="+n.V4.String(), "--cert-dir="+n.Path("kubelet-pki")); err != nil {
		return err
	}
	if _, err = n.Start("prometheus-node-exporter", "--web.listen-address=:"+ExporterPort); err != nil {
		return err
	}
	// The zeros keep it from changing the machine's limits of connection tracking.
	n.proxy, err = n.Start(c.Program("kube-proxy"), "--kubeconfig="+c.pki.path("kube-proxy.conf"), "--hostname-override="+n.Name,
		"--proxy-mode=nftables", "--conntrack-max-per-core=0", "--conntrack-min=0", "--conntrack-tcp-timeout-established=0", "--conntrack-tcp-timeout-close-wait=0")
	return err
}

func (n *Node) configure() error {
	c := n.cluster
	user := "system:node:" + n.Name
	var containerd bytes.Buffer
	if err := errors.Join(
		containerdConfig.Execute(&containerd, n),
		c.writeKubeconfig("kubelet-"+n.Name, user, "system:nodes"),
		c.pki.issue(c.pki.ca, "kubelet-serving-"+n.Name, user, []string{"system:nodes"}, []string{n.Name}, []net.IP{n.V4.AsSlice()}),
		os.MkdirAll(n.Path("cni"), 0o755),
	); err != nil {
		return err
	}
	kubelet, err := json.MarshalIndent(Object{
		"apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
		"tlsCertFile": c.pki.path("kubelet-serving-" + n.Name + ".crt"), "tlsPrivateKeyFile": c.pki.path("kubelet-serving-" + n.Name + ".key"),
		"authentication":           Object{"anonymous": Object{"enabled": false}, "webhook": Object{"enabled": true}, "x509": Object{"clientCAFile": c.CA()}},
		"authorization":            Object{"mode": "Webhook"},
		"containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
		"cgroupDriver":             "cgroupfs", "cgroupRoot": n.cgroupRoot, "failCgroupV1": false, "failSwapOn": false,
		"makeIPTablesUtilChains": false, "clusterDomain": "cluster.local", "clusterDNS": []string{dnsAddr}, "resolvConf": n.Path("resolv.conf"),
		// A kubelet that follows a log begins the next file when there is one, and does not look for the rest of a line in the last.
		"containerLogMaxSize":       "500Mi",
		"nodeStatusUpdateFrequency": "2s", "imageGCHighThresholdPercent": 100,
		"evictionHard":    Object{"memory.available": "50Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
		"staticPodPath":   n.Path("static-pods"),
		"volumePluginDir": "/var/lib/kubelet/volume-plugins",
	}, "", "  ")
	if err != nil {
		return err
	}
	network, err := json.MarshalIndent(Object{"cniVersion": "0.4.0", "name": "pods", "plugins": []Object{{
		"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true,
		"ipam": Object{"type": "host-local", "ranges": [][]Object{{{"subnet": n.pods.String()}}}, "routes": []Object{{"dst": "0.0.0.0/0"}}},
	}}}, "", "  ")
	if err != nil {
		return err
	}
	if err := errors.Join(
		n.writeFile("containerd.toml", containerd.String()), n.writeFile("kubelet.json", string(kubelet)),
		n.writeFile("cni/pods.conflist", string(network)), n.writeFile("resolv.conf", ""),
		os.MkdirAll(n.Path("static-pods"), 0o755),
	); err != nil || n.Site == nil {
		return err
	}
	// Edge nodes' pods go out under the node's address. In the cloud pods' addresses are routed.
	masquerade := n.Command(context.Background(), "nft", "-f", "-")
	masquerade.Stdin = strings.NewReader(fmt.Sprintf(
		"table ip pods { chain out { type nat hook postrouting priority srcnat; ip saddr %s oifname \"eth0\" masquerade; }; }", n.pods))
	out, err := masquerade.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("masquerade: %w: %s", err, out)
	}
	return err
}

// PowerCycle takes an edge node's power away for some seconds: whatever runs there is gone at once, and starts anew.
func (n *Node) PowerCycle() error {
	if err := n.Site.Router.SetLink("lan0", false); err != nil { // before its dying programs can say goodbye
		return err
	}
	// Not by cgroup.kill: Linux 6.18 then kills whatever is started right into the cgroup, for ever.
	for {
		killed, err := n.KillAll(func(string) bool { return true })
		if err != nil {
			return err
		}
		if killed == 0 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	<-n.kubelet.Exited()
	<-n.containerd.Exited()
	time.Sleep(5 * time.Second)
	if err := n.Site.Router.SetLink("lan0", true); err != nil {
		return err
	}
	return n.start()
}

// KillAll sends SIGKILL to the processes of the node, pods included, whose names are to be killed, of which the kernel keeps 15 bytes, and
// counts them.
func (n *Node) KillAll(name func(string) bool) (killed int, err error) {
	err = filepath.WalkDir(n.Cgroup(), func(path string, d fs.DirEntry, _ error) error {
		if d == nil || d.Name() != "cgroup.procs" {
			return nil
		}
		content, _ := os.ReadFile(path) // cgroups come and go
		for field := range strings.FieldsSeq(string(content)) {
			pid, err := strconv.Atoi(field)
			if err != nil {
				return err
			}
			comm, err := os.ReadFile("/proc/" + field + "/comm")
			if err != nil || !name(strings.TrimSpace(string(comm))) {
				continue
			}
			switch err := syscall.Kill(pid, syscall.SIGKILL); {
			case err == nil:
				killed++
			case !errors.Is(err, syscall.ESRCH):
				return fmt.Errorf("kill process %d: %w", pid, err)
			}
		}
		return nil
	})
	return killed, err
}

// AddStaticPod gives the node's kubelet a pod that the API server only sees a mirror of, called NAME-NODE.
func (n *Node) AddStaticPod(file string, pod Object) error {
	content, err := json.Marshal(pod)
	if err != nil {
		return err
	}
	return n.writeFile("static-pods/"+file+".json", string(content))
}

func (n *Node) writeFile(name, content string) error {
	return os.WriteFile(n.Path(name), []byte(content), 0o644)
}

// importImages waits for containerd, too.
func (n *Node) importImages() error {
	deadline := time.Now().Add(startPatience)
	for {
		out, err := n.tool("ctr", "version").CombinedOutput()
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("containerd does not answer: %w: %s", err, out)
		}
		time.Sleep(50 * time.Millisecond)
	}
	for _, file := range n.images {
		if err := n.importImage(file); err != nil {
			return err
		}
	}
	return nil
}

func (n *Node) importImage(file string) error {
	if out, err := n.tool("ctr", "--namespace", "k8s.io", "images", "import", file).CombinedOutput(); err != nil {
		return fmt.Errorf("import %s: %w: %s", file, err, out)
	}
	return nil
}

// ImportImage gives the archive of an image to every node.
func (c *Cluster) ImportImage(file string) error {
	var imports errgroup.Group
	for _, n := range c.Nodes() {
		imports.Go(func() error { return n.importImage(file) })
	}
	return imports.Wait()
}

// Images that each node has.
const (
	pauseImage = "edge-tunnel.test/pause:v1"
	// WorkloadImage has test/kubebed/workload and a busybox.
	WorkloadImage = "edge-tunnel.test/workload:v1"
)

// buildImages makes the images' archives in the lab's folder.
func (c *Cluster) buildImages() ([]string, error) {
	workload := c.node.Path("workload")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", workload, "github.com/edge-tunnel/edge-tunnel/test/kubebed/workload")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build the workload: %w: %s", err, out)
	}
	busybox, err := c.program("busybox")
	if err != nil {
		return nil, err
	}
	links := make(map[string]string)
	for _, name := range []string{"cat", "dd", "echo", "head", "hostname", "id", "ls", "md5sum", "sh", "sleep", "stty", "tar", "wc"} {
		links["/bin/"+name] = "busybox"
	}
	files := map[string]string{"/bin/workload": workload}
	var archives []string
	for _, i := range []*image{
		{name: pauseImage, files: files, command: []string{"/bin/workload", "pause"}},
		{name: WorkloadImage, files: map[string]string{"/bin/workload": workload, "/bin/busybox": busybox}, links: links, command: []string{"/bin/workload"}},
	} {
		file := c.node.Path(fmt.Sprintf("image-%d.tar", len(archives)))
		if err := i.write(file); err != nil {
			return nil, err
		}
		archives = append(archives, file)
	}
	return archives, nil
}

// program copies one out of the nodes' view of the machine's programs.
func (c *Cluster) program(name string) (string, error) {
	path, err := c.node.Run("sh", "-c", "command -v "+name)
	if err != nil {
		return "", err
	}
	return c.copyOut(path)
}

func (c *Cluster) copyOut(path string) (string, error) {
	at := c.node.Path(filepath.Base(path))
	_, err := c.node.Run("cp", path, at)
	return at, err
}
