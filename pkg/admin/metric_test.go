// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"strings"
	"sync"
	"testing"
	"time"
)

func TestValidate(t *testing.T) {
	good := []Metric{
		Counter("edge_tunnel_streams_total", "Streams.", uint64(1)),
		Gauge("edge_tunnel_tunnels", "Tunnels.", 1),
		CounterBy("edge_tunnel_refused_total", "Refusals.", "reason", map[string]int{"a": 1, "b": 2}),
		ConnectTimes().Metric("edge_tunnel_connect_seconds", "Time to connect."),
	}
	for _, m := range good {
		if err := m.Validate(); err != nil {
			t.Error(err)
		}
	}
	for _, c := range []struct {
		m    Metric
		want string
	}{
		{Counter("tunnel_streams_total", "S.", 1), "edge_tunnel_"},
		{Counter("edge_tunnel_Streams_total", "S.", 1), "snake"},
		{Counter("edge_tunnel__streams_total", "S.", 1), "snake"},
		{Counter("edge_tunnel_streams", "S.", 1), "_total"},
		{Gauge("edge_tunnel_streams_total", "S.", 1), "_total"},
		{ConnectTimes().Metric("edge_tunnel_connect", "S."), "unit"},
		{Gauge("edge_tunnel_x", "Streams", 1), "sentence"},
		{GaugeBy("edge_tunnel_x", "S.", "addr", map[string]int{"a": 1}), "not on the list"},
		{Metric{Name: "edge_tunnel_x", Help: "S.", Kind: KindGauge, Labels: []string{"node"}, Samples: []Sample{{}}}, "0 label values"},
		{Metric{Name: "edge_tunnel_x", Help: "S.", Kind: KindGauge, Samples: []Sample{{}, {}}}, "two samples"},
	} {
		if err := c.m.Validate(); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v: %v, want something with %q", c.m, err, c.want)
		}
	}
}

func TestScrape(t *testing.T) {
	config := testConfig()
	config.Metrics = func() []Metric {
		return []Metric{
			CounterBy("edge_tunnel_refused_total", "Refusals.", "reason", map[string]int{"denied": 7}),
			GaugeBy("edge_tunnel_tunnels", "Tunnels.", "node", map[string]int{"bad\xff\"name\n": 1}),
			{Name: "not a name", Help: "Broken.", Samples: []Sample{{Value: 1}}},
		}
	}
	url, _ := started(t, config)
	status, _, body := request(t, "GET", url+"/metrics")
	for _, want := range []string{`edge_tunnel_refused_total{reason="denied"} 7`, `edge_tunnel_tunnels{node="bad` + "\ufffd" + `\"name\n"} 1`} {
		if !strings.Contains(body, want) {
			t.Errorf("status %d, %s is missing:\n%.3000s", status, want, body)
		}
	}
}

func TestDurations(t *testing.T) {
	d := NewDurations(time.Millisecond, 10*time.Millisecond)
	for _, v := range []time.Duration{-time.Second, 0, time.Millisecond, 2 * time.Millisecond, time.Hour} {
		d.Observe(v)
	}
	h := d.Snapshot()
	if h.Count != 5 || h.Buckets[0.001] != 3 || h.Buckets[0.01] != 4 || h.Sum != 3600.003 {
		t.Errorf("got %+v", h)
	}
	config := testConfig()
	config.Metrics = func() []Metric { return []Metric{d.Metric("edge_tunnel_connect_seconds", "Time to connect.")} }
	url, _ := started(t, config)
	_, _, body := request(t, "GET", url+"/metrics")
	for _, want := range []string{`_bucket{le="0.001"} 3`, `_bucket{le="0.01"} 4`, `_bucket{le="+Inf"} 5`, "_sum 3600.003", "_count 5"} {
		if !strings.Contains(body, "edge_tunnel_connect_seconds"+want) {
			t.Errorf("%s is missing:\n%.3000s", want, body)
		}
	}
}

func TestDurationsFromManyGoroutines(t *testing.T) {
	d := ConnectTimes()
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for range 1000 {
				d.Observe(time.Duration(i) * time.Second)
				d.Snapshot()
			}
		})
	}
	wg.Wait()
	if h := d.Snapshot(); h.Count != 8000 || h.Sum != 28000 {
		t.Errorf("got %d, %v", h.Count, h.Sum)
	}
}

func TestBoundsMustAscend(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("no panic")
		}
	}()
	NewDurations(2, 1)
}
