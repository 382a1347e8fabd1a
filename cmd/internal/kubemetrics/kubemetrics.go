// SPDX-License-Identifier: Apache-2.0

//go:build !nokube

// Package kubemetrics gives a daemon a second address for its metrics, for those whom the API server knows and allows it. Built with the tag nokube
// it offers none, and the program does without client-go.
package kubemetrics

import (
	"context"
	"crypto/tls"
	"log/slog"
	"net"

	"github.com/spf13/pflag"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
	"github.com/edge-tunnel/edge-tunnel/cmd/internal/daemon"
	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
	"github.com/edge-tunnel/edge-tunnel/pkg/kube"
)

// Options are what the flag says.
type Options struct{ listen string }

// Flags adds the flag.
func (o *Options) Flags(fs *pflag.FlagSet) {
	cli.ListenVar(fs, &o.listen, "metrics", "Also serve metrics here, over TLS, to who shows a token that the API server knows (TokenReview) and whose owner may get /metrics"+
		" (SubjectAccessReview). It needs --kubeconfig or a pod's ServiceAccount. Default: nowhere.")
}

// On says whether there is to be one.
func (o *Options) On() bool { return o.listen != "" }

// Door is the open address. Nil is none.
type Door struct {
	ln     net.Listener
	scrape admin.Scrape
}

// Addr is where it is to be, "" for nowhere.
func (o *Options) Addr() string { return o.listen }

// Open opens the address, or returns nil if none is wanted. The certificate may be nil, see [admin.Scrape].
func (o *Options) Open(ctx context.Context, env cli.Env, kubeconfig string, certificate func() (*tls.Certificate, error), log *slog.Logger) (*Door, error) {
	if !o.On() {
		return nil, nil
	}
	client, err := kube.NewClient(kube.ClientOptions{Kubeconfig: kubeconfig, UserAgent: cli.VersionLine(env.Name)})
	if err != nil {
		return nil, cli.WithHint(err, "--metrics asks the API server: outside of a pod, --kubeconfig says where that is")
	}
	ln, err := daemon.Listen(ctx, "--metrics", o.listen)
	if err != nil {
		return nil, err
	}
	log.Info("metrics over TLS", "addr", ln.Addr().String())
	return &Door{ln, admin.Scrape{Review: kube.NewReviewer(client, "/metrics").Review, Certificate: certificate, Log: log}}, nil
}

// Close closes what Serve has not been called for.
func (d *Door) Close() {
	if d != nil {
		_ = d.ln.Close()
	}
}

// Serve shows the server's metrics until ctx ends.
func (d *Door) Serve(ctx context.Context, server *admin.Server) error {
	if d == nil {
		return nil
	}
	d.scrape.Metrics = server.Metrics()
	return d.scrape.Serve(ctx, d.ln)
}
