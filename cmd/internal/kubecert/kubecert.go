// SPDX-License-Identifier: Apache-2.0

//go:build !nokube

// Package kubecert gives a daemon its certificate from Kubernetes: the flags, and how it is doing. Built with the tag nokube it offers
// neither, and the program does without client-go.
package kubecert

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"syscall"

	"github.com/spf13/pflag"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
	"github.com/edge-tunnel/edge-tunnel/pkg/identity"
	"github.com/edge-tunnel/edge-tunnel/pkg/kube"
)

// Options are what the flags say. Kubeconfig and Node may have flags elsewhere.
type Options struct {
	On         bool
	Kubeconfig string
	Node       string
	dir        string

	// Control is called for each socket to the API server before it connects; may be nil.
	Control func(network, address string, c syscall.RawConn) error

	namespace, service string // of the servers; for servers
}

// Flags adds the flags of both daemons.
func (o *Options) Flags(fs *pflag.FlagSet) {
	o.dir = "/var/lib/edge-tunnel/certificate"
	cli.ChoiceVar(fs, &o.On, "certificate-from", []cli.Choice[bool]{{Word: "files", Value: false}, {Word: "kubernetes", Value: true}},
		"Where the certificate comes from: --cert and --key, or the CertificateSigningRequest API, where tunnel-controller signs it.")
	fs.StringVar(&o.dir, "certificate-dir", o.dir, "Keep the certificate from Kubernetes in this `DIR`, for starts without the API server.")
}

// ClientFlags adds those that say where the API server is, and on which Node this is.
func (o *Options) ClientFlags(fs *pflag.FlagSet, env cli.Env) {
	o.Node = env.Getenv("NODE_NAME")
	fs.StringVar(&o.Kubeconfig, "kubeconfig", "", "`FILE` that says where the API server is. Default: the pod's ServiceAccount.")
	fs.StringVar(&o.Node, "node-name", o.Node, "`NAME` of this machine's Node. Default: $NODE_NAME.")
}

// ServerFlags adds those of servers.
func (o *Options) ServerFlags(fs *pflag.FlagSet) {
	o.namespace, o.service = "kube-system", "x-tunnel-server-svc"
	fs.StringVar(&o.namespace, "namespace", o.namespace, "`NAMESPACE` of --service.")
	fs.StringVar(&o.service, "service", o.service, "`NAME` of the Service at which agents dial servers: a certificate from Kubernetes has its addresses and names.")
}

// Validate checks the flags and completes files.
func (o *Options) Validate(files *identity.Files) error {
	if !o.On {
		return nil
	}
	var errs []error
	if files.Cert != "" || files.Key != "" {
		errs = append(errs, cli.Usagef("--cert and --key cannot be given with --certificate-from kubernetes"))
	}
	if err := identity.CheckName(o.Node); err != nil {
		errs = append(errs, cli.WithHint(cli.Usagef("--node-name: %w", err), "the name of this machine's Node; in a pod, set $NODE_NAME from spec.nodeName"))
	}
	if !filepath.IsAbs(o.dir) {
		errs = append(errs, cli.WithHint(cli.Usagef("--certificate-dir: %q is relative", o.dir), "expected a path that begins with /"))
	}
	files.Cert, files.Key = kube.CertificateFile(o.dir), kube.CertificateFile(o.dir)
	return errors.Join(errs...)
}

// Late is whose certificate may come after the start, empty if it may not.
func (o *Options) Late() string {
	if !o.On {
		return ""
	}
	return o.Node
}

// Certificate is kept while Run runs. Nil is one from files.
type Certificate struct{ kept *kube.Certificate }

// Start makes a Certificate for store, or nil if it comes from files.
func (o *Options) Start(env cli.Env, role identity.Role, store *identity.Store, log *slog.Logger) (*Certificate, error) {
	if !o.On {
		return nil, nil
	}
	kube.LogTo(log)
	client, err := kube.NewClient(kube.ClientOptions{Kubeconfig: o.Kubeconfig, UserAgent: env.Name + "/" + cli.Version(), Control: o.Control})
	if err != nil {
		return nil, cli.WithHint(err, "outside of a pod, --kubeconfig says where the API server is")
	}
	kept, err := kube.NewCertificate(kube.CertificateConfig{
		Client: client, Role: role, Node: o.Node, Dir: o.dir, Namespace: o.namespace, Service: o.service, Present: store.Present,
		Believed: func() bool { return store.Stats().Untrusted == "" }, Log: log,
	})
	if err != nil {
		return nil, err
	}
	return &Certificate{kept}, nil
}

// Run asks for the certificate and renews it until ctx ends.
func (c *Certificate) Run(ctx context.Context) error {
	if c == nil {
		return nil
	}
	return c.kept.Run(ctx)
}

// Status adds to a view of the certificate what is known about its renewal.
func (c *Certificate) Status(view *admin.Certificate) {
	if c == nil {
		return
	}
	st := c.kept.Stats()
	view.Renewal = &admin.Renewal{Due: st.Due, Error: st.Error, Disk: st.Disk}
}

// Metrics are those of the renewal; names begin with prefix.
func (c *Certificate) Metrics(prefix string) []admin.Metric {
	if c == nil {
		return nil
	}
	st := c.kept.Stats()
	disk := 0
	if st.Disk != "" {
		disk = 1
	}
	return []admin.Metric{
		admin.Counter(prefix+"certificate_requests_total", "Certificates asked for in Kubernetes.", st.Asked),
		admin.Counter(prefix+"certificates_issued_total", "Certificates received from Kubernetes.", st.Issued),
		admin.Counter(prefix+"certificate_request_failures_total", "Attempts to get a certificate that failed and are repeated.", st.Failed),
		admin.Gauge(prefix+"certificate_unsaved", "1 if the certificate in use could not be kept on disk.", disk),
	}
}
