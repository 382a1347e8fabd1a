// SPDX-License-Identifier: Apache-2.0

package netlab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
)

var helpers = Helpers{
	"where": func(args []string) int {
		group, err := os.ReadFile("/proc/self/cgroup")
		if err != nil {
			return 1
		}
		fmt.Printf("%s %s", strings.Join(args, " "), group)
		return 0
	},
	// A whole lab that is not closed: its parent kills it.
	"lab": func([]string) int {
		t := &fatalT{}
		lab := New(t)
		node := lab.Cloud("cloud-1")
		p, err := node.Start("sleep", "1000")
		if err != nil {
			fmt.Println(err)
			return 1
		}
		fmt.Printf("%s %s %d\n", lab.dir, node.Cgroup(), p.PID())
		time.Sleep(time.Minute)
		return 1
	},
}

func TestMain(m *testing.M) {
	helpers.Run()
	goleak.VerifyTestMain(m)
}

// fatalT is a T outside of a test.
type fatalT struct{}

func (*fatalT) Helper()                   {}
func (*fatalT) Logf(f string, a ...any)   { fmt.Printf(f+"\n", a...) }
func (*fatalT) Fatalf(f string, a ...any) { panic(fmt.Sprintf(f, a...)) }
func (*fatalT) Skipf(f string, a ...any)  { panic(fmt.Sprintf(f, a...)) }
func (*fatalT) Failed() bool              { return false }
func (*fatalT) Cleanup(func())            {}

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// greet accepts one connection and writes who it came from.
func greet(t *testing.T, l net.Listener) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			fmt.Fprint(c, c.RemoteAddr().(*net.TCPAddr).IP)
			c.Close()
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-done
	})
}

// ask returns what greet wrote.
func ask(ctx context.Context, from *Node, addr netip.Addr) (string, error) {
	conn, err := from.Dial(ctx, "tcp", netip.AddrPortFrom(addr, 9000).String())
	if err != nil {
		return "", err
	}
	defer conn.Close()
	answer, err := io.ReadAll(conn)
	return string(answer), err
}

func TestEdgeReachesCloudThroughNATAndNotBack(t *testing.T) {
	ctx := testContext(t)
	lab := New(t)
	cloud := lab.Cloud("cloud-1")
	site := lab.Site("home")
	edge := site.Edge("edge-1")

	for _, node := range []*Node{cloud, edge} {
		listener, err := node.Listen(ctx, "tcp", ":9000")
		if err != nil {
			t.Fatal(err)
		}
		greet(t, listener)
	}
	for _, c := range []struct{ cloud, edge, router netip.Addr }{
		{cloud.V4, edge.V4, site.Router.V4},
		{cloud.V6, edge.V6, site.Router.V6},
	} {
		if got, err := ask(ctx, edge, c.cloud); err != nil || got != c.router.String() {
			t.Errorf("cloud saw %q, %v; want the router %s", got, err, c.router)
		}
		if _, err := ask(ctx, cloud, c.edge); !errors.Is(err, syscall.ENETUNREACH) {
			t.Errorf("cloud to %s: %v, want ENETUNREACH", c.edge, err)
		}
		// A route that an operator might add changes nothing: the router lets nothing in.
		link, err := cloud.Netlink().LinkByName("eth0")
		if err != nil {
			t.Fatal(err)
		}
		bits := c.edge.BitLen()
		if err := cloud.Netlink().RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: c.router.AsSlice(),
			Dst: ipNet(netip.PrefixFrom(c.edge, bits))}); err != nil {
			t.Fatal(err)
		}
		short, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
		if got, err := ask(short, cloud, c.edge); err == nil {
			t.Errorf("cloud to %s through the router: %q, want no connection", c.edge, got)
		}
		cancel()
	}
}

func TestPodReachesNodeUntranslated(t *testing.T) {
	ctx := testContext(t)
	lab := New(t)
	cloud := lab.Cloud("cloud-1")
	pods := []*Node{cloud.Pod("pod-1"), cloud.Pod("pod-2")}
	listener, err := cloud.Listen(ctx, "tcp", ":9000")
	if err != nil {
		t.Fatal(err)
	}
	greet(t, listener)
	for _, pod := range pods {
		for _, c := range [][2]netip.Addr{{pod.V4, cloud.V4}, {pod.V6, cloud.V6}} {
			if got, err := ask(ctx, pod, c[1]); err != nil || got != c[0].String() {
				t.Errorf("node saw %q, %v; want the pod %s", got, err, c[0])
			}
		}
	}
}

func TestSitesMayShareAddresses(t *testing.T) {
	ctx := testContext(t)
	lab := New(t)
	cloud := lab.Cloud("cloud-1")
	listener, err := cloud.Listen(ctx, "tcp", ":9000")
	if err != nil {
		t.Fatal(err)
	}
	greet(t, listener)
	prefix := netip.MustParsePrefix("192.168.1.0/24")
	for _, name := range []string{"a", "b"} {
		site := lab.Site(name, prefix)
		edge := site.Edge("edge-" + name)
		if want := netip.MustParseAddr("192.168.1.2"); edge.V4 != want || edge.V6.IsValid() {
			t.Errorf("edge %s has %s and %s, want %s only", name, edge.V4, edge.V6, want)
		}
		if got, err := ask(ctx, edge, cloud.V4); err != nil || got != site.Router.V4.String() {
			t.Errorf("cloud saw %q, %v; want %s", got, err, site.Router.V4)
		}
	}
}

func TestProcessesAreInTheNodesCgroup(t *testing.T) {
	ctx := testContext(t)
	lab := New(t)
	node := lab.Cloud("cloud-1")
	pod := node.Pod("pod-1")
	for _, c := range []struct {
		node *Node
		want string
	}{
		{node, "0::/" + filepath.Base(node.Cgroup()) + "\n"},
		{pod, "0::/" + filepath.Base(node.Cgroup()) + "/kubepods/pod-1\n"},
	} {
		out, err := c.node.Helper(ctx, "where", "a", "b").Output()
		if err != nil || !strings.HasPrefix(string(out), "a b ") || !strings.Contains(string(out), c.want) {
			t.Errorf("helper wrote %q, %v; want %q", out, err, c.want)
		}
	}
	// The path from outside is the same folder.
	if !strings.HasPrefix(pod.Cgroup(), node.Cgroup()+"/") {
		t.Errorf("pod %s is not below %s", pod.Cgroup(), node.Cgroup())
	}
}

func TestNodeHasItsOwnRunAndBPFFS(t *testing.T) {
	lab := New(t)
	a, b := lab.Cloud("cloud-1"), lab.Cloud("cloud-2")
	if out, err := a.Run("sh", "-c", "touch /run/mine && mkdir /sys/fs/bpf/mine"); err != nil {
		t.Fatal(out, err)
	}
	for _, path := range []string{a.Path("run", "mine"), filepath.Join(a.BPFFS(), "mine")} {
		if !exists(path) {
			t.Errorf("%s is not seen from outside", path)
		}
	}
	if out, err := b.Run("sh", "-c", "ls /run/mine /sys/fs/bpf/mine"); err == nil {
		t.Errorf("another node sees them: %s", out)
	}
	if exists("/run/mine") || exists("/sys/fs/bpf/mine") {
		t.Error("the machine has them")
	}
}

func TestUnpackedProgramsRun(t *testing.T) {
	lab := New(t)
	node := lab.Cloud("cloud-1")
	for _, cmd := range [][]string{
		{"curl", "--version"}, {"rsync", "--version"}, {"prometheus", "--version"}, {"prometheus-node-exporter", "--version"},
		{"bpftool", "version"}, {"nft", "--version"}, {"nghttp", "--version"}, {"ssh", "-V"},
	} {
		if out, err := node.Run(cmd[0], cmd[1:]...); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	}
}

func TestProcess(t *testing.T) {
	ctx := testContext(t)
	lab := New(t)
	node := lab.Cloud("cloud-1")
	p, err := node.Start("sh", "-c", "trap 'echo bye; exit 3' TERM; echo ready; while :; do sleep 0.05; done")
	if err != nil {
		t.Fatal(err)
	}
	if err := p.WaitFor(ctx, "ready"); err != nil {
		t.Fatal(err)
	}
	var exit *exec.ExitError
	if err := p.Stop(10 * time.Second); !errors.As(err, &exit) || exit.ExitCode() != 3 {
		t.Errorf("stopped with %v, want status 3", err)
	}
	if !strings.Contains(p.Log(), "bye") {
		t.Errorf("log %q has no bye", p.Log())
	}
	if err := p.WaitFor(ctx, "never"); err == nil || !strings.Contains(err.Error(), "ended") {
		t.Errorf("waiting for a dead process: %v", err)
	}

	deaf, err := node.Start("sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.05; done")
	if err != nil {
		t.Fatal(err)
	}
	if err := deaf.WaitFor(ctx, "ready"); err != nil {
		t.Fatal(err)
	}
	if err := deaf.Stop(50 * time.Millisecond); err == nil || !strings.Contains(err.Error(), "did not end") {
		t.Errorf("stopping a deaf process: %v", err)
	}
	if _, err := node.Start("no-such-program"); err == nil {
		t.Error("started a program that does not exist")
	}
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	if err := node.Command(cancelled, "sleep", "100").Run(); err == nil {
		t.Error("a cancelled command ran")
	}
}

func TestLinkDownAndAddresses(t *testing.T) {
	ctx := testContext(t)
	lab := New(t)
	a, b := lab.Cloud("cloud-1"), lab.Cloud("cloud-2")
	listener, err := a.Listen(ctx, "tcp", ":9000")
	if err != nil {
		t.Fatal(err)
	}
	greet(t, listener)
	if err := b.SetLink("eth0", false); err != nil {
		t.Fatal(err)
	}
	if _, err := ask(ctx, b, a.V4); !errors.Is(err, syscall.ENETUNREACH) {
		t.Errorf("with the link down: %v, want ENETUNREACH", err)
	}
	if err := b.SetLink("eth0", true); err != nil {
		t.Fatal(err)
	}
	if _, err := ask(ctx, b, a.V4); err != nil {
		t.Errorf("with the link up again: %v", err)
	}
	more := netip.MustParsePrefix("10.80.0.77/24")
	if err := a.AddAddr("eth0", more); err != nil {
		t.Fatal(err)
	}
	if _, err := ask(ctx, b, more.Addr()); err != nil {
		t.Errorf("an added address: %v", err)
	}
	if err := a.DelAddr("eth0", more); err != nil {
		t.Error(err)
	}
}

func TestCloseLeavesNothing(t *testing.T) {
	before := leftovers(t)
	var dir, cgroup string
	t.Run("lab", func(t *testing.T) {
		lab := New(t)
		node := lab.Cloud("cloud-1")
		pod := node.Pod("pod-1")
		lab.Site("home").Edge("edge-1")
		dir, cgroup = lab.dir, node.Cgroup()
		for _, n := range []*Node{node, pod} {
			// A daemon that nobody waits for, and one that its parent abandoned.
			if _, err := n.Start("sleep", "1000"); err != nil {
				t.Fatal(err)
			}
			if _, err := n.Run("sh", "-c", "setsid sleep 1000 >/dev/null 2>&1 & disown 2>/dev/null; exit 0"); err != nil {
				t.Fatal(err)
			}
		}
	})
	if exists(dir) || exists(cgroup) {
		t.Errorf("%s or %s still exists", dir, cgroup)
	}
	after := leftovers(t)
	// A thread ends a moment after its last goroutine.
	for deadline := time.Now().Add(5 * time.Second); after != before && time.Now().Before(deadline); after = leftovers(t) {
		time.Sleep(10 * time.Millisecond)
	}
	if after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

// leftovers is what a closed lab could have forgotten in this process and on the machine.
func leftovers(t *testing.T) string {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	namespaces := 0
	for _, fd := range fds {
		if to, err := os.Readlink(filepath.Join("/proc/self/fd", fd.Name())); err == nil && strings.HasPrefix(to, "net:") {
			namespaces++
		}
	}
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	// Other labs of this machine mount and unmount as they like.
	threads, err := filepath.Glob("/proc/self/task/*/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	entered := map[string]bool{}
	for _, thread := range threads {
		if to, err := os.Readlink(thread); err == nil {
			entered[to] = true
		}
	}
	mine := bytes.Count(mounts, []byte("/"+prefix)) - foreign(mounts)
	return fmt.Sprintf("%d mounts, %d namespaces open, %d entered, %d links", mine, namespaces, len(entered), len(links))
}

// foreign counts the mounts of labs whose lock somebody else holds.
func foreign(mounts []byte) int {
	count := 0
	for line := range strings.Lines(string(mounts)) {
		_, rest, found := strings.Cut(line, "/"+prefix)
		if !found {
			continue
		}
		random, _, _ := strings.Cut(rest, "/")
		if exists(filepath.Join(os.TempDir(), prefix+random, "lock")) {
			count++
		}
	}
	return count
}

func TestSweepAfterDeath(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), helperVariable+"=lab")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var dir, cgroup string
	var pid int
	if _, err := fmt.Fscan(out, &dir, &cgroup, &pid); err != nil {
		t.Fatal(err)
	}
	if err := Sweep(); err != nil {
		t.Fatal(err)
	}
	if !exists(dir) || !exists(cgroup) {
		t.Fatal("a living lab was swept up")
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
	deadline := time.Now().Add(10 * time.Second)
	for exists("/proc/"+strconv.Itoa(pid)) && time.Now().Before(deadline) {
		time.Sleep(10 * time.Millisecond)
	}
	if exists("/proc/" + strconv.Itoa(pid)) {
		t.Error("a process of the dead lab lives on")
	}
	if err := Sweep(); err != nil {
		t.Fatal(err)
	}
	if exists(dir) || exists(cgroup) {
		t.Errorf("%s or %s is left", dir, cgroup)
	}
}

// A host node is the machine but for its cgroup.
func TestHost(t *testing.T) {
	ctx := testContext(t)
	var cgroup string
	t.Run("lab", func(t *testing.T) {
		host := New(t).Host("api")
		cgroup = host.Cgroup()
		l, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		greet(t, l)
		conn, err := host.Dial(ctx, "tcp", l.Addr().String())
		if err != nil {
			t.Fatalf("the machine's loopback: %v", err)
		}
		conn.Close()
		out, err := host.Helper(ctx, "where").Output()
		if err != nil || !strings.Contains(string(out), "0::/"+filepath.Base(cgroup)+"\n") {
			t.Errorf("a process of the host is in %q, %v", out, err)
		}
	})
	if exists(cgroup) {
		t.Errorf("%s is left", cgroup)
	}
}

// What a kubelet writes on its node is not seen on the machine, and goes with the lab.
func TestKubeletNode(t *testing.T) {
	ctx := testContext(t)
	const setting = "/proc/sys/vm/overcommit_memory"
	before, err := os.ReadFile(setting)
	if err != nil {
		t.Fatal(err)
	}
	var folders []string
	t.Run("lab", func(t *testing.T) {
		node := New(t).Cloud("cloud-1")
		root, err := node.Kubelet()
		if err != nil {
			t.Fatal(err)
		}
		roots, err := findCgroup1()
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range append(roots, filepath.Dir(node.Cgroup())) {
			folders = append(folders, filepath.Join(r, root))
		}
		for _, f := range folders {
			if !exists(f) {
				t.Errorf("%s is missing", f)
			}
		}
		out, err := node.Helper(ctx, "where").Output()
		if err != nil || !strings.Contains(string(out), "0::"+root+"/system\n") {
			t.Errorf("a process of the node is in %q, %v", out, err)
		}
		if err := errors.Join(node.Overlay("/var/lib"), node.Mask(setting)); err != nil {
			t.Fatal(err)
		}
		if out, err := node.Run("sh", "-c", "echo 7 >"+setting+" && mkdir /var/lib/netlab-test && cat "+setting); err != nil || out != "7" {
			t.Errorf("on the node: %q, %v", out, err)
		}
	})
	if after, err := os.ReadFile(setting); err != nil || !bytes.Equal(after, before) {
		t.Errorf("%s of the machine: %q, %v, was %q", setting, after, err, before)
	}
	for _, f := range append(folders, "/var/lib/netlab-test") {
		if exists(f) {
			t.Errorf("%s is left", f)
		}
	}
}
