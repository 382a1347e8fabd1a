// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"

	"github.com/spf13/cobra"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
)

func connectionsCommand(env cli.Env) *cobra.Command {
	d, o := newDaemon(), output{}
	cmd := command(&cobra.Command{
		Use:   "connections [--control PATH] [-o json]",
		Short: "List the open connections.",
		Long:  "Lists the connections that are open now, oldest first: on a server with the process that opened each, on an agent with what was dialed.",
		Example: examples(
			"Who talks to the edge from this node:", "tunnelctl connections",
			"Bytes received from each node:", `tunnelctl connections -o json | jq '.connections | group_by(.node)[] | {(.[0].node): map(.received_bytes) | add}'`),
	}, nil, func(ctx context.Context, _ []string) error {
		answer, err := d.client().Connections(ctx)
		if err != nil {
			return err
		}
		slices.SortFunc(answer.Connections, func(a, b admin.Connection) int {
			return cmp.Or(a.Started.Compare(b.Started), cmp.Compare(a.Trace, b.Trace))
		})
		return o.write(env.Stdout, answer, func(w io.Writer) error {
			if len(answer.Connections) == 0 {
				fmt.Fprintln(env.Stderr, "no connections")
				return nil
			}
			return table(w, "NODE SOURCE DESTINATION PROCESS FOR SENT RECEIVED TRACE", connectionRows(answer.Connections))
		})
	})
	d.flag(cmd, true)
	o.flag(cmd)
	return cmd
}

func connectionRows(connections []admin.Connection) [][]string {
	var rows [][]string
	for _, c := range connections {
		process := ""
		if c.PID != 0 {
			process = fmt.Sprintf("%s[%d]", c.Comm, c.PID)
		}
		rows = append(rows, []string{
			c.Node, c.Source, c.Destination, process, duration(seconds(c.DurationSeconds)), size(c.SentBytes), size(c.ReceivedBytes), c.Trace,
		})
	}
	return rows
}
