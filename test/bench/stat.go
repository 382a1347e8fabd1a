// SPDX-License-Identifier: Apache-2.0

package main

import (
	"slices"
	"time"
)

// spread is what several rounds say about one number.
type spread struct {
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
}

func spreadOf(values []float64) spread {
	if len(values) == 0 {
		return spread{}
	}
	sorted := slices.Sorted(slices.Values(values))
	n := len(sorted)
	median := sorted[n/2]
	if n%2 == 0 {
		median = (sorted[n/2-1] + sorted[n/2]) / 2
	}
	return spread{Median: median, Min: sorted[0], Max: sorted[n-1]}
}

// each picks one number of every element.
func each[T any](list []T, pick func(T) float64) []float64 {
	var values []float64
	for _, e := range list {
		values = append(values, pick(e))
	}
	return values
}

// ratios divides pairwise: both numbers of a pair are from one round, a second or two apart, so that what slows the
// machine for longer cancels out.
func ratios(over, under []float64) []float64 {
	var values []float64
	for i := range min(len(over), len(under)) {
		if under[i] > 0 {
			values = append(values, over[i]/under[i])
		}
	}
	return values
}

// percentile sorts the list. p is 0 to 100.
func percentile(list []time.Duration, p int) time.Duration {
	if len(list) == 0 {
		return 0
	}
	slices.Sort(list)
	return list[min(len(list)-1, len(list)*p/100)]
}

func micros(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e3 }
