// SPDX-License-Identifier: Apache-2.0

// Command sourcecheck fails when a source file lacks its licence header, or holds a note to do something later: such a
// note belongs into an issue, where somebody sees it.
package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"regexp"
	"strings"
)

func main() {
	if err := run(os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

func run(out io.Writer) error {
	listed, err := exec.Command("git", "ls-files", "-z").Output()
	if err != nil {
		return fmt.Errorf("git ls-files: %w", err)
	}
	found := 0
	for name := range strings.SplitSeq(strings.TrimRight(string(listed), "\x00"), "\x00") {
		content, err := os.ReadFile(name)
		if os.IsNotExist(err) {
			continue // removed in the work tree, not yet committed
		}
		if err != nil {
			return err
		}
		for _, sentence := range check(name, content) {
			fmt.Fprintln(out, sentence)
			found++
		}
	}
	if found > 0 {
		return fmt.Errorf("%d findings", found)
	}
	return nil
}

const (
	apache = "SPDX-License-Identifier: Apache-2.0"
	dual   = "SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause"
)

// leftover is written so that it does not find itself.
var leftover = regexp.MustCompile(`\b(TO` + `DO|FIX` + `ME|X` + `XX)\b`)

// check returns one sentence for each thing wrong with a file.
func check(name string, content []byte) []string {
	want := license(name)
	if want == "" {
		return nil
	}
	var findings []string
	if !headed(content, want) {
		findings = append(findings, fmt.Sprintf("%s:1: the line %q is missing", name, want))
	}
	lines := bufio.NewScanner(bytes.NewReader(content))
	lines.Buffer(nil, 1<<20)
	for n := 1; lines.Scan(); n++ {
		if note := leftover.Find(lines.Bytes()); note != nil {
			findings = append(findings, fmt.Sprintf("%s:%d: %s: open an issue instead", name, n, note))
		}
	}
	return findings
}

// license is the header that a file of this name must have; empty for files that have none.
func license(name string) string {
	switch base := path.Base(name); {
	case strings.HasPrefix(name, "bpf/") && (strings.HasSuffix(name, ".c") || strings.HasSuffix(name, ".h")):
		return dual
	case strings.HasSuffix(name, "_bpfel.go"), strings.HasSuffix(name, "_bpfeb.go"):
		return "" // generated; its source has one
	case strings.HasSuffix(name, ".go"), strings.HasSuffix(name, ".sh"), base == "Makefile", name == ".ci/run":
		return apache
	}
	return ""
}

// headed looks in the first lines only: a script begins with its interpreter.
func headed(content []byte, want string) bool {
	for n, line := range bytes.SplitN(content, []byte("\n"), 6) {
		if n < 5 && bytes.Contains(line, []byte(want)) {
			return true
		}
	}
	return bytes.HasPrefix(content, []byte("// Code generated"))
}
