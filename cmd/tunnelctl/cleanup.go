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

func mountCommand(env cli.Env) *cobra.Command {
	k := kernel{}
	cmd := command(&cobra.Command{
		Use:   "mount-bpffs [--bpffs DIR]",
		Short: "Mount the bpf filesystem where the system has not.",
		Long: "Pinned programs and maps are what survives a restart of tunnel-server, and they are kept in this filesystem. systemd and most " +
			"distributions mount it at boot; where it is there, nothing is done, and that is success. What is pinned in it ends with it.",
		Example: examples(
			"Before the first start of tunnel-server, if nothing else does it:", "tunnelctl mount-bpffs",
			"In a privileged container that has the host's file system at /host, with mount propagation:", "tunnelctl mount-bpffs --bpffs /host/sys/fs/bpf"),
	}, nil, func(context.Context, []string) error {
		done, err := redirect.MountBPFFS(k.bpffs)
		if err != nil {
			return err
		}
		if done {
			fmt.Fprintf(env.Stdout, "mounted a bpf filesystem at %s\n", k.bpffs)
		} else {
			fmt.Fprintf(env.Stdout, "%s is a bpf filesystem already\n", k.bpffs)
		}
		return nil
	})
	k.flag(cmd)
	return cmd
}
