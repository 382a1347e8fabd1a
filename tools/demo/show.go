// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/edge-tunnel/edge-tunnel/test/netlab"
)

// say prints narration: a paragraph, set off from commands and their output.
func (s *story) say(format string, args ...any) {
	fmt.Fprintf(s.out, "\n# %s\n", strings.ReplaceAll(fmt.Sprintf(format, args...), "\n", "\n# "))
}

// title begins a chapter.
func (s *story) title(text string) {
	fmt.Fprintf(s.out, "\n=== %s %s\n", text, strings.Repeat("=", max(0, 100-len(text))))
}

// command is one thing typed at a node's prompt.
type command struct {
	args  []string
	only  string // show the lines that begin with this
	lines int    // of output to show; 0: ten
	want  string // must be in the output
	fails bool   // must end with a status other than 0
}

// show runs a command on a node as a user would type it, prints what it writes, and checks it. It returns the output and how
// long it took.
func (s *story) show(node *netlab.Node, c command) (string, time.Duration, error) {
	fmt.Fprintf(s.out, "\n%s$ %s\n", node.Name, shellLine(c.args))
	ctx, cancel := context.WithTimeout(s.ctx, 30*time.Second)
	defer cancel()
	cmd := node.Command(ctx, s.program(c.args[0]), c.args[1:]...)
	cmd.Dir = s.lab.Dir()
	start := time.Now()
	raw, err := cmd.CombinedOutput()
	took := time.Since(start)
	text := strings.TrimRight(string(raw), "\n")
	s.print(text, c.only, c.lines)

	switch {
	case s.ctx.Err() != nil:
		return text, took, s.ctx.Err()
	case c.fails && err == nil:
		return text, took, fmt.Errorf("%s on %s should have failed", c.args[0], node.Name)
	case !c.fails && err != nil:
		return text, took, fmt.Errorf("%s on %s: %w", shellLine(c.args), node.Name, err)
	case !strings.Contains(text, c.want):
		return text, took, fmt.Errorf("%s on %s did not write %q", shellLine(c.args), node.Name, c.want)
	}
	return text, took, nil
}

// print shows some output, indented: the lines that begin with prefix, and no more than limit of them.
func (s *story) print(text, prefix string, limit int) {
	if limit == 0 {
		limit = 10
	}
	left := 0
	for line := range strings.SplitSeq(text, "\n") {
		switch {
		case limit == 0 || !strings.HasPrefix(line, prefix):
			left++
		case len(line) > width:
			fmt.Fprintf(s.out, "    %s…\n", line[:width])
			limit--
		default:
			fmt.Fprintf(s.out, "    %s\n", line)
			limit--
		}
	}
	if left > 0 {
		fmt.Fprintf(s.out, "    (%d lines more)\n", left)
	}
}

// width is where long lines end.
const width = 140

// shellLine is the command as it would be typed.
func shellLine(args []string) string {
	quoted := make([]string, len(args))
	for i, a := range args {
		if quoted[i] = a; strings.ContainsAny(a, " '\"{}()|&;<>$*?[]\\") {
			quoted[i] = "'" + strings.ReplaceAll(a, "'", `'\''`) + "'"
		}
	}
	return strings.Join(quoted, " ")
}

// until repeats a check until it succeeds, for at most the limit; the last error says what was missing.
func (s *story) until(limit time.Duration, check func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(s.ctx, limit)
	defer cancel()
	for {
		err := check(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			if s.ctx.Err() != nil {
				return s.ctx.Err()
			}
			return fmt.Errorf("after %v: %w", limit, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}
