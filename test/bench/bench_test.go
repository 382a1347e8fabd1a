// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	roles().Run()
	goleak.VerifyTestMain(m)
}

// skeleton is a page with nothing in it yet.
const skeleton = `# A page
<!-- bench datapath: written by make bench -->
old
<!-- bench datapath: end -->
between
<!-- bench hook: written by make bench -->
<!-- bench hook: end -->
<!-- bench hop: written by make bench -->
<!-- bench hop: end -->
<!-- bench longlink: written by make bench -->
<!-- bench longlink: end -->
<!-- bench agents: written by make bench -->
<!-- bench agents: end -->
after
`

// TestQuick runs everything once, small. No number is judged but the counts.
func TestQuick(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("network namespaces and BPF need root")
	}
	bin, out := t.TempDir(), t.TempDir()
	for _, program := range []string{"tunnel-server", "tunnel-agent"} {
		build := exec.Command("go", "build", "-o", bin, "../../cmd/"+program)
		if text, err := build.CombinedOutput(); err != nil {
			t.Fatalf("build %s: %v\n%s", program, err, text)
		}
	}
	if err := os.WriteFile(filepath.Join(out, pageFile), []byte(skeleton), 0o600); err != nil {
		t.Fatal(err)
	}
	var printed bytes.Buffer
	if err := run(context.Background(), &printed, t.Output(), []string{"-quick", "-bin", bin, "-out", out}); err != nil {
		t.Fatal(err)
	}

	content, err := os.ReadFile(filepath.Join(out, jsonFile))
	if err != nil {
		t.Fatal(err)
	}
	var got report
	if err := json.Unmarshal(content, &got); err != nil {
		t.Fatal(err)
	}
	checkDatapath(t, got.Datapath)
	checkHop(t, got.Hop)
	checkHook(t, got.Hook)
	checkLonglink(t, got.Longlink)
	checkAgents(t, got.Agents)
	page, err := os.ReadFile(filepath.Join(out, pageFile))
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range got.parts() {
		for what, text := range map[string]string{"the page": string(page), "what was printed": printed.String()} {
			if !strings.Contains(text, part.text) {
				t.Errorf("%s lacks the tables of suite %s", what, part.suite)
			}
		}
	}
	if strings.Contains(string(page), "old\n") || !strings.HasSuffix(string(page), "after\n") {
		t.Errorf("the page around the tables changed:\n%s", page)
	}
}

func checkDatapath(t *testing.T, d *datapathResult) {
	t.Helper()
	var paths []string
	for _, p := range comparedPaths {
		paths = append(paths, p.name)
	}
	checkWorks(t, d.Works, works(true), paths...)
}

func checkHop(t *testing.T, h *hopResult) {
	t.Helper()
	checkWorks(t, h.Works, hopWorks(true), ownPath, hopPath)
}

func checkWorks(t *testing.T, got []measured, want []work, paths ...string) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%d works were measured, not %d", len(got), len(want))
	}
	for _, m := range got {
		for _, path := range paths {
			samples := m.Paths[path]
			if len(samples) != 1 {
				t.Errorf("%s over %s: %d samples", m.Work, path, len(samples))
				continue
			}
			s := samples[0]
			if m.Work.bulk() && s.Bytes != int64(m.Work.Count)<<20 || !m.Work.bulk() && (s.Ops != m.Work.Count || s.P50 <= 0 || s.P99 < s.P50) || s.Seconds <= 0 {
				t.Errorf("%s over %s: %+v", m.Work, path, s)
			}
		}
	}
}

func checkHook(t *testing.T, h *hookResult) {
	t.Helper()
	misses := 0
	for _, p := range h.Programs {
		if p.Miss {
			misses++
		}
		// Each connect runs connect4 once, and each empty program as often as ours.
		if strings.HasPrefix(p.Program, "connect") && p.Calls != 1 || p.Ours.Median <= 0 || p.Empty.Median <= 0 {
			t.Errorf("%+v", p)
		}
	}
	if misses == 0 || len(h.Connects) != 3 || h.Refusal.P50.Median <= 0 || len(h.Updates) != 5 {
		t.Errorf("incomplete: %+v", h)
	}
}

func checkLonglink(t *testing.T, l *longlinkResult) {
	t.Helper()
	if len(l.Links) != len(longlinks(true)) {
		t.Fatalf("%d links were measured, not %d", len(l.Links), len(longlinks(true)))
	}
	for _, link := range l.Links {
		trip := float64(link.RoundTrip) * 1000
		for _, m := range link.Works {
			keys := m.Work.Kind == keysDown || m.Work.Kind == keysUp
			for _, path := range longPaths {
				samples := m.Paths[path]
				if len(samples) != 1 {
					t.Errorf("%v, %s over %s: %d samples", link, m.Work, path, len(samples))
					continue
				}
				// Nothing is faster than the link. Within so short a time it may be that no bulk arrives on a busy machine.
				s := samples[0]
				if keys && (s.P50 < trip || s.P99 < s.P50 || s.BesideP50 < trip || s.BesideP99 < s.BesideP50) {
					t.Errorf("%v, %s over %s: %+v", link, m.Work, path, s)
				}
				if !keys && mbit(s) > float64(link.Mbit) {
					t.Errorf("%v, %s over %s: %.1f Mbit/s", link, m.Work, path, mbit(s))
				}
			}
		}
	}
}

// checkAgents wants every agent back after each storm, at its own address. What a storm took is not judged, but it was measured.
func checkAgents(t *testing.T, a *agentsResult) {
	t.Helper()
	if a.Agents != 200 || len(a.Storms) != 3 || len(a.Visits) != 3 || len(a.Rests) != 2 {
		t.Fatalf("incomplete: %+v", a)
	}
	for i, s := range a.Storms {
		if a.Visits[i].Ops != a.Agents {
			t.Errorf("%s: %d nodes were visited, not %d", s.What, a.Visits[i].Ops, a.Agents)
		}
		if s.P50 <= 0 || s.P99 < s.P50 || s.Last < s.P99 || s.Dials < uint64(a.Agents) || s.Peak <= 0 {
			t.Errorf("%+v", s)
		}
		if kept := s.Tunnel != nil && s.Beside != nil; kept != (i < 2) || kept && (s.Tunnel.Messages == 0 || s.Tunnel.Connects == 0 || s.Beside.Messages == 0) {
			t.Errorf("%s: %+v, %+v", s.What, s.Tunnel, s.Beside)
		}
	}
	for _, r := range a.Rests {
		if r.RSS <= r.Bare || r.Heap <= 0 || r.Routine < float64(a.Agents) {
			t.Errorf("%+v", r)
		}
	}
}

func TestVerdicts(t *testing.T) {
	least, most := bar{muxPath, 0.75, true}, bar{muxPath, 1.3, false}
	for _, c := range []struct {
		bar    bar
		rounds []float64
		want   string
	}{
		{least, []float64{0.8, 0.9, 0.75}, "met"},
		{least, []float64{0.8, 0.9, 0.7}, "met (2 of 3 rounds met it)"},
		{least, []float64{0.7, 0.6, 0.8}, "**missed** (1 of 3 rounds met it)"},
		{most, []float64{1.3}, "met"},
		{most, []float64{1.31}, "**missed**"},
		{most, nil, nothing},
	} {
		if got := c.bar.judge(c.rounds); got != c.want {
			t.Errorf("%v judges %v: %q, not %q", c.bar, c.rounds, got, c.want)
		}
	}
}

func TestStatistics(t *testing.T) {
	if got := spreadOf([]float64{3, 1, 2, 10}); got != (spread{Median: 2.5, Min: 1, Max: 10}) {
		t.Errorf("spread: %+v", got)
	}
	if got := ratios([]float64{2, 3, 5}, []float64{1, 0, 2}); len(got) != 2 || got[0] != 2 || got[1] != 2.5 {
		t.Errorf("ratios: %v", got)
	}
	for value, want := range map[float64]string{0.123: "0.12", 999.5: "999.50", 1234.5: "1,234", 1234567: "1,234,567", -4567: "-4,567", -0.5: "-0.50"} {
		if got := number(value, 2); got != want {
			t.Errorf("number(%v): %q, not %q", value, got, want)
		}
	}
}

func TestPageWithoutMarkers(t *testing.T) {
	if _, err := replacePart([]byte("# A page\n"), part{"hook", "text"}); err == nil {
		t.Error("a page without markers was accepted")
	}
}

func TestBadArguments(t *testing.T) {
	for _, args := range [][]string{{"-suite", "speed"}, {"-rounds", "-1"}, {"something"}, {"-path", "tls", "-out", "."}} {
		if err := run(context.Background(), t.Output(), t.Output(), args); err == nil {
			t.Errorf("%q were accepted", args)
		}
	}
}
