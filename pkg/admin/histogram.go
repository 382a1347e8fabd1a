// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"slices"
	"sync/atomic"
	"time"
)

// Durations counts durations in fixed buckets, without a lock. Make it with [NewDurations].
type Durations struct {
	bounds  []float64       // seconds, ascending
	buckets []atomic.Uint64 // one more than bounds: the last is for what is above all of them
	nanos   atomic.Uint64
}

// NewDurations returns a histogram whose buckets end at these durations, which must ascend.
func NewDurations(bounds ...time.Duration) *Durations {
	d := &Durations{buckets: make([]atomic.Uint64, len(bounds)+1)}
	for _, b := range bounds {
		d.bounds = append(d.bounds, b.Seconds())
	}
	if !slices.IsSorted(d.bounds) {
		panic("admin: bounds of a histogram do not ascend")
	}
	return d
}

// ConnectTimes returns a histogram for how long it takes to reach something: 1 ms to 32 s.
func ConnectTimes() *Durations { return NewDurations(growing(time.Millisecond, 2, 16)...) }

func growing(first time.Duration, factor time.Duration, n int) []time.Duration {
	bounds := make([]time.Duration, n)
	for i := range bounds {
		bounds[i] = first
		first *= factor
	}
	return bounds
}

// Observe counts one duration; a negative one (a clock that was set back) counts as 0.
func (d *Durations) Observe(v time.Duration) {
	v = max(0, v)
	i, _ := slices.BinarySearch(d.bounds, v.Seconds()) // a bound belongs to its own bucket
	d.buckets[i].Add(1)
	d.nanos.Add(uint64(v))
}

// Histogram is a snapshot of [Durations].
type Histogram struct {
	Count   uint64
	Sum     float64            // seconds
	Buckets map[float64]uint64 // upper bound → how many were at most that
}

// Snapshot reads the counts. Sum may be ahead of or behind Count by what is being observed at the moment.
func (d *Durations) Snapshot() Histogram {
	h := Histogram{Buckets: make(map[float64]uint64, len(d.bounds)), Sum: float64(d.nanos.Load()) / float64(time.Second)}
	for i := range d.buckets {
		h.Count += d.buckets[i].Load()
		if i < len(d.bounds) {
			h.Buckets[d.bounds[i]] = h.Count
		}
	}
	return h
}

// Metric makes the histogram a metric without labels; its name ends in _seconds.
func (d *Durations) Metric(name, help string) Metric {
	return Metric{Name: name, Help: help, Kind: KindHistogram, Samples: []Sample{{Histogram: d.Snapshot()}}}
}
