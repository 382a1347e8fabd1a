// SPDX-License-Identifier: Apache-2.0

//go:build nokube

package main

import (
	"context"
	"log/slog"

	"github.com/spf13/pflag"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
)

// lookupOptions has no flags: servers are given.
type lookupOptions struct{}

func (*lookupOptions) flags(*pflag.FlagSet) {}

func (*lookupOptions) possible(cli.Env, string) bool { return false }

func (*lookupOptions) validate(bool) error { return nil }

// lookup is always nil.
type lookup struct{}

func newLookup(cli.Env, options, *slog.Logger) (*lookup, error) { return nil, nil }

func (*lookup) run(context.Context, func([]string) error) error { return nil }

func (*lookup) ways() []string { return nil }

func (*lookup) name(string) string { return "" }

func (*lookup) view() *admin.Lookup { return nil }

func (*lookup) metrics() []admin.Metric { return nil }
