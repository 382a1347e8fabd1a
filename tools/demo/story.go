// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/edge-tunnel/edge-tunnel/test/foreign"
	"github.com/edge-tunnel/edge-tunnel/test/netlab"
)

// story is the demo while it runs.
type story struct {
	ctx    context.Context // one run from beginning to end; every step ends with it
	cancel context.CancelCauseFunc
	out    io.Writer
	bin    string
	lab    *netlab.Lab

	cloud, pod, edge *netlab.Node
	router           *netlab.Node
	server, agent    *netlab.Process
}

func newStory(ctx context.Context, stage *stage, bin string) *story {
	ctx, cancel := context.WithCancelCause(ctx)
	stage.Cleanup(func() { cancel(nil) })
	return &story{ctx: ctx, cancel: cancel, out: stage.out, bin: bin, lab: netlab.New(stage)}
}

// fatal ends waiting for something that cannot come any more.
func (s *story) fatal(err error) error {
	s.cancel(err)
	return err
}

// tell runs the chapters in order and ends at the first that goes wrong.
func (s *story) tell() error {
	start := time.Now()
	for _, chapter := range []func() error{
		s.topology, s.unreachable, s.tunnel, s.fromTheHost, s.fromThePod, s.ssh, s.prometheus, s.kernel, s.agentDies, s.serverStops,
	} {
		if err := chapter(); err != nil {
			if cause := context.Cause(s.ctx); cause != nil {
				return cause
			}
			return err
		}
	}
	fmt.Fprintf(s.out, "\nThat was it, in %.0f seconds.\n", time.Since(start).Seconds())
	return nil
}

func (s *story) topology() error {
	s.title("A cloud node, a pod, a NAT router, an edge node")
	s.cloud = s.lab.Cloud("cloud-1")
	s.pod = s.cloud.Pod("pod-1")
	site := s.lab.Site("home")
	s.router = site.Router
	s.edge = site.Edge("edge-1")
	if err := os.MkdirAll(s.path(), 0o755); err != nil {
		return err
	}
	s.say(`Four network namespaces on this machine:

   pod-1  %-14s %s
     │
   cloud-1  %-12s %s
     │        (the edge can dial this network; nothing here has a route to the edge)
   router  %-13s masquerades, lets nothing in
     │
   edge-1  %-13s %s`,
		s.pod.V4, s.pod.V6, s.cloud.V4, s.cloud.V6, s.router.V4, s.edge.V4, s.edge.V6)
	s.say("On the edge run two programs that nobody here wrote: Prometheus' node exporter, and OpenSSH.")
	return errors.Join(s.startExporter(), s.startSSHD())
}

func (s *story) unreachable() error {
	s.title("Without a tunnel")
	s.say("The cloud cannot reach them.")
	_, _, err := s.show(s.cloud, command{args: s.curlMetrics(s.edge.V4), fails: true, want: "curl: (7)"})
	return err
}

func (s *story) tunnel() error {
	s.title("The tunnel")
	s.say("A small CA, a certificate for the server and one for the agent. The agent's certificate names the\nnode and its addresses: nothing else decides what is intercepted.")
	for _, args := range [][]string{
		{"pki", "init", "--dir", "pki"},
		{"pki", "issue-server", "--dir", "pki", "--name", "cloud-1", "--host", s.cloud.V4.String(), "--host", s.cloud.V6.String()},
		{"pki", "issue-agent", "--dir", "pki", "--node", "edge-1", "--ip", s.edge.V4.String(), "--ip", s.edge.V6.String()},
	} {
		if _, _, err := s.show(s.cloud, command{args: append([]string{"tunnelctl"}, args...)}); err != nil {
			return err
		}
	}
	s.say("The server on the cloud node loads the BPF programs. (--cgroup-root: all the nodes of this demo share one kernel,\nso each has a cgroup folder of its own. On a real node the default is right.)")
	if err := s.startServer(); err != nil {
		return err
	}
	s.say("The agent on the edge dials out, through the NAT router.")
	if err := s.startAgent(); err != nil {
		return err
	}
	if err := s.targets("online"); err != nil {
		return err
	}
	if _, _, err := s.show(s.cloud, command{args: []string{"tunnelctl", "tunnels"}, want: "edge-1"}); err != nil {
		return err
	}
	_, _, err := s.show(s.cloud, command{args: []string{"tunnelctl", "targets"}, want: s.edge.V4.String()})
	return err
}

// targets waits until the server lists the edge's address in that state.
func (s *story) targets(state string) error {
	return s.until(30*time.Second, func(ctx context.Context) error {
		out, err := s.cloud.Command(ctx, s.program("tunnelctl"), "targets").CombinedOutput()
		if err != nil {
			return fmt.Errorf("tunnelctl targets: %w: %s", err, out)
		}
		for line := range strings.Lines(string(out)) {
			if strings.Contains(line, s.edge.V4.String()) && strings.Contains(line, state) {
				return nil
			}
		}
		return fmt.Errorf("%s is not %s:\n%s", s.edge.V4, state, out)
	})
}

func (s *story) fromTheHost() error {
	s.title("From the cloud node")
	s.say("The same curl, unchanged. The address is still not routed: the kernel sends the connect() into the tunnel.")
	for _, addr := range []netip.Addr{s.edge.V4, s.edge.V6} {
		if _, _, err := s.show(s.cloud, command{args: s.curlMetrics(addr), only: buildInfo, want: buildInfo}); err != nil {
			return err
		}
	}
	s.say("curl believes that it talks to the edge itself: getpeername() shows the original destination.")
	_, _, err := s.show(s.cloud, command{
		args: []string{"curl", "-sS", "-o", "/dev/null", "-w", "%{remote_ip}:%{remote_port}", s.metricsURL(s.edge.V4)},
		want: exporterAt(s.edge.V4),
	})
	return err
}

func (s *story) fromThePod() error {
	s.title("From a pod")
	s.say("A pod has its own network namespace. Nothing was configured in it.")
	for _, addr := range []netip.Addr{s.edge.V4, s.edge.V6} {
		if _, _, err := s.show(s.pod, command{args: s.curlMetrics(addr), only: buildInfo, want: buildInfo}); err != nil {
			return err
		}
	}
	return nil
}

func (s *story) ssh() error {
	s.title("OpenSSH")
	s.say("ssh checks the edge's own host key: the bytes pass through the tunnel untouched.")
	for _, c := range []struct {
		from *netlab.Node
		to   netip.Addr
	}{{s.cloud, s.edge.V4}, {s.pod, s.edge.V6}} {
		args := append([]string{"ssh"}, foreign.SSHOptions()...)
		args = append(args, "root@"+c.to.String(), "echo $SSH_CONNECTION; echo this is the network namespace $(readlink /proc/self/ns/net)")
		where, err := s.edge.Run("readlink", "/proc/self/ns/net")
		if err != nil {
			return err
		}
		if _, _, err := s.show(c.from, command{args: args, want: where}); err != nil {
			return err
		}
	}
	return nil
}

func (s *story) prometheus() error {
	s.title("Prometheus")
	s.say("Prometheus runs in the pod and scrapes the edge's two addresses.")
	if err := s.startPrometheus(); err != nil {
		return err
	}
	query := []string{
		"curl", "-sS", fmt.Sprintf("http://127.0.0.1:%d/api/v1/query?query=up", prometheusPort),
	}
	want := []string{
		fmt.Sprintf(`"instance":"%s"`, exporterAt(s.edge.V4)),
		fmt.Sprintf(`"instance":"%s"`, exporterAt(s.edge.V6)),
	}
	err := s.until(20*time.Second, func(ctx context.Context) error {
		out, err := s.pod.Command(ctx, query[0], query[1:]...).CombinedOutput()
		if err != nil {
			return err
		}
		text := string(out)
		if strings.Contains(text, want[0]) && strings.Contains(text, want[1]) && strings.Count(text, `,"1"]`) == 2 {
			return nil
		}
		return fmt.Errorf("not both up: %s", text)
	})
	if err != nil {
		return err
	}
	_, _, err = s.show(s.pod, command{args: query, want: want[0]})
	return err
}

func (s *story) kernel() error {
	s.title("In the kernel")
	s.say("The programs on the cloud node's cgroup, as bpftool sees them, and the maps of targets: state and node of each address.")
	if _, _, err := s.show(s.cloud, command{args: []string{"bpftool", "cgroup", "show", s.cloud.Cgroup()}, lines: 12, want: "connect4"}); err != nil {
		return err
	}
	maps, err := filepath.Glob(filepath.Join(s.cloud.BPFFS(), "edge-tunnel", "v1", "maps", "*"))
	if err != nil {
		return err
	}
	for _, path := range maps {
		want := map[string]string{"targets": "TARGET_ONLINE", "target_nodes": "edge-1"}[filepath.Base(path)]
		if want == "" {
			continue
		}
		inside := "/sys/fs/bpf" + strings.TrimPrefix(path, s.cloud.BPFFS())
		if _, _, err := s.show(s.cloud, command{args: []string{"bpftool", "map", "dump", "pinned", inside}, lines: 16, want: want}); err != nil {
			return err
		}
	}
	s.say("Every verdict is counted.")
	_, _, err = s.show(s.cloud, command{
		args: []string{"curl", "-sS", "http://127.0.0.1:10265/metrics"}, only: "edge_tunnel_bpf_total", lines: 30, want: "redirected_pod6",
	})
	if err != nil {
		return err
	}
	s.say("One record for each finished connection, in the server's log.")
	fmt.Fprintln(s.out)
	s.print(lastLines(s.server.Log(), 3), "", 3)
	return nil
}

func (s *story) agentDies() error {
	s.title("The agent dies")
	s.say("SIGKILL. The server notices, and the kernel refuses at once: no packet leaves, nobody waits.")
	fmt.Fprintf(s.out, "\nedge-1$ kill -KILL %d\n", s.agent.PID())
	s.agent.Kill()
	if err := s.targets("offline"); err != nil {
		return err
	}
	for _, node := range []*netlab.Node{s.cloud, s.pod} {
		_, took, err := s.show(node, command{args: s.curlMetrics(s.edge.V4), fails: true, want: "curl: (7)"})
		if err != nil {
			return err
		}
		fmt.Fprintf(s.out, "    (after %d ms, most of it to start curl)\n", took.Milliseconds())
	}
	s.say("It comes back, and so do the connections.")
	if err := s.startAgent(); err != nil {
		return err
	}
	if err := s.targets("online"); err != nil {
		return err
	}
	_, _, err := s.show(s.cloud, command{args: s.curlMetrics(s.edge.V4), only: buildInfo, want: buildInfo})
	return err
}

func (s *story) serverStops() error {
	s.title("The server stops")
	s.say("SIGTERM: it tells the agents, lets open connections finish, and leaves its programs pinned for a successor.")
	fmt.Fprintf(s.out, "\ncloud-1$ kill -TERM %d\n", s.server.PID())
	if err := s.server.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(s.ctx, 20*time.Second)
	defer cancel()
	if err := s.server.Wait(ctx); err != nil {
		return fmt.Errorf("tunnel-server: %w", err)
	}
	fmt.Fprintln(s.out, "    exit status 0")
	s.say("While it is away nothing goes to the edge's address by accident: connections are refused.")
	if _, _, err := s.show(s.cloud, command{args: s.curlMetrics(s.edge.V4), fails: true, want: "curl: (7)"}); err != nil {
		return err
	}
	s.say("Uninstalling removes the programs.")
	if _, _, err := s.show(s.cloud, command{args: []string{"tunnelctl", "cleanup"}}); err != nil {
		return err
	}
	out, _, err := s.show(s.cloud, command{args: []string{"bpftool", "cgroup", "show", s.cloud.Cgroup()}})
	if err == nil && strings.Contains(out, "connect4") {
		return errors.New("tunnelctl cleanup left programs attached")
	}
	return err
}

func (s *story) metricsURL(addr netip.Addr) string {
	return "http://" + exporterAt(addr) + "/metrics"
}

// buildInfo is a line of the node exporter's that is easy to recognise.
const buildInfo = "node_exporter_build_info"

// curlMetrics leaves no room for excuses: no proxy, no retry, five seconds.
func (s *story) curlMetrics(addr netip.Addr) []string {
	return []string{"curl", "-sS", "--max-time", "5", s.metricsURL(addr)}
}

func lastLines(text string, n int) string {
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
