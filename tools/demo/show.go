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
	s.print(text, c.lines)

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

// print shows the first lines of some output, indented.
func (s *story) print(text string, limit int) {
	if limit == 0 {
		limit = 10
	}
	lines := strings.Split(text, "\n")
	for i, line := range lines {
		if i == limit {
			fmt.Fprintf(s.out, "    … %d more lines\n", len(lines)-limit)
			return
		}
		fmt.Fprintf(s.out, "    %s\n", line)
	}
}

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
