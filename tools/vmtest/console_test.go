// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"reflect"
	"strings"
	"testing"
	"time"
)

const goodRun = "SeaBIOS\r\n\r\n@vmtest boot 6.1.0\r\n" +
	"\r\n@vmtest start redirect\r\n=== RUN   TestA\r\n--- PASS: TestA (0.10s)\r\n    --- SKIP: TestB/sub (0.00s)\r\nPASS\r\n" +
	"\r\n@vmtest end redirect 0 12\r\n\r\n@vmtest tainted 0\r\n\r\n@vmtest done\r\n"

func read(text string) *console {
	c := &console{}
	_, _ = c.Write([]byte(text))
	return c
}

func TestConsole(t *testing.T) {
	c := read(goodRun)
	if c.release != "6.1.0" || !c.done || len(c.jobs) != 1 {
		t.Fatalf("%+v", c)
	}
	j := c.jobs[0]
	if !j.ok() || j.name != "redirect" || j.took != 12*time.Second || j.passed != 1 || !reflect.DeepEqual(j.skipped, []string{"TestB/sub"}) {
		t.Errorf("%+v", j)
	}
	if !strings.Contains(string(j.output), "=== RUN   TestA\n") {
		t.Errorf("output %q", j.output)
	}
	if err := onlyRedirect().judge(c); err != nil {
		t.Error(err)
	}
}

func onlyRedirect() payload { return payload{jobs: []job{{name: "redirect"}}} }

// Each run that is not a success must be judged one, whatever else went well.
func TestJudge(t *testing.T) {
	for _, test := range []struct{ name, from, to, want string }{
		{"no boot", "@vmtest boot 6.1.0", "Kernel panic", "did not boot"},
		{"failed test", "--- PASS: TestA", "--- FAIL: TestA", "0 passed, 1 failed"},
		{"no test", "--- PASS: TestA (0.10s)", "", "no test ran"},
		{"status", "end redirect 0 12", "end redirect 2 12", "status 2"},
		{"killed", "end redirect 0 12", "end redirect 137 360", "killed after its time"},
		{"job without end", "@vmtest end redirect 0 12", "", "redirect did not end"},
		{"end of another job", "end redirect", "end other", "redirect did not end"},
		{"unreadable end", "end redirect 0 12", "end redirect zero 12", "redirect did not end"},
		{"no job", "@vmtest start redirect", "", "redirect did not run"},
		{"warning", "tainted 0", "tainted 512", "printed a warning"},
		{"oops", "tainted 0", "tainted 640", "crashed"},
		{"no end", "@vmtest done", "", "ended before its jobs"},
	} {
		c := read(strings.Replace(goodRun, test.from, test.to, 1))
		if err := onlyRedirect().judge(c); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %q", test.name, err, test.want)
		}
	}
}

func TestEvidence(t *testing.T) {
	c := read(strings.Replace(goodRun, "--- PASS: TestA", "    a_test.go:1: not so\r\n--- FAIL: TestA", 1))
	if got := c.evidence(); !strings.Contains(got, "not so") || strings.Contains(got, "=== RUN") {
		t.Errorf("%q", got)
	}
	c = read("Kernel panic - not syncing")
	if got := c.evidence(); !strings.Contains(got, "not syncing") {
		t.Errorf("%q", got)
	}
}

// How the serial line is cut into pieces must not matter, and nothing may grow without a bound.
func FuzzConsole(f *testing.F) {
	f.Add([]byte(goodRun), 7)
	f.Add([]byte("@vmtest end\n@vmtest start\n@vmtest start a\n@vmtest end a -1 -1\n@vmtest \n--- FAIL: \n"), 1)
	f.Add(bytes.Repeat([]byte{'x'}, maxLine+10), 4096)
	f.Fuzz(func(t *testing.T, text []byte, piece int) {
		whole := read(string(text))
		pieces := &console{}
		piece = max(1, piece)
		for rest := text; len(rest) > 0; {
			n := min(piece, len(rest))
			if got, err := pieces.Write(rest[:n]); got != n || err != nil {
				t.Fatalf("wrote %d of %d: %v", got, n, err)
			}
			rest = rest[n:]
		}
		if len(whole.rest) > maxLine || len(whole.last) > maxLast {
			t.Fatalf("%d and %d bytes kept", len(whole.rest), len(whole.last))
		}
		for _, c := range []*console{whole, pieces} {
			c.rest, c.last = append([]byte{}, c.rest...), append([]byte{}, c.last...)
		}
		if !reflect.DeepEqual(whole, pieces) {
			t.Errorf("whole:  %+v\npieces: %+v", whole, pieces)
		}
	})
}
