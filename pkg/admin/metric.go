// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
)

// Kind is what a [Metric] measures.
type Kind uint8

// Kinds.
const (
	KindCounter   Kind = iota // only grows; the name ends in _total
	KindGauge                 // goes up and down
	KindHistogram             // see [Histogram]
)

// Metric is one metric with all of its present values.
type Metric struct {
	Name, Help string
	Kind       Kind
	Labels     []string // names; see [Metric.Validate] for which
	Samples    []Sample
}

// Sample is one value of a metric.
type Sample struct {
	Labels    []string  // values, one for each name
	Value     float64   // unless it is a histogram
	Histogram Histogram // a snapshot
}

// Number is what a metric without labels can be made of.
type Number interface {
	~int | ~int32 | ~int64 | ~uint | ~uint32 | ~uint64 | ~float64
}

// Counter is a counter without labels.
func Counter[N Number](name, help string, value N) Metric {
	return Metric{Name: name, Help: help, Kind: KindCounter, Samples: []Sample{{Value: float64(value)}}}
}

// Gauge is a gauge without labels.
func Gauge[N Number](name, help string, value N) Metric {
	return Metric{Name: name, Help: help, Kind: KindGauge, Samples: []Sample{{Value: float64(value)}}}
}

// CounterBy is a counter with one label.
func CounterBy[K ~string, N Number](name, help, label string, values map[K]N) Metric {
	return by(KindCounter, name, help, label, values)
}

// GaugeBy is a gauge with one label.
func GaugeBy[K ~string, N Number](name, help, label string, values map[K]N) Metric {
	return by(KindGauge, name, help, label, values)
}

func by[K ~string, N Number](kind Kind, name, help, label string, values map[K]N) Metric {
	m := Metric{Name: name, Help: help, Kind: kind, Labels: []string{label}}
	for k, v := range values {
		m.Samples = append(m.Samples, Sample{Labels: []string{string(k)}, Value: float64(v)})
	}
	return m
}

// Validate says whether a metric is named as all of ours are; a daemon's tests call it for each of its metrics.
//
// Labels come from a short list. Except for node, which is bounded by the nodes that exist, their values must be known when
// the program is written: a label with a value that strangers choose (an address, a path) grows without a bound.
func (m Metric) Validate() error {
	var bad []error
	refuse := func(format string, args ...any) {
		bad = append(bad, fmt.Errorf("metric %q "+format, append([]any{m.Name}, args...)...))
	}
	if !strings.HasPrefix(m.Name, "edge_tunnel_") || !isSnake(m.Name) {
		refuse("is not edge_tunnel_ and lower snake case")
	}
	if total := strings.HasSuffix(m.Name, "_total"); total != (m.Kind == KindCounter) {
		refuse("ends in _total, or is a counter, but not both")
	}
	if m.Kind == KindHistogram && !strings.HasSuffix(m.Name, "_seconds") && !strings.HasSuffix(m.Name, "_bytes") {
		refuse("is a histogram without a unit")
	}
	if !strings.HasSuffix(m.Help, ".") {
		refuse("has a help text that is no sentence")
	}
	for _, label := range m.Labels {
		if !slices.Contains([]string{"node", "reason", "verdict", "direction", "state", "condition", "hook", "version", "signer", "key", "entry"}, label) {
			refuse("has the label %q, which is not on the list", label)
		}
	}
	seen := map[string]bool{}
	for _, s := range m.Samples {
		if len(s.Labels) != len(m.Labels) {
			refuse("has a sample with %d label values for %d labels", len(s.Labels), len(m.Labels))
		}
		key := strings.Join(s.Labels, "\x00")
		if seen[key] {
			refuse("has two samples for %q", s.Labels)
		}
		seen[key] = true
	}
	return errors.Join(bad...)
}

func isSnake(s string) bool {
	return strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789_") == "" && !strings.Contains(s, "__")
}

// pulled is a prometheus.Collector that asks for its metrics at each scrape. It describes none, so that the registry
// takes whatever comes ("unchecked").
type pulled func() []Metric

func (pulled) Describe(chan<- *prometheus.Desc) {}

func (p pulled) Collect(ch chan<- prometheus.Metric) {
	for _, m := range p() {
		desc := prometheus.NewDesc(m.Name, m.Help, m.Labels, nil)
		for _, s := range m.Samples {
			labels := make([]string, len(s.Labels))
			for i, l := range s.Labels {
				labels[i] = strings.ToValidUTF8(l, "\ufffd") // one bad name must not take its whole scrape along
			}
			var metric prometheus.Metric
			var err error
			switch m.Kind {
			case KindHistogram:
				metric, err = prometheus.NewConstHistogram(desc, s.Histogram.Count, s.Histogram.Sum, s.Histogram.Buckets, labels...)
			case KindGauge:
				metric, err = prometheus.NewConstMetric(desc, prometheus.GaugeValue, s.Value, labels...)
			default:
				metric, err = prometheus.NewConstMetric(desc, prometheus.CounterValue, s.Value, labels...)
			}
			if err != nil {
				metric = prometheus.NewInvalidMetric(desc, err)
			}
			ch <- metric
		}
	}
}
