// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
)

// output is how a command answers: for people, or as JSON whose names are a contract (see the views of package admin).
type output struct{ json bool }

// flag adds -o.
func (o *output) flag(cmd *cobra.Command) {
	cli.ChoiceVarP(cmd.Flags(), &o.json, "output", "o", []cli.Choice[bool]{{Word: "table", Value: false}, {Word: "json", Value: true}},
		"For people, or for programs.")
	complete := cobra.FixedCompletions([]string{"table", "json"}, cobra.ShellCompDirectiveNoFileComp)
	if err := cmd.RegisterFlagCompletionFunc("output", complete); err != nil {
		panic(err) // the flag was added a line above
	}
}

// write answers with v as JSON, or calls table.
func (o output) write(w io.Writer, v any, table func(io.Writer) error) error {
	if !o.json {
		return table(w)
	}
	encoder := json.NewEncoder(w)
	encoder.SetEscapeHTML(false)
	encoder.SetIndent("", "  ")
	return encoder.Encode(v)
}

// table aligns rows below a header. Cells come from other processes and other machines, so each is made visible.
func table(w io.Writer, header string, rows [][]string) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, strings.Join(strings.Fields(header), "\t"))
	for _, row := range rows {
		cells := make([]string, len(row))
		for i, cell := range row {
			if cell == "" {
				cell = "-"
			}
			cells[i] = cli.Visible(cell)
		}
		fmt.Fprintln(t, strings.Join(cells, "\t"))
	}
	return t.Flush()
}

// pairs aligns names and values.
func pairs(w io.Writer, rows [][2]string) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, row := range rows {
		if row[1] != "" {
			fmt.Fprintf(t, "%s\t%s\n", row[0], cli.Visible(row[1]))
		}
	}
	return t.Flush()
}

// duration is a length of time in its two largest units.
func duration(d time.Duration) string {
	const day = 24 * time.Hour
	switch {
	case d < 0:
		return "-" + duration(-d)
	case d < time.Second:
		return d.Round(100 * time.Microsecond).String()
	case d < time.Minute:
		return fmt.Sprintf("%.1fs", d.Seconds())
	case d < time.Hour:
		return fmt.Sprintf("%dm%ds", d/time.Minute, d%time.Minute/time.Second)
	case d < day:
		return fmt.Sprintf("%dh%dm", d/time.Hour, d%time.Hour/time.Minute)
	}
	return fmt.Sprintf("%dd%dh", d/day, d%day/time.Hour)
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

// since is how long ago a time was; empty for none.
func since(now, t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return duration(max(0, now.Sub(t)))
}

// until is a time with how far away it is; empty for none.
func until(now, t time.Time) string {
	switch {
	case t.IsZero():
		return ""
	case t.Before(now):
		return fmt.Sprintf("%s (%s ago)", t.UTC().Format(time.DateTime), duration(now.Sub(t)))
	}
	return fmt.Sprintf("%s (in %s)", t.UTC().Format(time.DateTime), duration(t.Sub(now)))
}

// size is a number of bytes in the unit that keeps it short.
func size[N int64 | uint64](n N) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	value, unit := float64(n)/1024, 0
	for value >= 1024 && unit < 5 {
		value, unit = value/1024, unit+1
	}
	return fmt.Sprintf("%.1f %ciB", value, "KMGTPE"[unit])
}

func plural(n int, one, many string) string {
	if n == 1 {
		return fmt.Sprintf("%d %s", n, one)
	}
	return fmt.Sprintf("%d %s", n, many)
}
