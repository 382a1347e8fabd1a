// SPDX-License-Identifier: Apache-2.0

// Command testreport reads "go test -json" and prints what a person needs: a package's line when it is done, the whole
// output of what failed, each skipped test with its reason, and the counts. It fails when a test failed, when
// nothing ran, and with -forbid-skips when a test was skipped.
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
)

func main() {
	forbid := flag.Bool("forbid-skips", false, "fail when a test was skipped")
	flag.Parse()
	if err := report(os.Stdin, os.Stdout, *forbid); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

// event is one line of "go test -json", as far as it matters here; see "go doc test2json".
type event struct {
	Action      string
	Package     string
	ImportPath  string // of build output
	Test        string
	Output      string
	FailedBuild string
}

// id names a test, or with an empty test its package.
type id struct{ pkg, test string }

type tally struct {
	out      io.Writer
	output   map[id]*strings.Builder // of what is still running, and of builds
	broken   []string                // the closing lines of the packages that failed
	skips    []string
	passed   int
	failed   int
	packages int
}

func report(in io.Reader, out io.Writer, forbidSkips bool) error {
	t := &tally{out: out, output: map[id]*strings.Builder{}}
	lines := bufio.NewReader(in)
	for {
		line, err := lines.ReadBytes('\n')
		if len(bytes.TrimSpace(line)) > 0 {
			t.line(line)
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
	}
	return t.close(forbidSkips)
}

func (t *tally) line(line []byte) {
	var e event
	if err := json.Unmarshal(line, &e); err != nil {
		_, _ = t.out.Write(line) // go itself complains without JSON
		return
	}
	key := id{e.Package, e.Test}
	switch e.Action {
	case "output", "build-output":
		if e.Action == "build-output" {
			key = id{e.ImportPath, ""}
		}
		if t.output[key] == nil {
			t.output[key] = &strings.Builder{}
		}
		t.output[key].WriteString(e.Output)
	case "pass", "fail", "skip":
		t.done(e, key)
	}
}

func (t *tally) done(e event, key id) {
	text := ""
	if b := t.output[key]; b != nil {
		text = b.String()
	}
	delete(t.output, key)

	if e.Test == "" {
		t.packageDone(e, text)
		return
	}
	switch e.Action {
	case "pass":
		t.passed++
	case "fail":
		t.failed++
		fmt.Fprintf(t.out, "%s\n%s", e.Package, text)
	case "skip":
		t.skips = append(t.skips, e.Package+"\n"+text)
	}
}

func (t *tally) packageDone(e event, text string) {
	t.packages++
	closing := closingLine(text)
	if e.Action == "fail" {
		t.failed++
		if b := t.output[id{e.FailedBuild, ""}]; b != nil {
			text = b.String() + text
		}
		// A panic or a timeout ends tests without a verdict: what they printed is the evidence.
		for key, b := range t.output {
			if key.pkg == e.Package {
				fmt.Fprintf(t.out, "%s: %s did not end\n%s", key.pkg, key.test, b)
				delete(t.output, key)
			}
		}
		fmt.Fprintf(t.out, "%s\n", strings.TrimRight(text, "\n"))
		if closing == "" {
			closing = "FAIL\t" + e.Package
		}
		t.broken = append(t.broken, closing)
		return
	}
	if closing != "" {
		fmt.Fprintln(t.out, closing)
	}
}

// closingLine is go test's own last word about a package.
func closingLine(text string) string {
	closing := ""
	for line := range strings.SplitSeq(text, "\n") {
		if strings.HasPrefix(line, "ok ") || strings.HasPrefix(line, "FAIL\t") {
			closing = line
		}
	}
	return closing
}

func (t *tally) close(forbidSkips bool) error {
	fmt.Fprintln(t.out)
	for _, skip := range t.skips {
		fmt.Fprintf(t.out, "skipped: %s", skip)
	}
	for _, line := range t.broken {
		fmt.Fprintln(t.out, line)
	}
	fmt.Fprintf(t.out, "%d passed, %d failed, %d skipped in %d packages\n", t.passed, t.failed, len(t.skips), t.packages)
	switch {
	case t.failed > 0:
		return errors.New("tests failed")
	case t.passed == 0:
		return errors.New("no test ran")
	case forbidSkips && len(t.skips) > 0:
		return errors.New("tests were skipped, which is not allowed here")
	}
	return nil
}
