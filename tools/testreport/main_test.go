// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"testing"
)

const passing = `{"Action":"run","Package":"p","Test":"TestA"}
{"Action":"output","Package":"p","Test":"TestA","Output":"noise of a passing test\n"}
{"Action":"pass","Package":"p","Test":"TestA"}
{"Action":"output","Package":"p","Output":"ok  \tp\t0.1s\n"}
{"Action":"pass","Package":"p"}
`

const skipping = `{"Action":"output","Package":"p","Test":"TestB","Output":"    b_test.go:1: needs a moon\n"}
{"Action":"skip","Package":"p","Test":"TestB"}
`

const failing = `{"Action":"output","Package":"q","Test":"TestC","Output":"    c_test.go:1: broken\n"}
{"Action":"fail","Package":"q","Test":"TestC"}
{"Action":"output","Package":"q","Output":"FAIL\tq\t0.1s\n"}
{"Action":"fail","Package":"q"}
`

const hanging = `{"Action":"output","Package":"q","Test":"TestD","Output":"last words\n"}
{"Action":"output","Package":"q","Output":"panic: test timed out\n"}
{"Action":"fail","Package":"q"}
`

const unbuilt = `{"ImportPath":"q.test","Action":"build-output","Output":"c.go:1: undefined: x\n"}
{"ImportPath":"q.test","Action":"build-fail"}
{"Action":"output","Package":"q","Output":"FAIL\tq [build failed]\n"}
{"Action":"fail","Package":"q","FailedBuild":"q.test"}
`

func TestReport(t *testing.T) {
	for _, c := range []struct {
		name, in  string
		forbid    bool
		err       string
		has, lack string
	}{
		{"pass", passing, true, "", "ok  \tp\t0.1s\n\n1 passed, 0 failed, 0 skipped in 1 packages", "noise"},
		{"skip allowed", passing + skipping, false, "", "needs a moon", ""},
		{"skip forbidden", passing + skipping, true, "not allowed", "1 skipped", ""},
		{"fail", passing + failing, false, "tests failed", "c_test.go:1: broken", "noise"},
		{"timeout", passing + hanging, false, "tests failed", "TestD did not end\nlast words", ""},
		{"build", passing + unbuilt, false, "tests failed", "undefined: x", ""},
		{"nothing ran", "", false, "no test ran", "", ""},
		{"go complains", passing + "go: no such module\n", false, "", "go: no such module", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			var out strings.Builder
			err := report(strings.NewReader(c.in), &out, c.forbid)
			if (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
				t.Errorf("error %v, want %q", err, c.err)
			}
			if !strings.Contains(out.String(), c.has) {
				t.Errorf("%q is missing in:\n%s", c.has, out.String())
			}
			if c.lack != "" && strings.Contains(out.String(), c.lack) {
				t.Errorf("%q should not be in:\n%s", c.lack, out.String())
			}
		})
	}
}
