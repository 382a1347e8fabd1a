// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/edge-tunnel/edge-tunnel/test/linkemu"
)

// longlinkResult has every sample.
type longlinkResult struct {
	Run   circumstances `json:"run"`
	Links []longlink    `json:"links"`
}

// longlink is one link and what is measured over it.
type longlink struct {
	RoundTrip int        `json:"round_trip_ms"`
	Mbit      int        `json:"mbit"`
	Loss      float64    `json:"loss"` // of packets, each way
	Works     []measured `json:"works"`
}

func (l longlink) String() string {
	s := fmt.Sprintf("%d ms, %d Mbit/s", l.RoundTrip, l.Mbit)
	if l.Loss > 0 {
		s += fmt.Sprintf(", %.1f %% loss", l.Loss*100)
	}
	return s
}

// settings have a queue of one bandwidth-delay product before each direction, as routers at a long link's ends are advised to have.
// The seed gives every path the same losses.
func (l longlink) settings(seed int) linkemu.Settings {
	product := l.Mbit * 1e6 / 8 * l.RoundTrip / 1000
	return linkemu.Settings{
		Rate: int64(l.Mbit) * 1e6, Queue: product, Delay: time.Duration(l.RoundTrip) * time.Millisecond / 2, Loss: l.Loss, Seed: uint64(seed),
	}
}

// longPaths are in the order of the columns. The TLS relays are left out: they have a TCP connection for each one, as no relay has.
var longPaths = []string{directPath, muxPath, tunnelPath}

// longlinks lists what is measured. 300 Mbit/s is what the emulator carries beside the paths' own processes on two cores.
func longlinks(quick bool) []longlink {
	bulkFor, keysFor := 5000, 9000
	losses := []float64{0, 0.001, 0.01}
	if quick {
		bulkFor, keysFor = 800, 900
		losses = losses[:1]
	}
	row := func(k kind, conns, millis int) measured {
		return measured{work{k, conns, millis}, map[string][]sample{}}
	}
	var all []longlink
	for _, l := range []longlink{{RoundTrip: 100, Mbit: 100}, {RoundTrip: 50, Mbit: 300}} {
		for _, l.Loss = range losses {
			l.Works = []measured{row(downFor, 1, bulkFor), row(upFor, 1, bulkFor)}
			if l.RoundTrip == 100 && l.Loss == 0 {
				l.Works = append(l.Works, row(stalled, 1, bulkFor))
			}
			all = append(all, l)
		}
	}
	for _, l := range []longlink{{RoundTrip: 100, Mbit: 100}, {RoundTrip: 50, Mbit: 10}} {
		l.Works = []measured{row(keysDown, 4, keysFor), row(keysUp, 4, keysFor)}
		all = append(all, l)
	}
	if quick {
		all = []longlink{all[0], all[len(all)-2]}
	}
	return all
}

func longKinds() []string {
	var kinds []string
	for _, k := range []kind{downFor, upFor, stalled, keysDown, keysUp} {
		kinds = append(kinds, string(k))
	}
	return kinds
}

// longRounds is how many rounds there are at most: each takes six minutes, most of it waiting.
const longRounds = 3

// runLonglink measures in rounds. Each link has a site of its own in each round: a tunnel's TCP connection remembers what it
// has seen, and would take it from one link to the next.
func runLonglink(ctx context.Context, o options) (*longlinkResult, error) {
	o.rounds = min(o.rounds, longRounds)
	result := &longlinkResult{Run: look(ctx, o), Links: longlinks(o.quick)}
	result.Links = slices.DeleteFunc(result.Links, func(l longlink) bool { return !o.only.longlink(l) })
	for i := range result.Links {
		l := &result.Links[i]
		l.Works = slices.DeleteFunc(l.Works, func(m measured) bool { return !o.only.work(m.Work) })
	}
	for round := range o.rounds {
		for _, l := range result.Links {
			if err := l.measure(ctx, o, round); err != nil {
				return nil, fmt.Errorf("%v: %w", l, err)
			}
			o.say("round %d of %d: %v", round+1, o.rounds, l)
		}
	}
	return result, nil
}

func (l longlink) measure(ctx context.Context, o options, round int) (err error) {
	t := &stage{progress: o.progress}
	defer t.clear(&err)
	settings := l.settings(round)
	s, err := newSite(ctx, t, o.bin, &settings)
	if err != nil {
		return err
	}
	paths := map[string]*path{}
	for _, p := range s.paths {
		paths[p.name] = p
	}
	for _, m := range l.Works {
		for i := range longPaths {
			p := paths[longPaths[(round+i)%len(longPaths)]]
			if !o.only.path(p.name) {
				continue
			}
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := s.link.Set(settings); err != nil { // the losses begin anew
				return err
			}
			got, err := s.client.do(task{Work: m.Work, Addr: p.addr, Beside: paths[directPath].addr})
			if err != nil {
				return fmt.Errorf("%s: %w", p.name, err)
			}
			if m.Work.Kind == stalled && p.near != nil {
				if got.NearRSS, err = memoryOf(p.near, "VmRSS"); err != nil {
					return err
				}
			}
			m.Paths[p.name] = append(m.Paths[p.name], got)
			time.Sleep(4 * settings.Delay) // the last acknowledgments
		}
	}
	return nil
}

func mbit(s sample) float64 { return float64(s.Bytes) * 8 / 1e6 / s.Seconds }

func (r *longlinkResult) text() string {
	bulk := table{{"link", "direction", title(directPath), title(muxPath), title(tunnelPath), "÷ no relay (" + longBulkBar.text() + ")", "bar", "yamux defaults ÷ no relay"}}
	keys := table{{"link", "bulk", "of", "Mbit/s", "key p50, p99", "on a TCP connection beside: p50, p99", "p99 ÷ p99 beside (" + longKeysBar.text() + ")", "bar"}}
	lame := table{{"link", "path", "alone", "beside stalled readers", "÷ alone (" + stalledBar.text() + ")", "bar", "memory of the near end, MiB"}}
	for _, l := range r.Links {
		for _, m := range l.Works {
			switch m.Work.Kind {
			case stalled:
				for _, path := range longPaths {
					lame = append(lame, m.stalledRow(l, path))
				}
			case downFor, upFor:
				bulk = append(bulk, m.longBulkRow(l))
			case keysDown, keysUp:
				for _, path := range longPaths {
					keys = append(keys, m.longKeysRow(l, path))
				}
			}
		}
	}
	return r.Run.text() + "Bulk, one stream, from the edge (down) and to it (up): Mbit a second (range)\n\n" + bulk.String() +
		"\nKeys beside four busy streams of the same path: milliseconds, medians of the rounds\n\n" + keys.String() +
		fmt.Sprintf("\nA busy reader beside %d of the same path that read nothing: Mbit a second\n\n", stalledReaders) + lame.String()
}

func (m measured) direction() string {
	if m.Work.Kind == downFor || m.Work.Kind == keysDown {
		return string(down)
	}
	return string(up)
}

func (m measured) longBulkRow(l longlink) []string {
	row := []string{l.String(), m.direction()}
	direct := each(m.Paths[directPath], mbit)
	for _, path := range longPaths {
		row = append(row, spreadOf(each(m.Paths[path], mbit)).text(1))
	}
	ours := ratios(each(m.Paths[tunnelPath], mbit), direct)
	return append(row, spreadOf(ours).text(2), longBulkBar.judge(ours), spreadOf(ratios(each(m.Paths[muxPath], mbit), direct)).text(2))
}

func (m measured) stalledRow(l longlink, path string) []string {
	samples, alone := m.Paths[path], l.Works[0].Paths[path] // of the same rounds
	quotients := ratios(each(samples, mbit), each(alone, mbit))
	verdict, memory := "", "–"
	if path == tunnelPath {
		verdict = stalledBar.judge(quotients)
	}
	if path != directPath {
		memory = number(spreadOf(each(samples, func(s sample) float64 { return s.NearRSS / 1024 })).Median, 1)
	}
	return []string{l.String(), title(path), spreadOf(each(alone, mbit)).text(1), spreadOf(each(samples, mbit)).text(1), spreadOf(quotients).text(2), verdict, memory}
}

func (m measured) longKeysRow(l longlink, path string) []string {
	samples := m.Paths[path]
	millis := func(pick func(sample) float64) string { return number(spreadOf(each(samples, pick)).Median/1000, 1) }
	p99 := func(s sample) float64 { return s.P99 }
	besideP99 := func(s sample) float64 { return s.BesideP99 }
	quotients := ratios(each(samples, p99), each(samples, besideP99))
	verdict := ""
	if path == tunnelPath {
		verdict = longKeysBar.judge(quotients)
	}
	return []string{
		l.String(), m.direction(), title(path), spreadOf(each(samples, mbit)).text(1),
		millis(func(s sample) float64 { return s.P50 }) + ", " + millis(p99),
		millis(func(s sample) float64 { return s.BesideP50 }) + ", " + millis(besideP99),
		spreadOf(quotients).text(2), verdict,
	}
}
