// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
	"github.com/edge-tunnel/edge-tunnel/pkg/redirect"
)

func cleanupCommand(env cli.Env) *cobra.Command {
	var (
		k     = kernel{}
		d     = newDaemon()
		leave bool
		wait  time.Duration
		state string
	)
	cmd := command(&cobra.Command{
		Use:   "cleanup [--leave] [--wait DURATION] [--state-dir DIR] [--bpffs DIR] [--control PATH]",
		Short: "Remove the programs and maps that a server left in the kernel.",
		Long: "Detaches the programs of a tunnel-server that has ended, and removes what it pinned: the last step of an uninstallation. From then " +
			"on connections to edge addresses go wherever the routing table sends them. It is refused while a tunnel-server runs, unless --leave has that go " +
			"first: it drains, and its process does nothing more until somebody ends it. " +
			"Where nothing is left there is nothing to do, and that is success.",
		Example: examples(
			"After the server was uninstalled:", "tunnelctl cleanup --state-dir /var/lib/edge-tunnel",
			"Before its DaemonSet is deleted, whether it runs or not:", "tunnelctl cleanup --leave --state-dir /var/lib/edge-tunnel",
			"In a container that has the host's file system at /host:", "tunnelctl cleanup --bpffs /host/sys/fs/bpf"),
	}, nil, func(ctx context.Context, _ []string) error {
		err := redirect.Cleanup(k.bpffs)
		if leave && errors.Is(err, redirect.ErrInUse) {
			// It may be on its way out already, or not far enough in to be asked.
			if asked := d.client().Leave(ctx); asked != nil && !errors.Is(asked, admin.ErrNotRunning) {
				return asked
			}
			err = waitForCleanup(ctx, k.bpffs, wait)
		}
		if err != nil {
			return err
		}
		fmt.Fprintf(env.Stdout, "nothing of edge-tunnel is left in %s\n", k.bpffs)
		if state == "" {
			return nil
		}
		if err := forgetState(state); err != nil {
			return err
		}
		fmt.Fprintf(env.Stdout, "nothing is remembered in %s\n", state)
		return nil
	})
	k.flag(cmd)
	d.flag(cmd, false)
	cmd.Flags().BoolVar(&leave, "leave", false, "Have a tunnel-server that runs leave the node.")
	cmd.Flags().DurationVar(&wait, "wait", 30*time.Second, "How long it may take to leave.")
	cmd.Flags().StringVar(&state, "state-dir", "", "Remove what a server remembers in this `DIR`, too: targets and ports.")
	return cmd
}

// waitForCleanup cleans up as soon as the server has let go.
func waitForCleanup(ctx context.Context, bpffs string, wait time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	for {
		err := redirect.Cleanup(bpffs)
		if !errors.Is(err, redirect.ErrInUse) {
			return err
		}
		select {
		case <-ctx.Done():
			return cli.WithHint(err, "it is still draining: give it longer with --wait, or look at its log")
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// forgetState removes the files that tunnel-server keeps in its --state-dir, and those that it has set aside; nothing else.
func forgetState(dir string) error {
	var errs []error
	for _, pattern := range []string{"targets.json", "targets.json.corrupt-*", "ports.json"} {
		files, err := filepath.Glob(filepath.Join(dir, pattern))
		errs = append(errs, err)
		for _, file := range files {
			errs = append(errs, os.Remove(file))
		}
	}
	return errors.Join(errs...)
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
