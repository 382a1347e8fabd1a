// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"errors"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
	"github.com/edge-tunnel/edge-tunnel/cmd/internal/daemon"
	"github.com/edge-tunnel/edge-tunnel/cmd/internal/kubecert"
	"github.com/edge-tunnel/edge-tunnel/cmd/internal/kubemetrics"
	"github.com/edge-tunnel/edge-tunnel/pkg/identity"
	"github.com/edge-tunnel/edge-tunnel/pkg/kube"
	"github.com/edge-tunnel/edge-tunnel/pkg/redirect"
	"github.com/edge-tunnel/edge-tunnel/pkg/tunnel"
	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

// alwaysTunneled are the kubelet's ports. They are tunneled whatever the flags say.
var alwaysTunneled = [...]uint16{10250, 10255}

// options is the parsed command line.
type options struct {
	listenTunnel string
	peers        []string // HOST:PORT
	files        identity.Files
	cluster      kubecert.Options
	scrape       kubemetrics.Options

	ports        []uint16 // tunneled ports, alwaysTunneled included
	cidrs        []netip.Prefix
	redirectPort uint16
	nodeIPs      []netip.Addr // at most one for each family
	hostOnly     bool         // leave pods alone
	optOut       []string     // cgroup folders, relative to cgroupRoot

	kubernetes bool           // targets come from Nodes
	kubeconfig string         // empty: in a pod
	nodeName   string         // our own Node
	edge       kube.EdgeNodes // which are tunneled
	connected  bool           // only those whose agents were seen
	services   []netip.Prefix // ranges of Services
	portsFrom  string         // NAMESPACE/NAME of a ConfigMap with further ports; empty: none
	daemonSet  string         // NAMESPACE/NAME of our own; empty: none
	leases     string         // namespace of the servers' Leases

	admin        string
	control      string
	bpffs        string
	cgroupRoot   string
	stateDir     string
	drainTimeout time.Duration
	maxConns     int
	maxPerPod    int // 0: what intercept makes of maxConns
	pprof        bool
	log          cli.Log
}

func parse(env cli.Env) (options, error) {
	o := options{
		listenTunnel: ":10262",
		redirectPort: redirect.DefaultPort,
		admin:        "127.0.0.1:10265",
		control:      "/run/edge-tunnel/server.sock",
		bpffs:        "/sys/fs/bpf",
		nodeName:     env.Getenv("NODE_NAME"),
		leases:       cmp.Or(env.Getenv("POD_NAMESPACE"), "kube-system"),
		edge:         kube.DefaultEdgeNodes(),
		drainTimeout: 10 * time.Second,
	}
	flags := cli.Flags{
		Summary: "tunnel-server runs on a cloud node. Its eBPF programs redirect every connect() of the node and its pods to a" +
			" tunneled port of an edge address; the bytes go, untouched, through the tunnel that the edge node's agent opened.",
		Synopsis: []string{"--ca-cert FILE --cert FILE --key FILE [flags]", "--ca-cert FILE --certificate-from kubernetes [flags]"},
		Examples: []cli.Example{
			{What: "Serve the agents whose certificates this CA signed; intercept 10250 and 10255.",
				Command: "tunnel-server --ca-cert ca.crt --cert cloud-1.crt --key cloud-1.key --state-dir /var/lib/edge-tunnel"},
			{What: "Intercept Prometheus' exporters too, and only for edge addresses of one range.",
				Command: "tunnel-server … --tunneled-ports 9100,9256 --target-cidr 10.99.0.0/16"},
			{What: "In Kubernetes: edge addresses come from Node objects, not from agents' certificates.",
				Command: "tunnel-server … --nodes-from kubernetes --node-name cloud-1 --kubeconfig /etc/edge-tunnel/kubeconfig"},
			{What: "See what it does.", Command: "tunnelctl status; tunnelctl targets; bpftool map dump pinned /sys/fs/bpf/edge-tunnel/v1/maps/targets"},
		},
		Notes: "The programs and maps stay in the kernel when tunnel-server ends: connects to edge addresses are then refused" +
			" instead of going astray. `tunnelctl cleanup` removes them.\n\nSIGHUP reads certificates and the deny file again (they" +
			" are also watched). SIGTERM drains.",
	}

	tls := flags.Group("Identity")
	tls.StringVar(&o.files.CA, "ca-cert", "", "PEM `FILE` with the CAs that sign agents and servers.")
	tls.StringVar(&o.files.Cert, "cert", "", "PEM `FILE` with this server's certificate.")
	tls.StringVar(&o.files.Key, "key", "", "PEM `FILE` with its key, mode 0600.")
	tls.StringVar(&o.files.Deny, "deny-file", "", "Names and serial:HEX of certificates to refuse, one a line in this `FILE`; watched.")
	o.cluster.Flags(tls)
	o.cluster.ServerFlags(tls)
	flags.Require("ca-cert")
	flags.RequireUnless(func() bool { return o.cluster.On }, "cert", "key")

	icept := flags.Group("Interception")
	cli.PortsVar(icept, &o.ports, "tunneled-ports", "Destination ports to intercept on edge addresses, beside 10250 and 10255.")
	cli.PrefixesVar(icept, &o.cidrs, "target-cidr", "Only addresses in these ranges can be edge addresses. Default: any that no rule forbids.")
	cli.ChoiceVar(icept, &o.hostOnly, "intercept", []cli.Choice[bool]{{Word: "all", Value: false}, {Word: "host", Value: true}},
		"Whose connects: all processes of the node, or only those in the host's network namespace.")
	icept.StringSliceVar(&o.optOut, "opt-out-cgroup", nil, "Leave the processes of this cgroup2 `DIR`, below --cgroup-root, alone. May be repeated.")
	cli.PortVar(icept, &o.redirectPort, "redirect-port", "First of the 8 ports that intercepted connections are redirected to.")
	cli.AddrsVar(icept, &o.nodeIPs, "node-ip", "Addresses, one for each family, at which the node's pods reach this server."+
		" Default: the source addresses of the default routes, followed when they change.")

	tun := flags.Group("Tunnels and connections")
	cli.ListenVar(tun, &o.listenTunnel, "listen-tunnel", "Where agents log in.")
	cli.HostPortsVar(tun, &o.peers, "peer", wire.Port, "Other servers, by which edge nodes without a tunnel here are reached. The same list may be"+
		" given to all: a server leaves itself out.")
	tun.IntVar(&o.maxConns, "max-connections", o.maxConns, "Open intercepted connections at most; more are reset. 0: half of the open file limit, 65536 at most.")
	tun.IntVar(&o.maxPerPod, "max-connections-per-pod", o.maxPerPod, "Open connections of one pod's container (counted by cgroup) at most;"+
		" more are reset. The host's own have no such limit. 0: a quarter of --max-connections.")
	tun.DurationVar(&o.drainTimeout, "drain-timeout", o.drainTimeout, "How long open connections may go on after SIGTERM.")

	cluster := flags.Group("Kubernetes")
	cli.ChoiceVar(cluster, &o.kubernetes, "nodes-from", []cli.Choice[bool]{{Word: "certificates", Value: false}, {Word: "kubernetes", Value: true}},
		"Where edge nodes and their addresses are taken from: the certificates of agents that have logged in, or Node objects.")
	cluster.StringVar(&o.kubeconfig, "kubeconfig", "", "`FILE` that says where the API server is. Default: the pod's ServiceAccount.")
	cluster.StringVar(&o.nodeName, "node-name", o.nodeName, "`NAME` of this machine's Node: a list without it is not believed. Default: $NODE_NAME.")
	cli.ListVar(cluster, &o.edge.Labels, "edge-label", cli.List[kube.Label]{
		Type: "KEY=VALUE", Form: "labels, such as node-role.kubernetes.io/edge=true", Parse: kube.ParseLabel,
	}, "Nodes with one of these labels are edge nodes.")
	cluster.StringSliceVar(&o.edge.Modes, "edge-mode-label", o.edge.Modes, "Edge nodes whose label of one of these `KEY`s is set, and not to normal,"+
		" are reached directly and never intercepted.")
	cli.PrefixesVar(cluster, &o.services, "service-cidr", "Ranges of Services, which cannot be edge addresses, where the API server does not tell them (before Kubernetes 1.33).")
	cluster.StringVar(&o.daemonSet, "daemonset", "", "`NAMESPACE/NAME` of the DaemonSet that this server is a pod of. When it ends because that goes away from this node"+
		" for good, nothing stays in the kernel.")
	cluster.StringVar(&o.leases, "lease-namespace", o.leases, "`NAMESPACE` of the Leases by which servers find each other, without --peer."+
		" Default: $POD_NAMESPACE.")
	cli.ChoiceVar(cluster, &o.connected, "intercept-nodes", []cli.Choice[bool]{{Word: "selected", Value: false}, {Word: "connected", Value: true}},
		"Which of them are intercepted: all, or those whose agent has logged in once, for a migration.")

	const portsFrom = "kube-system/edge-tunnel-server-cfg"
	cluster.StringVar(&o.portsFrom, "ports-configmap", portsFrom, "`NAMESPACE/NAME` of a ConfigMap with further ports to tunnel (http-proxy-ports,"+
		" https-proxy-ports: \"9100, 9200\"), followed. OpenYurt's is kube-system/yurt-tunnel-server-cfg. Empty: none.")

	host := flags.Group("Host")
	cli.ListenVar(host, &o.admin, "admin", "Where to serve health, metrics and read-only state.")
	o.scrape.Flags(host)
	host.StringVar(&o.control, "control", o.control, "Unix socket for tunnelctl, at this `PATH`.")
	host.StringVar(&o.stateDir, "state-dir", "", "Remember edge nodes across reboots in this `DIR`. Default: only the kernel's maps remember, until a reboot.")
	host.StringVar(&o.bpffs, "bpffs", o.bpffs, "`DIR` where the BPF file system is mounted.")
	host.StringVar(&o.cgroupRoot, "cgroup-root", "", "Attach to this cgroup2 `DIR`. Default: the root of the hierarchy; it has to be mounted.")
	host.BoolVar(&o.pprof, "pprof", false, "Serve profiles on the admin address.")

	cli.LogVar(flags.Group("Logging"), &o.log)
	if err := flags.Parse(env); err != nil {
		return options{}, err
	}
	if !o.kubernetes && o.portsFrom == portsFrom {
		o.portsFrom = ""
	}
	o.ports = append(o.ports, alwaysTunneled[:]...)
	slices.Sort(o.ports)
	o.ports = slices.Compact(o.ports)
	return o, o.validate()
}

func (o *options) validate() error {
	o.cluster.Kubeconfig, o.cluster.Node = o.kubeconfig, o.nodeName
	errs := []error{o.cluster.Validate(&o.files)}
	first, last := int(o.redirectPort), int(o.redirectPort)+redirect.Ports-1
	if last > 65535 {
		errs = append(errs, cli.Usagef("--redirect-port: %d leaves no room for %d ports", first, redirect.Ports))
	}
	notRedirect := func(flag string, port int) {
		if port >= first && port <= last {
			errs = append(errs, cli.WithHint(cli.Usagef("--%s: %d is one of the redirect ports %d-%d", flag, port, first, last),
				"choose other redirect ports with --redirect-port"))
		}
	}
	for _, p := range o.ports {
		notRedirect("tunneled-ports", int(p))
	}
	notRedirect("listen-tunnel", portOf(o.listenTunnel))
	notRedirect("admin", portOf(o.admin))
	notRedirect("metrics", portOf(o.scrape.Addr()))
	var v4, v6 int
	for _, a := range o.nodeIPs {
		if a.Is4() {
			v4++
		} else {
			v6++
		}
		if a.IsLoopback() || a.IsUnspecified() || a.IsMulticast() || a.IsLinkLocalUnicast() {
			errs = append(errs, cli.Usagef("--node-ip: pods cannot reach %v", a))
		}
	}
	if v4 > 1 || v6 > 1 {
		errs = append(errs, cli.Usagef("--node-ip: at most one address for each family"))
	}
	for _, folder := range o.optOut {
		if relative := strings.TrimPrefix(folder, "/"); !filepath.IsLocal(relative) || filepath.Clean(relative) == "." {
			errs = append(errs, cli.WithHint(cli.Usagef("--opt-out-cgroup: %q is not a folder below --cgroup-root", folder), "expected DIR, such as kubepods/besteffort"))
		}
	}
	for _, dir := range []struct{ flag, path string }{{"bpffs", o.bpffs}, {"cgroup-root", o.cgroupRoot}} {
		if dir.path != "" && !filepath.IsAbs(dir.path) {
			errs = append(errs, cli.WithHint(cli.Usagef("--%s: %q is relative", dir.flag, dir.path), "expected a path that begins with /"))
		}
	}
	if o.drainTimeout < 0 {
		errs = append(errs, cli.Usagef("--drain-timeout: %v is negative", o.drainTimeout))
	}
	if len(o.peers) > tunnel.MaxPeers {
		errs = append(errs, cli.Usagef("--peer: %d servers are more than %d", len(o.peers), tunnel.MaxPeers))
	}
	if o.kubernetes && o.nodeName == "" {
		errs = append(errs, cli.WithHint(cli.Usagef("--node-name: the name of this machine's Node is missing"), "in a pod, set $NODE_NAME from spec.nodeName"))
	}
	for _, object := range []struct{ flag, text, example string }{
		{"ports-configmap", o.portsFrom, "kube-system/yurt-tunnel-server-cfg"}, {"daemonset", o.daemonSet, "kube-system/tunnel-server"},
	} {
		if namespace, name, ok := strings.Cut(object.text, "/"); object.text != "" && (!ok || namespace == "" || name == "" || strings.Contains(name, "/")) {
			errs = append(errs, cli.WithHint(cli.Usagef("--%s: %q is not NAMESPACE/NAME", object.flag, object.text), "expected such as "+object.example))
		}
	}
	if !o.kubernetes && (o.kubeconfig != "" && !o.cluster.On && !o.scrape.On() || o.connected || o.portsFrom != "" || o.daemonSet != "" || len(o.services) > 0) {
		errs = append(errs, cli.WithHint(cli.Usagef("--kubeconfig, --ports-configmap, --daemonset, --service-cidr and --intercept-nodes are about Kubernetes"), "add --nodes-from kubernetes"))
	}
	if o.maxConns < 0 {
		errs = append(errs, cli.Usagef("--max-connections: %d is negative", o.maxConns))
	}
	if o.maxPerPod < 0 {
		errs = append(errs, cli.Usagef("--max-connections-per-pod: %d is negative", o.maxPerPod))
	}
	if o.maxConns > 0 && o.maxPerPod > o.maxConns {
		errs = append(errs, cli.Usagef("--max-connections-per-pod: %d is more than --max-connections, %d", o.maxPerPod, o.maxConns))
	}
	return errors.Join(errs...)
}

// portOf is the port of an address that [cli.ListenVar] has taken.
func portOf(listen string) int {
	_, text, _ := net.SplitHostPort(listen)
	port, _ := strconv.Atoi(text)
	return port
}

// connections is how many intercepted connections may be open: each needs a descriptor, and so do the tunnels.
func (o *options) connections() int {
	const most = 65536
	if o.maxConns > 0 {
		return o.maxConns
	}
	return int(max(16, min(most, daemon.OpenFiles(2048)/2)))
}
