// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"errors"
	"strings"
	"time"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
	"github.com/edge-tunnel/edge-tunnel/cmd/internal/kubemetrics"
	"github.com/edge-tunnel/edge-tunnel/pkg/identity"
	"github.com/edge-tunnel/edge-tunnel/pkg/kube"
)

// options is the parsed command line.
type options struct {
	kubeconfig string
	namespace  string
	lease      string

	secret  string
	trust   string
	service string
	agent   string
	server  string
	ca      identity.AuthorityOptions

	nodeName string // our own Node; may be empty
	leases   string // namespace of the servers' Leases
	status   bool   // keep the condition of Nodes, and write Events
	edge     kube.EdgeNodes
	records  string // NAMESPACE/NAME of the ConfigMap with names of nodes; empty: none

	admin  string
	scrape kubemetrics.Options
	pprof  bool
	log    cli.Log
}

func parse(env cli.Env) (options, error) {
	o := options{
		namespace: "kube-system",
		lease:     "edge-tunnel-controller",
		secret:    "edge-tunnel-ca",
		trust:     "edge-tunnel-ca",
		service:   "x-tunnel-server-svc",
		agent:     "tunnel-agent",
		server:    "tunnel-server",
		nodeName:  env.Getenv("NODE_NAME"),
		leases:    cmp.Or(env.Getenv("POD_NAMESPACE"), "kube-system"),
		edge:      kube.DefaultEdgeNodes(),
		records:   "kube-system/edge-tunnel-nodes",
		ca:        identity.AuthorityOptions{Validity: 2 * 365 * 24 * time.Hour, LeafValidity: 30 * 24 * time.Hour},
		admin:     "127.0.0.1:10269",
	}
	flags := cli.Flags{
		Summary: "tunnel-controller does, in Kubernetes, what needs rights. It decides who gets certificates for tunnels, and signs them: it is the signer " +
			identity.SignerAgent + " and " + identity.SignerServer + " of the CertificateSigningRequest API. It keeps the names of nodes for CoreDNS, and says on Nodes how their tunnels are." +
			" Of several, one does the work.",
		Synopsis: []string{"[flags]"},
		Examples: []cli.Example{
			{What: "In a pod, with the rights of its ServiceAccount.", Command: "tunnel-controller --admin :10269"},
			{What: "On a machine outside the cluster.", Command: "tunnel-controller --kubeconfig ~/.kube/config"},
			{What: "See what was asked for, and why it was denied.",
				Command: "kubectl get csr --field-selector spec.signerName=" + identity.SignerAgent},
		},
		Notes: "An agent gets a certificate with the name of the node that its credential proves: a token of a pod of its ServiceAccount on that" +
			" node, or the node's kubelet's. A server gets one with the names and addresses of --service and of its own Node. Nothing else is" +
			" granted.\n\nThe Secret and the ConfigMap of the CA have to exist, and are filled: the right to make Secrets would be the right to" +
			" everything in the namespace. A Secret that is emptied gets a new CA; what the old one has signed stays believed until it ends.",
	}

	api := flags.Group("Kubernetes")
	api.StringVar(&o.kubeconfig, "kubeconfig", "", "`FILE` that says where the API server is. Default: the pod's ServiceAccount.")
	api.StringVar(&o.namespace, "namespace", o.namespace, "`NAMESPACE` of all that is named below.")
	api.StringVar(&o.lease, "lease", o.lease, "`NAME` of the Lease by which one of several is chosen.")

	certs := flags.Group("Certificates")
	certs.StringVar(&o.secret, "ca-secret", o.secret, "`NAME` of the Secret in which the CA is kept.")
	certs.StringVar(&o.trust, "ca-configmap", o.trust, "`NAME` of the ConfigMap that tells agents and servers which CAs to believe.")
	certs.StringVar(&o.service, "service", o.service, "`NAME` of the Service at which agents dial the servers.")
	certs.StringVar(&o.agent, "agent-account", o.agent, "`NAME` of the agents' ServiceAccount.")
	certs.StringVar(&o.server, "server-account", o.server, "`NAME` of the servers' ServiceAccount.")
	certs.DurationVar(&o.ca.Validity, "ca-validity", o.ca.Validity, "How long a CA is valid. Its successor is made when a third of that is left.")
	certs.DurationVar(&o.ca.LeafValidity, "certificate-validity", o.ca.LeafValidity, "How long a certificate is valid. It is renewed when 10 to 30 % of that are left.")

	nodes := flags.Group("Nodes")
	nodes.StringVar(&o.nodeName, "node-name", o.nodeName, "`NAME` of the Node that this runs on: a list without it is not believed. Default: $NODE_NAME, or else any list with a Node is.")
	nodes.StringVar(&o.records, "dns-configmap", o.records, "`NAMESPACE/NAME` of the ConfigMap in which the names and addresses of all Nodes are kept, for CoreDNS."+
		" OpenYurt's is kube-system/yurt-tunnel-nodes. Empty: none.")
	nodes.StringVar(&o.leases, "lease-namespace", o.leases, "`NAMESPACE` of the servers' Leases: those of servers that are gone for good are deleted. Default: $POD_NAMESPACE.")
	nodes.BoolVar(&o.status, "node-status", true, "Say on Nodes how their tunnels are: the condition "+string(kube.ConditionReady)+", and Events.")
	cli.ListVar(nodes, &o.edge.Labels, "edge-label", cli.List[kube.Label]{
		Type: "KEY=VALUE", Form: "labels, such as node-role.kubernetes.io/edge=true", Parse: kube.ParseLabel,
	}, "Nodes with one of these labels are edge nodes, as for the servers.")
	nodes.StringSliceVar(&o.edge.Modes, "edge-mode-label", o.edge.Modes, "Edge nodes whose label of one of these `KEY`s is set, and not to normal, have no tunnel.")

	host := flags.Group("Host")
	cli.ListenVar(host, &o.admin, "admin", "Where to serve health, metrics and read-only state.")
	o.scrape.Flags(host)
	host.BoolVar(&o.pprof, "pprof", false, "Serve profiles on the admin address.")

	cli.LogVar(flags.Group("Logging"), &o.log)
	if err := flags.Parse(env); err != nil {
		return options{}, err
	}
	return o, o.validate()
}

func (o *options) validate() error {
	var errs []error
	for _, f := range []struct{ flag, value string }{
		{"namespace", o.namespace}, {"lease-namespace", o.leases}, {"lease", o.lease}, {"ca-secret", o.secret}, {"ca-configmap", o.trust}, {"service", o.service},
		{"agent-account", o.agent}, {"server-account", o.server},
	} {
		if identity.CheckName(f.value) != nil {
			errs = append(errs, cli.Usagef("--%s: %q is not a name of Kubernetes", f.flag, f.value))
		}
	}
	if o.nodeName != "" && identity.CheckName(o.nodeName) != nil {
		errs = append(errs, cli.Usagef("--node-name: %q is not a name of Kubernetes", o.nodeName))
	}
	if namespace, name, _ := strings.Cut(o.records, "/"); o.records != "" && (identity.CheckName(namespace) != nil || identity.CheckName(name) != nil) {
		errs = append(errs, cli.WithHint(cli.Usagef("--dns-configmap: %q is not NAMESPACE/NAME", o.records), "expected such as kube-system/edge-tunnel-nodes"))
	}
	if o.agent == o.server {
		errs = append(errs, cli.WithHint(cli.Usagef("--agent-account and --server-account are the same"), "each edge node could then be a server"))
	}
	for _, f := range []struct {
		flag  string
		value identity.AuthorityOptions
	}{{"ca-validity", identity.AuthorityOptions{Validity: o.ca.Validity}}, {"certificate-validity", identity.AuthorityOptions{LeafValidity: o.ca.LeafValidity}}} {
		if err := f.value.Validate(); err != nil {
			errs = append(errs, cli.Usagef("--%s: %w", f.flag, err))
		}
	}
	return errors.Join(errs...)
}
