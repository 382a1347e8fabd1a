// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
	"github.com/edge-tunnel/edge-tunnel/pkg/redirect"
)

func cleanupCommand(env cli.Env) *cobra.Command {
	k := kernel{}
	cmd := command(&cobra.Command{
		Use:   "cleanup [--bpffs DIR]",
		Short: "Remove the programs and maps that a server left in the kernel.",
		Long: "Detaches the programs of a tunnel-server that has ended, and removes what it pinned: the last step of an uninstallation. From then " +
			"on connections to edge addresses go wherever the routing table sends them. It is refused while a tunnel-server runs. " +
			"Where nothing is left there is nothing to do, and that is success.",
		Example: examples(
			"After the server was uninstalled:", "tunnelctl cleanup",
			"In a container that has the host's file system at /host:", "tunnelctl cleanup --bpffs /host/sys/fs/bpf"),
	}, nil, func(context.Context, []string) error {
		if err := redirect.Cleanup(k.bpffs); err != nil {
			return err
		}
		fmt.Fprintf(env.Stdout, "nothing of edge-tunnel is left in %s\n", k.bpffs)
		return nil
	})
	k.flag(cmd)
	return cmd
}
