// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"math"
	"strconv"
	"strings"
)

// part is what the page has between a suite's markers.
type part struct{ suite, text string }

func (r *report) parts() []part {
	var all []part
	if r.Datapath != nil {
		all = append(all, part{"datapath", r.Datapath.text()})
	}
	if r.Hook != nil {
		all = append(all, part{"hook", r.Hook.text()})
	}
	if r.Hop != nil {
		all = append(all, part{"hop", r.Hop.text()})
	}
	if r.Longlink != nil {
		all = append(all, part{"longlink", r.Longlink.text()})
	}
	if r.Agents != nil {
		all = append(all, part{"agents", r.Agents.text()})
	}
	return all
}

// replacePart puts a part between its markers, which stay.
func replacePart(page []byte, p part) ([]byte, error) {
	begin, end := []byte("<!-- bench "+p.suite+": written by make bench -->\n"), []byte("<!-- bench "+p.suite+": end -->")
	before, rest, found := bytes.Cut(page, begin)
	_, after, foundEnd := bytes.Cut(rest, end)
	if !found || !foundEnd {
		return nil, fmt.Errorf("the lines %q and %q are missing", bytes.TrimSpace(begin), end)
	}
	return bytes.Join([][]byte{before, begin, []byte("\n" + p.text + "\n"), end, after}, nil), nil
}

// table is a Markdown table; the first row is its head.
type table [][]string

func (t table) String() string {
	var b strings.Builder
	for i, row := range t {
		fmt.Fprintf(&b, "| %s |\n", strings.Join(row, " | "))
		if i == 0 {
			b.WriteString("|" + strings.Repeat("---|", len(row)) + "\n")
		}
	}
	return b.String()
}

func (c circumstances) text() string {
	s := fmt.Sprintf("%s, commit %s. %d cores (%s), Linux %s, %s. %s; load average before it %s.", c.Date, c.Commit, c.Cores, c.CPU, c.Kernel, c.Go,
		count(c.Rounds, "round"), c.Load)
	if c.Quick {
		s += " **Quick run: the numbers mean little.**"
	}
	return s + "\n\n"
}

func count(n int, what string) string {
	if n != 1 {
		what += "s"
	}
	return fmt.Sprintf("%d %s", n, what)
}

// comparedPaths are in the order of the columns, with their titles.
var comparedPaths = []struct{ name, title string }{
	{directPath, "no relay"}, {tlsPath, "TLS relays"}, {muxPath, "yamux defaults"}, {tunnelPath, "edge-tunnel"},
}

func (d *datapathResult) text() string {
	return d.Run.text() +
		"Connect, request, answer, close: µs p50 (range of the rounds), p99, connections a second\n\n" + d.compare(connects) +
		"\nRound trip of 64 bytes on an open connection: µs p50 (range), p99, round trips a second\n\n" + d.compare(pings) +
		"\nBulk, from the edge (down) and to it (up): MiB a second (range)\n\n" + d.compare(down, up) +
		"\nCPU time of the two relaying processes, near + far: a connection or round trip in µs, bulk in seconds a GiB\n\n" + d.cpu()
}

// compare has a row for each work of the kinds, with the ratios that have a bar, or else that to the TLS relays.
func (d *datapathResult) compare(kinds ...kind) string {
	goals := bars(kinds[0])
	head := []string{"at once"}
	for _, p := range comparedPaths {
		head = append(head, p.title)
	}
	for _, b := range goals {
		head = append(head, fmt.Sprintf("÷ %s (%s)", title(b.against), b.text()), "bar")
	}
	if len(goals) == 0 {
		head = append(head, "÷ "+title(tlsPath), "÷ "+title(muxPath))
	}
	t := table{head}
	for _, k := range kinds {
		for _, m := range d.Works {
			if m.Work.Kind == k {
				t = append(t, m.row(goals))
			}
		}
	}
	return t.String()
}

func title(path string) string {
	for _, p := range comparedPaths {
		if p.name == path {
			return p.title
		}
	}
	return path
}

func (m measured) row(goals []bar) []string {
	name := strconv.Itoa(m.Work.Conns)
	if m.Work.bulk() {
		name += " " + string(m.Work.Kind)
	}
	row := []string{name}
	for _, p := range comparedPaths {
		cell := spreadOf(m.values(p.name)).text(0)
		if !m.Work.bulk() && len(m.Paths[p.name]) > 0 {
			p99 := spreadOf(each(m.Paths[p.name], func(s sample) float64 { return s.P99 }))
			rate := spreadOf(each(m.Paths[p.name], sample.perSecond))
			cell += fmt.Sprintf(", %s, %s/s", number(p99.Median, 0), number(rate.Median, 0))
		}
		row = append(row, cell)
	}
	for _, b := range goals {
		r := ratios(m.values(tunnelPath), m.values(b.against))
		row = append(row, spreadOf(r).text(2), b.judge(r))
	}
	if len(goals) == 0 {
		for _, against := range []string{tlsPath, muxPath} {
			row = append(row, spreadOf(ratios(m.values(tunnelPath), m.values(against))).text(2))
		}
	}
	return row
}

// cpu adds up all rounds: the kernel counts in hundredths of a second.
func (d *datapathResult) cpu() string {
	t := table{{"work", title(tlsPath), title(muxPath), title(tunnelPath), "÷ " + title(tlsPath), "÷ " + title(muxPath)}}
	for _, m := range d.Works {
		row := []string{m.Work.String()}
		total := map[string]float64{}
		for _, path := range []string{tlsPath, muxPath, tunnelPath} {
			var near, far, amount float64
			for _, s := range m.Paths[path] {
				near, far = near+s.Near, far+s.Far
				amount += float64(s.Ops)/1e6 + float64(s.Bytes)/(1<<30)
			}
			total[path] = (near + far) / amount
			row = append(row, fmt.Sprintf("%s + %s", number(near/amount, 2), number(far/amount, 2)))
		}
		for _, path := range []string{tlsPath, muxPath} {
			row = append(row, number(total[tunnelPath]/total[path], 2))
		}
		t = append(t, row)
	}
	return t.String()
}

func (h *hookResult) text() string {
	programs := table{{"program", "case", "targets", "ns a call (range)", "ours", "empty", "calls each", "bar"}}
	for _, p := range h.Programs {
		verdict := ""
		if b, ok := p.bar(); ok {
			verdict = "≤ " + number(b.limit, 0) + ": " + b.judge([]float64{p.Net.Median})
		}
		programs = append(programs, []string{p.Program, p.Case, number(float64(p.Targets), 0), p.Net.text(0), number(p.Ours.Median, 0), number(p.Empty.Median, 0),
			number(p.Calls, 1), verdict})
	}
	connects := table{{"attached", "µs (range)"}}
	for _, c := range h.Connects {
		connects = append(connects, []string{c.Attached, c.Micros.text(2)})
	}
	rest := table{{"what", "result (range)", "bar"},
		{"connect() to an offline node fails with EHOSTUNREACH after, p50", h.Refusal.P50.text(1) + " µs", ""},
		{"the same, p99", h.Refusal.P99.text(1) + " µs", "≤ 1,000 µs: " + refusalBar.judge([]float64{h.Refusal.P99.Median})}}
	for _, u := range h.Updates {
		judge := func(b bar, millis float64) string {
			if u.Targets != maxTargets || millis == 0 {
				return ""
			}
			return "≤ " + number(b.limit, 0) + " ms: " + b.judge([]float64{millis})
		}
		rest = append(rest, []string{"put targets into an empty map: " + number(float64(u.Targets), 0), number(u.Millis, 2) + " ms", judge(fillBar, u.Millis)},
			[]string{"one of them goes offline or online", u.State.text(3) + " ms", judge(changeBar, u.State.Median)},
			[]string{"one of them goes or comes", u.Address.text(2) + " ms", judge(changeBar, u.Address.Median)})
	}
	return h.Run.text() + programs.String() +
		"\nSocket, connect and close of a loopback connection that is nobody's business, statistics off, median of a round\n\n" + connects.String() +
		"\nAlso\n\n" + rest.String()
}

// text is the median and the range of the rounds.
func (s spread) text(decimals int) string {
	if s == (spread{}) {
		return nothing
	}
	if s.Min == s.Max {
		return number(s.Median, decimals)
	}
	return fmt.Sprintf("%s (%s–%s)", number(s.Median, decimals), number(s.Min, decimals), number(s.Max, decimals))
}

// nothing stands for what was not measured.
const nothing = "–"

// number has commas between thousands.
func number(value float64, decimals int) string {
	if math.IsNaN(value) || math.IsInf(value, 0) {
		return nothing
	}
	if math.Abs(value) >= 1000 {
		decimals = 0
	}
	text := strconv.FormatFloat(value, 'f', decimals, 64)
	whole, rest, _ := strings.Cut(text, ".")
	for i := len(whole) - 3; i > 0 && whole[i-1] != '-'; i -= 3 {
		whole = whole[:i] + "," + whole[i:]
	}
	if rest != "" {
		return whole + "." + rest
	}
	return whole
}
