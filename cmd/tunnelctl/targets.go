// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/spf13/cobra"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
)

func targetsCommand(env cli.Env) *cobra.Command {
	d, o, k := newDaemon(), output{}, kernel{}
	cmd := command(&cobra.Command{
		Use:   "targets [--control PATH] [--bpffs DIR] [-o json]",
		Short: "List the edge addresses that are intercepted, and those that are not.",
		Long: "Lists the edge addresses that the server on this node knows. Connections to an online one go through a tunnel; to an offline " +
			"or ambiguous one (claimed by several nodes) they are refused; a refused one is left alone, for the reason given." +
			"\n\nWhile no server runs, what is in force in the kernel is shown instead. That has no refused addresses.",
		Example: examples(
			"All of them:", "tunnelctl targets",
			"What is not intercepted, and why:", `tunnelctl targets -o json | jq -r '.targets[] | select(.reason) | "\(.addr) \(.node) \(.reason)"'`),
	}, nil, func(ctx context.Context, _ []string) error {
		answer, err := d.client().Targets(ctx)
		if errors.Is(err, admin.ErrNotRunning) {
			pinned, note, kernelErr := k.targets()
			if kernelErr != nil {
				return errors.Join(err, kernelErr)
			}
			fmt.Fprintln(env.Stderr, "note: "+note)
			answer, err = admin.TargetList{Source: admin.SourceKernel, Targets: pinned}, nil
		}
		if err != nil {
			return err
		}
		slices.SortFunc(answer.Targets, func(a, b admin.Target) int {
			return cmp.Or(a.Addr.Compare(b.Addr), cmp.Compare(a.Node, b.Node))
		})
		return o.write(env.Stdout, answer, func(w io.Writer) error {
			if len(answer.Targets) == 0 {
				fmt.Fprintln(env.Stderr, "no targets")
				return nil
			}
			return table(w, "ADDRESS NODE STATE REASON", targetRows(answer.Targets))
		})
	})
	d.flag(cmd, false)
	k.flag(cmd)
	o.flag(cmd)
	return cmd
}

func targetRows(targets []admin.Target) [][]string {
	var rows [][]string
	for _, t := range targets {
		addr := "" // of a node that has none
		if t.Addr.IsValid() {
			addr = t.Addr.String()
		}
		rows = append(rows, []string{addr, t.Node, t.State, t.Reason})
	}
	return rows
}
