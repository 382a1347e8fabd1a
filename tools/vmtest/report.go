// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"strings"
)

// verdict is a job's end in a few words.
func (j jobResult) verdict() string {
	counts := fmt.Sprintf("%d passed, %d failed, %d skipped", j.passed, len(j.failed), len(j.skipped))
	switch {
	case !j.ended:
		return "did not end"
	case j.status == 128+9:
		return counts + ", killed after its time"
	case j.status != 0:
		return fmt.Sprintf("%s, status %d", counts, j.status)
	case j.passed+len(j.failed) == 0:
		return "no test ran"
	}
	return counts
}

func printJob(out io.Writer, j jobResult) {
	word := "ok  "
	if !j.ok() {
		word = "FAIL"
	}
	fmt.Fprintf(out, "  %s  %s: %s (%d s)\n", word, j.name, j.verdict(), int(j.took.Seconds()))
	for _, name := range j.skipped {
		fmt.Fprintf(out, "        skipped: %s\n", name)
	}
	for _, name := range j.failed {
		fmt.Fprintf(out, "        failed: %s\n", name)
	}
}

// evidence is what the jobs that did not end well printed, or the last that is known of a machine that ran none.
func (c *console) evidence() string {
	var b strings.Builder
	for _, j := range c.jobs {
		if !j.ok() {
			fmt.Fprintf(&b, "-- %s\n%s", j.name, withoutSuccess(j.output))
		}
	}
	if len(c.last)+len(c.rest) > 0 && !c.done {
		fmt.Fprintf(&b, "-- last words\n%s%s\n", c.last, c.rest)
	}
	return b.String()
}

// withoutSuccess leaves out that tests began or passed.
func withoutSuccess(output []byte) string {
	var b strings.Builder
	for line := range strings.Lines(string(output)) {
		text := strings.TrimLeft(line, " ")
		if !strings.HasPrefix(text, "=== ") && !strings.HasPrefix(text, "--- PASS") {
			b.WriteString(line)
		}
	}
	return b.String()
}
