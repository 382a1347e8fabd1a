// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
	"github.com/edge-tunnel/edge-tunnel/pkg/identity"
)

func pkiCommand(env cli.Env) *cobra.Command {
	cmd := ofSubcommands(&cobra.Command{
		Use:   "pki",
		Short: "Make certificates, for use without a PKI of your own.",
		Long: "Keeps a small certificate authority in a folder, and issues certificates from it. Whoever has ca.key of that folder can " +
			"pretend to be any node: keep the folder on one machine, off the nodes, and copy only ca.crt and a node's own two files to it.",
		Example: examples(
			"Everything for one server and one agent:",
			"tunnelctl pki init --dir pki\ntunnelctl pki issue-server --dir pki --name cloud-1 --host cloud.example.com,192.0.2.1\ntunnelctl pki issue-agent --dir pki --node edge-1 --ip 10.99.1.10"),
	})
	cmd.AddCommand(pkiInitCommand(env), pkiServerCommand(env), pkiAgentCommand(env))
	return cmd
}

func pkiInitCommand(env cli.Env) *cobra.Command {
	var (
		dir string
		o   output
		ca  identity.CAOptions
	)
	cmd := command(&cobra.Command{
		Use:     "init --dir DIR",
		Short:   "Make a certificate authority in a folder.",
		Long:    "Makes a certificate authority in a folder: ca.crt, ca.key, and an index of what it issues. It never replaces one.",
		Example: examples("In the folder pki:", "tunnelctl pki init --dir pki"),
	}, nil, func(context.Context, []string) error {
		if err := checkValidity(ca.Validity); err != nil {
			return err
		}
		made, err := identity.InitCA(dir, ca)
		if err != nil {
			return err
		}
		view := caView{CertFile: made.CertFile(), NotAfter: made.NotAfter()}
		return o.write(env.Stdout, view, func(w io.Writer) error {
			fmt.Fprintln(w, "made a certificate authority")
			return pairs(w, [][2]string{
				{"  certificate", view.CertFile + ", for every daemon's --ca-cert"},
				{"  ends", until(time.Now(), view.NotAfter)},
			})
		})
	})
	dirFlag(cmd, &dir)
	cmd.Flags().DurationVar(&ca.Validity, "valid-for", 3653*24*time.Hour, "How long it may be used.")
	o.flag(cmd)
	return cmd
}

func pkiServerCommand(env cli.Env) *cobra.Command {
	var (
		dir, name string
		hosts     []string
		o         output
		ca        identity.CAOptions
	)
	cmd := command(&cobra.Command{
		Use:   "issue-server --dir DIR --name NAME --host IP-OR-DNS...",
		Short: "Issue the certificate of a server.",
		Long: "Issues the certificate of a tunnel-server, as NAME.crt and NAME.key in the folder. It is good for the hosts given: name every " +
			"address and DNS name at which agents and other servers dial it. Issue it again to renew it or to change the hosts.",
		Example: examples(
			"A server that agents dial by name, and other servers by address:",
			"tunnelctl pki issue-server --dir pki --name cloud-1 --host cloud.example.com --host 192.0.2.1,2001:db8::1"),
	}, nil, func(context.Context, []string) error {
		return issue(env, o, dir, ca, func(ca *identity.CA) (issuedView, error) {
			issued, err := ca.IssueServer(name, hosts)
			view := newIssuedView(ca, issued)
			view.Role, view.Hosts = "server", hosts
			return view, err
		})
	})
	dirFlag(cmd, &dir)
	cmd.Flags().StringVar(&name, "name", "", "`NAME` of the server.")
	cli.ListVar(cmd.Flags(), &hosts, "host", cli.List[string]{
		Type: "HOST", Form: "IP addresses and DNS names, such as 192.0.2.1,cloud.example.com", Parse: anything,
	}, "Addresses and names at which the server is dialed.")
	cli.Require(cmd.Flags(), "name", "host")
	leafFlags(cmd, &ca, &o)
	return cmd
}

func pkiAgentCommand(env cli.Env) *cobra.Command {
	var (
		dir, node string
		addrs     []netip.Addr
		reissue   bool
		o         output
		ca        identity.CAOptions
	)
	cmd := command(&cobra.Command{
		Use:   "issue-agent --dir DIR --node NAME [--ip IP...]",
		Short: "Issue the certificate of an agent.",
		Long: "Issues the certificate of a node's tunnel-agent, as NAME.crt and NAME.key in the folder. Servers intercept connections to the " +
			"addresses in it. An address that was issued to another node is refused, since two nodes that claim one address lose it " +
			"both. Issue it again to renew it or to change the addresses." +
			"\n\nWithout --ip it proves the node's name only: in Kubernetes the addresses come from the Node object.",
		Example: examples(
			"A node with an address of each family:", "tunnelctl pki issue-agent --dir pki --node edge-1 --ip 10.99.1.10,2001:db8:99::10",
			"Its address has moved to a new node:", "tunnelctl pki issue-agent --dir pki --node edge-2 --ip 10.99.1.10 --reissue"),
	}, nil, func(context.Context, []string) error {
		return issue(env, o, dir, ca, func(ca *identity.CA) (issuedView, error) {
			issued, err := ca.IssueAgent(node, addrs, reissue)
			view := newIssuedView(ca, issued)
			view.Role, view.Addrs = "agent", addrs
			return view, err
		})
	})
	dirFlag(cmd, &dir)
	cmd.Flags().StringVar(&node, "node", "", "`NAME` of the node.")
	cli.AddrsVar(cmd.Flags(), &addrs, "ip", "Addresses of the node that are to be intercepted.")
	cmd.Flags().BoolVar(&reissue, "reissue", false, "Issue also addresses that were issued to another node.")
	cli.Require(cmd.Flags(), "node")
	leafFlags(cmd, &ca, &o)
	return cmd
}

func dirFlag(cmd *cobra.Command, dir *string) {
	cmd.Flags().StringVar(dir, "dir", "", "Folder `DIR` of the certificate authority.")
	cli.Require(cmd.Flags(), "dir")
	_ = cmd.MarkFlagDirname("dir") // for completion only
}

func leafFlags(cmd *cobra.Command, ca *identity.CAOptions, o *output) {
	cmd.Flags().DurationVar(&ca.LeafValidity, "valid-for", 365*24*time.Hour, "How long it may be used, at most as long as the CA's own certificate.")
	o.flag(cmd)
}

// anything leaves the judgement to the CA.
func anything(s string) (string, error) { return s, nil }

func checkValidity(d time.Duration) error {
	if d <= 0 {
		return cli.WithHint(cli.Usagef("--valid-for: %v is over at once", d), "expected a duration above 0, such as 8760h for a year")
	}
	return nil
}

// caView is a new CA as JSON.
type caView struct {
	CertFile string    `json:"cert_file"`
	NotAfter time.Time `json:"not_after"`
}

// issuedView is an issued certificate as JSON.
type issuedView struct {
	Name     string       `json:"name"`
	Role     string       `json:"role"`            // "agent" or "server"
	Addrs    []netip.Addr `json:"addrs,omitempty"` // of an agent
	Hosts    []string     `json:"hosts,omitempty"` // of a server
	Serial   string       `json:"serial"`
	NotAfter time.Time    `json:"not_after"`
	CAFile   string       `json:"ca_file"`
	CertFile string       `json:"cert_file"`
	KeyFile  string       `json:"key_file"`
	Moved    []movedView  `json:"moved,omitempty"` // addresses that were another node's
}

type movedView struct {
	Addr   netip.Addr `json:"addr"`
	Node   string     `json:"node"`
	Serial string     `json:"serial"`
}

func newIssuedView(ca *identity.CA, issued identity.Issued) issuedView {
	view := issuedView{
		Name: issued.Name, Serial: issued.Serial, NotAfter: issued.NotAfter,
		CAFile: ca.CertFile(), CertFile: issued.CertFile, KeyFile: issued.KeyFile,
	}
	for _, m := range issued.Moved {
		view.Moved = append(view.Moved, movedView(m))
	}
	return view
}

func issue(env cli.Env, o output, dir string, options identity.CAOptions, do func(*identity.CA) (issuedView, error)) error {
	if err := checkValidity(options.LeafValidity); err != nil {
		return err
	}
	ca, err := identity.OpenCA(dir, options)
	if err != nil {
		return err
	}
	view, err := do(ca)
	if request := (*identity.RequestError)(nil); errors.As(err, &request) {
		return cli.Usagef("%w", err)
	}
	if err != nil {
		return err
	}
	return o.write(env.Stdout, view, func(w io.Writer) error { return writeIssued(w, view) })
}

func writeIssued(w io.Writer, v issuedView) error {
	fmt.Fprintf(w, "issued the certificate of %s %s\n", v.Role, v.Name)
	claims := list(v.Addrs) + strings.Join(v.Hosts, " ")
	if claims == "" {
		claims = "no addresses: servers take them from Kubernetes"
	}
	err := pairs(w, [][2]string{
		{"  for", claims},
		{"  certificate", v.CertFile},
		{"  key", v.KeyFile + ", secret"},
		{"  serial", v.Serial},
		{"  ends", until(time.Now(), v.NotAfter)},
	})
	for _, m := range v.Moved {
		fmt.Fprintf(w, "%s was %s's: put \"serial:%s\" into the servers' deny file, that certificate still claims it\n", m.Addr, m.Node, m.Serial)
	}
	return err
}
