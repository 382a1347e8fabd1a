// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
)

func statusCommand(env cli.Env) *cobra.Command {
	d, o := newDaemon(), output{}
	cmd := command(&cobra.Command{
		Use:   "status [--control PATH] [-o json]",
		Short: "Show how a daemon is doing.",
		Long:  "Shows how the daemon on this node is doing: whether it is ready and what is missing, its certificate, its programs in the kernel.",
		Example: examples(
			"The server on this node, or the agent where there is no server:", "tunnelctl status",
			"What keeps it from being ready:", `tunnelctl status -o json | jq -r '.conditions[] | select(.ok | not) | .name + ": " + .reason'`),
	}, nil, func(ctx context.Context, _ []string) error {
		status, err := d.client().Status(ctx)
		if err != nil {
			return err
		}
		return o.write(env.Stdout, status, func(w io.Writer) error { return writeStatus(w, status, time.Now()) })
	})
	d.flag(cmd, true)
	o.flag(cmd)
	return cmd
}

func writeStatus(w io.Writer, s admin.Status, now time.Time) error {
	ready := "yes"
	switch {
	case s.Draining:
		ready = "no, it is draining"
	case !s.Ready:
		ready = "no"
	}
	rows := [][2]string{
		{"tunnel-" + s.Role, s.Name},
		{"version", s.Version},
		{"process", fmt.Sprintf("%d, for %s", s.PID, since(now, s.Started))},
		{"ready", ready},
	}
	for _, c := range s.Conditions {
		if c.OK {
			rows = append(rows, [2]string{"  " + cli.Visible(c.Name), "ok"})
		} else {
			rows = append(rows, [2]string{"  " + cli.Visible(c.Name), "not ok: " + c.Reason})
		}
	}
	rows = append(rows,
		[2]string{"tunnels", fmt.Sprint(s.Tunnels)},
		[2]string{"connections", fmt.Sprint(s.Connections)},
		[2]string{"certificate", fmt.Sprintf("%s, serial %s", s.Certificate.Name, s.Certificate.Serial)},
		[2]string{"  ends", until(now, s.Certificate.NotAfter)},
		[2]string{"  not loaded", s.Certificate.Error},
	)
	if r := s.Certificate.Renewal; r != nil {
		rows = append(rows, [2]string{"  renewed", until(now, r.Due)}, [2]string{"  not renewed", r.Error}, [2]string{"  not kept on disk", r.Disk})
	}
	if s.Server != nil {
		rows = append(rows, serverRows(s.Server)...)
	}
	if s.Agent != nil {
		rows = append(rows, agentRows(s.Agent)...)
	}
	return pairs(w, rows)
}

func serverRows(s *admin.ServerStatus) [][2]string {
	rows := [][2]string{
		{"listens at", s.Listen},
		{"intercepts", map[string]string{"all": "connections of the host and of pods", "host": "connections of the host"}[s.Intercept]},
		{"  ports", list(s.TunneledPorts)},
		{"  ports from", portsRow(s.PortsConfig)},
		{"peers", strings.Join(s.Peers, ", ")},
		{"  targets", fmt.Sprintf("%d online, %d offline, %d ambiguous, %d refused",
			s.Targets.Online, s.Targets.Offline, s.Targets.Ambiguous, s.Targets.Refused)},
		{"cluster", clusterRow(s.Cluster)},
		{"redirects to", list(s.RedirectPorts)},
		{"  for pods at", list(s.NodeAddrs)},
		{"kernel state", s.Pins},
	}
	for _, h := range s.Hooks {
		text := fmt.Sprintf("program %d, link %d", h.Program, h.Link)
		if !h.Attached {
			text = "not attached"
		}
		if len(h.Others) > 0 {
			text += "; beside it: " + strings.Join(h.Others, ", ")
		}
		rows = append(rows, [2]string{"  " + cli.Visible(h.Name), text})
	}
	for _, m := range s.Missing {
		rows = append(rows, [2]string{"  does without", m})
	}
	return rows
}

func portsRow(c *admin.PortsConfig) string {
	if c == nil {
		return ""
	}
	text := "the flags and ConfigMap " + c.ConfigMap
	switch {
	case !c.Complete:
		text += ", which could not be read yet: what was in force before stays"
	case !c.Exists:
		text += ", which is not there"
	case c.Kept:
		text += ", in which nothing is understood: what was in force before stays"
	}
	if c.Error != "" {
		text += fmt.Sprintf(", as of %s: %s", c.Since.Local().Format(time.DateTime), c.Error)
	}
	for _, p := range c.Problems {
		text += "; " + p
	}
	return text
}

func clusterRow(c *admin.Cluster) string {
	switch {
	case c == nil:
		return ""
	case c.Error != "" && !c.Complete:
		return "its Nodes have not been listed yet: " + c.Error
	case !c.Complete:
		return "its Nodes have not been listed yet"
	case c.Error != "":
		return fmt.Sprintf("%d of %d nodes are tunneled, as of %s: %s", c.Tunneled, c.Nodes, c.Since.Local().Format(time.DateTime), c.Error)
	}
	return fmt.Sprintf("%d of %d nodes are tunneled", c.Tunneled, c.Nodes)
}

func agentRows(a *admin.AgentStatus) [][2]string {
	return [][2]string{
		{"dials servers", strings.Join(a.Servers, " ")},
		{"  found by", lookupRow(a.Lookup)},
		{"delivers to", list(a.Addrs)},
		{"  loopback ports", list(a.LocalhostPorts)},
		{"  ports from", localhostRow(a.LocalhostConfig)},
		{"  also", strings.Join(a.Allow, " ")},
	}
}

func lookupRow(l *admin.Lookup) string {
	if l == nil {
		return ""
	}
	text := "Service " + l.Service
	if l.Stored {
		text += ", before this start"
	}
	if l.Error != "" {
		text += fmt.Sprintf(", as of %s: %s", l.Since.Local().Format(time.DateTime), l.Error)
	}
	if l.Disk != "" {
		text += "; not kept on disk: " + l.Disk
	}
	for _, p := range l.Problems {
		text += "; " + p
	}
	return text
}

func localhostRow(c *admin.LocalhostConfig) string {
	if c == nil {
		return ""
	}
	text := "the ConfigMap in " + c.Dir
	switch {
	case c.Error != "":
		text += fmt.Sprintf(", which cannot be read since %s: %s", c.Since.Local().Format(time.DateTime), c.Error)
	case !c.Exists:
		text += ", which says nothing about them: those of the flags"
	case c.Kept:
		text += ", in which none is understood: what was in force before stays"
	}
	for _, p := range c.Problems {
		text += "; " + p
	}
	return text
}

func list[T any](values []T) string {
	texts := make([]string, len(values))
	for i, v := range values {
		texts[i] = fmt.Sprint(v)
	}
	return strings.Join(texts, " ")
}
