// SPDX-License-Identifier: Apache-2.0

//go:build nokube

// Package kubemetrics, built with the tag nokube, has no flag: there is nobody to ask who may have the metrics.
package kubemetrics

import (
	"context"
	"crypto/tls"
	"log/slog"

	"github.com/spf13/pflag"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
)

// Options has no flag.
type Options struct{}

// Door is always nil.
type Door struct{}

// Flags adds none.
func (*Options) Flags(*pflag.FlagSet) {}

// On says no.
func (*Options) On() bool { return false }

// Open opens nothing.
func (*Options) Open(context.Context, cli.Env, string, func() (*tls.Certificate, error), *slog.Logger) (*Door, error) {
	return nil, nil
}

// Close closes nothing.
func (*Door) Close() {}

// Serve ends at once.
func (*Door) Serve(context.Context, *admin.Server) error { return nil }
