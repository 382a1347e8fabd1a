// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"path/filepath"
	"time"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
	"github.com/edge-tunnel/edge-tunnel/cmd/internal/kubecert"
	"github.com/edge-tunnel/edge-tunnel/cmd/internal/kubemetrics"
	"github.com/edge-tunnel/edge-tunnel/pkg/deliver"
	"github.com/edge-tunnel/edge-tunnel/pkg/identity"
	"github.com/edge-tunnel/edge-tunnel/pkg/kube/servercfg"
	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

// options is the parsed command line.
type options struct {
	servers []string // HOST:PORT; empty: to be looked up
	lookup  lookupOptions
	tunnels int
	files   identity.Files
	cluster kubecert.Options
	scrape  kubemetrics.Options

	loopbackPorts []uint16
	configDir     string // empty: none
	allow         []deliver.Rule

	admin        string
	control      string
	drainTimeout time.Duration
	pprof        bool
	log          cli.Log
}

func parse(env cli.Env) (options, error) {
	o := options{
		tunnels:       2,
		loopbackPorts: []uint16{10250, 10255, 10266, 10267},
		admin:         "127.0.0.1:10266",
		control:       "/run/edge-tunnel/agent.sock",
		drainTimeout:  10 * time.Second,
	}
	flags := cli.Flags{
		Summary: "tunnel-agent runs on an edge node. It dials tunnel-servers and delivers to the node's own services what cloud" +
			" nodes connect to. Nothing has to reach the edge node from outside.",
		Synopsis: []string{"--server HOST[:PORT] --ca-cert FILE --cert FILE --key FILE [flags]",
			"--ca-cert FILE --certificate-from kubernetes [--kubeconfig FILE] [flags]"},
		Examples: []cli.Example{
			{What: "Keep tunnels to two servers.",
				Command: "tunnel-agent --server cloud-1.example.com,cloud-2.example.com --ca-cert ca.crt --cert edge-1.crt --key edge-1.key"},
			{What: "Give the cloud a printer's web page and the SSH ports of a site, too.",
				Command: "tunnel-agent … --allow 192.168.7.20:80,443 --allow 192.168.8.0/24:22"},
			{What: "See what it does.", Command: "tunnelctl status --control /run/edge-tunnel/agent.sock"},
		},
		Notes: "The agent alone decides what is dialed: this node's addresses on any port, loopback for --localhost-proxy-ports, and" +
			" what --allow lists. Never link-local or multicast addresses, and its own admin port only if it is listed.\n\nSIGHUP reads" +
			" certificates and the deny file again (they are also watched). SIGTERM takes no more connections and lets the open ones finish.",
	}

	servers := flags.Group("Servers")
	cli.HostPortsVar(servers, &o.servers, "server", wire.Port, "Addresses of tunnel-servers. A tunnel is kept to each of several;"+
		" a single one may be a load balancer, see --tunnels.")
	o.lookup.flags(servers)
	servers.IntVar(&o.tunnels, "tunnels", o.tunnels, "Tunnels to keep to distinct servers behind a single --server, or that were looked up.")

	tls := flags.Group("Identity")
	tls.StringVar(&o.files.CA, "ca-cert", "", "PEM `FILE` with the CAs that sign agents and servers.")
	tls.StringVar(&o.files.Cert, "cert", "", "PEM `FILE` with this node's certificate.")
	tls.StringVar(&o.files.Key, "key", "", "PEM `FILE` with its key, mode 0600.")
	tls.StringVar(&o.files.Deny, "deny-file", "", "Names and serial:HEX of servers' certificates to refuse, one a line in this `FILE`; watched.")
	o.cluster.Flags(tls)
	o.cluster.ClientFlags(tls, env)
	flags.Require("ca-cert")
	flags.RequireUnless(func() bool { return o.lookup.possible(env, o.cluster.Kubeconfig) }, "server")
	flags.RequireUnless(func() bool { return o.cluster.On }, "cert", "key")

	policy := flags.Group("What may be dialed")
	cli.PortsVar(policy, &o.loopbackPorts, "localhost-proxy-ports", "Ports for which loopback is dialed instead of the destination,"+
		" and then, if it refuses, the node's address that was asked for.")
	policy.StringVar(&o.configDir, "config-dir", "", "`DIR` where a pod has the ConfigMap edge-tunnel-server-cfg as a volume: its "+servercfg.KeyLocalhost+
		" count instead of --localhost-proxy-ports, as soon as they are there.")
	var allow []string
	policy.StringArrayVar(&allow, "allow", nil, "`ADDR-OR-CIDR:PORTS` beyond this node that may be dialed: 192.168.7.20:22,8000-8100"+
		" or [fd00:7::/64]:*. Addresses only, names are not looked up.")

	host := flags.Group("Host")
	cli.ListenVar(host, &o.admin, "admin", "Where to serve health, metrics and read-only state.")
	o.scrape.Flags(host)
	host.StringVar(&o.control, "control", o.control, "Unix socket for tunnelctl, at this `PATH`.")
	host.DurationVar(&o.drainTimeout, "drain-timeout", o.drainTimeout, "How long open connections may go on after SIGTERM.")
	host.BoolVar(&o.pprof, "pprof", false, "Serve profiles on the admin address.")

	cli.LogVar(flags.Group("Logging"), &o.log)
	if err := flags.Parse(env); err != nil {
		return options{}, err
	}
	var errs []error
	errs = append(errs, o.lookup.validate(len(o.servers) > 0), o.cluster.Validate(&o.files))
	var err error
	if o.allow, err = deliver.ParseRules(allow...); err != nil {
		errs = append(errs, cli.WithHint(cli.Usagef("--allow: %w", err), "expected ADDR-OR-CIDR:PORTS, such as 192.168.7.20:22,80 or [fd00:7::/64]:8000-8100"))
	}
	if o.configDir != "" && !filepath.IsAbs(o.configDir) {
		errs = append(errs, cli.WithHint(cli.Usagef("--config-dir: %q is relative", o.configDir), "expected a path that begins with /"))
	}
	if o.tunnels < 1 || o.tunnels > 16 {
		errs = append(errs, cli.Usagef("--tunnels: %d is not between 1 and 16", o.tunnels))
	}
	if o.drainTimeout < 0 {
		errs = append(errs, cli.Usagef("--drain-timeout: %v is negative", o.drainTimeout))
	}
	return o, errors.Join(errs...)
}
