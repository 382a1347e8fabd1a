// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
)

func tunnelsCommand(env cli.Env) *cobra.Command {
	d, o := newDaemon(), output{}
	cmd := command(&cobra.Command{
		Use:   "tunnels [--control PATH] [-o json]",
		Short: "List the tunnels of a daemon.",
		Long:  "Lists the tunnels between agents and servers: on a server those that agents opened, on an agent its own, with what keeps it from opening one.",
		Example: examples(
			"Who is connected to the server on this node:", "tunnelctl tunnels",
			"Nodes and round trip times, slowest first:", `tunnelctl tunnels -o json | jq -r '.tunnels | sort_by(-.rtt_seconds)[] | "\(.rtt_seconds) \(.node)"'`),
	}, nil, func(ctx context.Context, _ []string) error {
		answer, err := d.client().Tunnels(ctx)
		if err != nil {
			return err
		}
		slices.SortFunc(answer.Tunnels, func(a, b admin.Tunnel) int {
			return cmp.Or(cmp.Compare(a.Node, b.Node), cmp.Compare(a.Server, b.Server), a.Since.Compare(b.Since))
		})
		return o.write(env.Stdout, answer, func(w io.Writer) error {
			if len(answer.Tunnels) == 0 {
				fmt.Fprintln(env.Stderr, "no tunnels")
				return nil
			}
			return table(w, "NODE SERVER STATE REMOTE FOR RTT STREAMS SENT RECEIVED REMARK", tunnelRows(answer.Tunnels, time.Now()))
		})
	})
	d.flag(cmd, true)
	o.flag(cmd)
	return cmd
}

func tunnelRows(tunnels []admin.Tunnel, now time.Time) [][]string {
	var rows [][]string
	for _, t := range tunnels {
		rtt := ""
		if t.RTTSeconds > 0 {
			rtt = duration(seconds(t.RTTSeconds))
		}
		remark := t.Error
		if t.State == admin.TunnelWaiting {
			remark = fmt.Sprintf("again in %s", duration(seconds(t.RetrySeconds)))
			if t.Error != "" {
				remark += ": " + t.Error
			}
		}
		node := t.Node
		if t.Peer {
			node = "(peer)"
		}
		rows = append(rows, []string{
			node, t.Server, t.State, t.RemoteAddr, since(now, t.Since), rtt, fmt.Sprint(t.Streams), size(t.SentBytes), size(t.ReceivedBytes), remark,
		})
	}
	return rows
}
