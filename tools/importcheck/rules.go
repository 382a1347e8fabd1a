// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"slices"
	"strings"
)

// rule is one line of the layout: which level a package has and which modules of others it may use.
type rule struct {
	level  int
	own    []string // the only packages of ours that it may import; nil: every lower level
	family []string // prefixes of the third-party packages it may import
}

// layout names every package under pkg/. Level 0 knows the standard library only; level 1 adds one third-party family
// each; level 2 gets everything but level 0 handed in as functions. golang.org/x counts as the standard library from level 1 on.
var layout = map[string]rule{
	"pkg/route":    {level: 0},
	"pkg/wire":     {level: 0},
	"pkg/relay":    {level: 0},
	"pkg/identity": {level: 0},

	"pkg/redirect": {level: 1, own: []string{}, family: []string{"github.com/cilium/ebpf"}},
	"pkg/hostnet":  {level: 1, own: []string{}, family: []string{"github.com/vishvananda/"}},
	"pkg/tunnel":   {level: 1, own: []string{"pkg/wire"}, family: []string{"github.com/hashicorp/yamux"}},
	"pkg/kube":     {level: 1, own: []string{"pkg/route", "pkg/identity"}, family: []string{"k8s.io/", "sigs.k8s.io/"}},
	"pkg/admin":    {level: 1, own: []string{}, family: []string{"github.com/prometheus/"}},

	"pkg/intercept": {level: 2, own: []string{"pkg/route", "pkg/wire", "pkg/relay", "pkg/identity"}},
	"pkg/deliver":   {level: 2, own: []string{"pkg/route", "pkg/wire", "pkg/relay", "pkg/identity"}},
}

// check returns one sentence for each import that is not allowed.
func check(packages []pkg) []string {
	var broken []string
	for _, p := range packages {
		from := local(p.ImportPath)
		for _, imported := range p.Imports {
			if sentence := judge(from, imported); sentence != "" {
				broken = append(broken, sentence)
			}
		}
		if strings.HasPrefix(from, "pkg/") {
			if _, known := layout[owner(from)]; !known {
				broken = append(broken, fmt.Sprintf("%s has no level: give it a line in tools/importcheck/rules.go and in ARCHITECTURE.md", from))
			}
		}
	}
	slices.Sort(broken)
	return slices.Compact(broken)
}

// judge says what is wrong with the edge from → imported, or nothing.
func judge(from, imported string) string {
	if forTests(from) {
		return ""
	}
	if imported == "testing" || strings.HasPrefix(imported, "testing/") {
		return fmt.Sprintf("%s imports %s outside of its tests", from, imported)
	}
	to := local(imported)
	switch {
	case to == "":
		return judgeForeign(from, imported)
	case forTests(to) && !strings.HasPrefix(from, "tools/"):
		return fmt.Sprintf("%s imports %s, which exists for tests only", from, to)
	case strings.HasPrefix(from, "pkg/"):
		return judgeOwn(from, to)
	case strings.HasPrefix(from, "cmd/") && !strings.HasPrefix(to, "pkg/") && !strings.HasPrefix(to, "cmd/"):
		return fmt.Sprintf("%s imports %s: a program is wired from pkg/ and cmd/ only", from, to)
	}
	return ""
}

func judgeOwn(from, to string) string {
	if owner(from) == owner(to) {
		return ""
	}
	if !strings.HasPrefix(to, "pkg/") {
		return fmt.Sprintf("%s imports %s: nothing in pkg/ knows who uses it", from, to)
	}
	above, below := layout[owner(from)], layout[owner(to)]
	switch {
	case below.level >= above.level:
		return fmt.Sprintf("%s (level %d) imports %s (level %d): imports point down only", from, above.level, to, below.level)
	case above.own != nil && !slices.Contains(above.own, owner(to)):
		return fmt.Sprintf("%s imports %s: it may import %s of ours; take the rest as funcs", from, to, orNothing(above.own))
	}
	return ""
}

func judgeForeign(from, imported string) string {
	first, _, _ := strings.Cut(imported, "/")
	switch {
	case !strings.HasPrefix(imported, "k8s.io/"):
	case owner(from) != "pkg/kube":
		return fmt.Sprintf("%s imports %s: only pkg/kube knows Kubernetes' packages", from, imported)
	case from == "pkg/kube/servercfg", from == "pkg/kube/text":
		return fmt.Sprintf("%s imports %s: it does without, for agents that do and for tests that build fast", from, imported)
	}
	if !strings.HasPrefix(from, "pkg/") || !strings.Contains(first, ".") {
		return "" // the programs may use every module; the standard library is everybody's
	}
	r := layout[owner(from)]
	if r.level > 0 && strings.HasPrefix(imported, "golang.org/x/") {
		return ""
	}
	for _, prefix := range r.family {
		if strings.HasPrefix(imported, prefix) {
			return ""
		}
	}
	if r.level == 0 {
		return fmt.Sprintf("%s (level 0) imports %s: level 0 has the standard library only", from, imported)
	}
	return fmt.Sprintf("%s imports %s: its third-party family is %s", from, imported, orNothing(r.family))
}

// local is the path inside this module, or empty for another module's package.
func local(importPath string) string {
	rest, ok := strings.CutPrefix(importPath, module+"/")
	if !ok {
		return ""
	}
	return rest
}

// owner is the package that the layout lists: pkg/tunnel for pkg/tunnel/internal/frame.
func owner(path string) string {
	parts := strings.SplitN(path, "/", 3)
	return strings.Join(parts[:min(2, len(parts))], "/")
}

// forTests says whether a package exists for tests: everything in test/, and packages called SOMETHINGtest.
func forTests(path string) bool {
	return strings.HasPrefix(path, "test/") || strings.HasSuffix(path, "test") && !strings.HasPrefix(path, "tools/")
}

func orNothing(names []string) string {
	if len(names) == 0 {
		return "nothing"
	}
	return strings.Join(names, ", ")
}
