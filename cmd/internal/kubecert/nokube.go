// SPDX-License-Identifier: Apache-2.0

//go:build nokube

// Package kubecert, built with the tag nokube, has no flags: certificates come from files.
package kubecert

import (
	"context"
	"log/slog"
	"syscall"

	"github.com/spf13/pflag"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
	"github.com/edge-tunnel/edge-tunnel/pkg/identity"
)

// Options has no flags.
type Options struct {
	On               bool
	Kubeconfig, Node string
	Control          func(network, address string, c syscall.RawConn) error
}

// Certificate is always nil.
type Certificate struct{}

// Flags adds none.
func (*Options) Flags(*pflag.FlagSet) {}

// ClientFlags adds none.
func (*Options) ClientFlags(*pflag.FlagSet, cli.Env) {}

// ServerFlags adds none.
func (*Options) ServerFlags(*pflag.FlagSet) {}

// Validate finds nothing.
func (*Options) Validate(*identity.Files) error { return nil }

// Late is nobody's.
func (*Options) Late() string { return "" }

// Start starts nothing.
func (*Options) Start(cli.Env, identity.Role, *identity.Store, *slog.Logger) (*Certificate, error) {
	return nil, nil
}

// Run ends at once.
func (*Certificate) Run(context.Context) error { return nil }

// Status adds nothing.
func (*Certificate) Status(*admin.Certificate) {}

// Metrics are none.
func (*Certificate) Metrics(string) []admin.Metric { return nil }
