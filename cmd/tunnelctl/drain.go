// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
)

func drainCommand(env cli.Env) *cobra.Command {
	d := newDaemon()
	cmd := command(&cobra.Command{
		Use:   "drain [--control PATH]",
		Short: "Make the server end as SIGTERM does, without cutting connections.",
		Long: "Makes the server on this node end as SIGTERM does: it sends its agents to the other servers, lets open connections finish " +
			"for as long as its --drain-timeout allows, and exits. What it leaves in the kernel keeps refusing connections to targets until it runs again.",
		Example: examples("Before the node is rebooted:", "tunnelctl drain"),
	}, nil, func(ctx context.Context, _ []string) error {
		if err := d.client().Drain(ctx); err != nil {
			return err
		}
		fmt.Fprintln(env.Stdout, "the server is draining and will exit")
		return nil
	})
	d.flag(cmd, false)
	return cmd
}
