// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
)

func forgetCommand(env cli.Env) *cobra.Command {
	d, o := newDaemon(), output{}
	cmd := command(&cobra.Command{
		Use:   "forget NODE [--control PATH] [-o json]",
		Short: "Make the server forget a node and its addresses.",
		Long: "Makes the server on this node forget a node that is gone for good. A node once known stays a target, so that connections to it " +
			"are refused while it is away instead of reaching a stranger; after this its addresses are left alone. Its tunnels are closed. " +
			"A node whose agent still runs is known again as soon as the agent has come back: put it into the deny file first." +
			"\n\nEvery server has its own memory: do this on each cloud node.",
		Example: examples("The node edge-7 was scrapped:", "tunnelctl forget edge-7"),
	}, func(args []string) error {
		switch len(args) {
		case 0:
			return cli.WithHint(cli.Usagef("which node?"), "give its name; tunnelctl targets shows the known ones")
		case 1:
			return nil
		}
		return cli.WithHint(cli.Usagef("%d nodes at once", len(args)), "forget them one by one")
	}, func(ctx context.Context, args []string) error {
		forgotten, err := d.client().Forget(ctx, args[0])
		if errors.Is(err, admin.ErrUnknownNode) {
			hint := "tunnelctl targets shows the known nodes"
			if name := cli.Nearest(args[0], d.nodes(ctx)); name != "" {
				hint = fmt.Sprintf("did you mean %s?", name)
			}
			return cli.WithHint(err, hint)
		}
		if err != nil {
			return err
		}
		return o.write(env.Stdout, forgotten, func(w io.Writer) error {
			fmt.Fprintf(w, "forgot %s: %s no longer intercepted\n", cli.Visible(forgotten.Node), plural(forgotten.Targets, "address is", "addresses are"))
			return nil
		})
	})
	cmd.ValidArgsFunction = func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return d.nodes(cmd.Context()), cobra.ShellCompDirectiveNoFileComp
	}
	d.flag(cmd, false)
	o.flag(cmd)
	return cmd
}

// nodes are the names that the server knows, none when it cannot be asked.
func (d *daemon) nodes(ctx context.Context) []string {
	answer, err := d.client().Targets(ctx)
	if err != nil {
		return nil
	}
	var names []string
	for _, t := range answer.Targets {
		names = append(names, t.Node)
	}
	return names
}
