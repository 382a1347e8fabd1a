// SPDX-License-Identifier: Apache-2.0

package main

import "fmt"

// kind is what a connection does.
type kind string

const (
	connects kind = "connect" // connect, request, answer, close; again and again
	pings    kind = "ping"    // a message there and back on an open connection
	down     kind = "down"    // bytes from the service
	up       kind = "up"      // bytes to the service

	// On long links, by time and not by amount.
	downFor  kind = "down for" // bytes from the service
	upFor    kind = "up for"   // bytes to it
	stalled  kind = "down beside stalled readers"
	keysDown kind = "keys beside down"
	keysUp   kind = "keys beside up"
	visits   kind = "visit" // connect to each of many nodes and be told its name
)

// work is one row of the tables: something that is measured on every path.
type work struct {
	Kind  kind `json:"kind"`
	Conns int  `json:"connections"` // at once
	Count int  `json:"count"`       // all connections together: connects or messages; of bulk: MiB; milliseconds of what goes by time
}

func (w work) String() string { return fmt.Sprintf("%s %d", w.Kind, w.Conns) }

// bulk says whether the result is a speed and not a time.
func (w work) bulk() bool { return w.Kind == down || w.Kind == up }

// works lists what is measured. Each takes about a second on the slower paths.
func works(quick bool) []work {
	all := []work{
		{connects, 1, 1000}, {connects, 16, 4000}, {connects, 32, 4000},
		{pings, 1, 6000}, {pings, 8, 16000}, {pings, 32, 16000},
		{down, 1, 512}, {down, 8, 512}, {down, 32, 512},
		{up, 1, 512}, {up, 8, 512}, {up, 32, 512},
	}
	if !quick {
		return all
	}
	for i, w := range all {
		all[i].Count = max(w.Count/64, w.Conns)
	}
	return all
}

// warmUp is the same in small: what a path does for the first time in a while costs more.
func (w work) warmUp() work {
	w.Count = max(w.Count/20, w.Conns)
	return w
}

// task is what the client is told to do, sample what it answers. They travel as lines of JSON.
type task struct {
	Work work   `json:"work"`
	Addr string `json:"addr"`
	// Beside is where the second connection for keys leads, the same way for all paths.
	Beside string `json:"beside,omitempty"`
}

type sample struct {
	Seconds float64 `json:"seconds"`
	Ops     int     `json:"ops,omitempty"`   // connects or messages
	Bytes   int64   `json:"bytes,omitempty"` // that arrived, of bulk
	P50     float64 `json:"p50_us,omitempty"`
	P99     float64 `json:"p99_us,omitempty"`
	// The same of the connection that Beside asked for.
	BesideP50 float64 `json:"beside_p50_us,omitempty"`
	BesideP99 float64 `json:"beside_p99_us,omitempty"`
	// NearRSS is the memory of the near end beside stalled readers, in KiB.
	NearRSS float64 `json:"near_rss_kib,omitempty"`
	// CPU seconds of the near and of the far end, and of what is between, filled in by who asked for the sample.
	Near    float64 `json:"near_cpu"`
	Between float64 `json:"between_cpu,omitempty"`
	Far     float64 `json:"far_cpu"`
	Error   string  `json:"error,omitempty"`
}

func (s sample) perSecond() float64 { return float64(s.Ops) / s.Seconds }
func (s sample) mib() float64       { return float64(s.Bytes) / (1 << 20) / s.Seconds }

// main number of a work: MiB a second, or microseconds.
func (w work) value(s sample) float64 {
	if w.bulk() {
		return s.mib()
	}
	return s.P50
}
