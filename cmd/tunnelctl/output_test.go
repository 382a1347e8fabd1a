// SPDX-License-Identifier: Apache-2.0

package main

import (
	"testing"
	"time"
)

func TestDuration(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0s", 300 * time.Microsecond: "300µs", 21345 * time.Microsecond: "21.3ms", 1500 * time.Millisecond: "1.5s",
		61 * time.Second: "1m1s", 90 * time.Minute: "1h30m", 49 * time.Hour: "2d1h", -time.Minute: "-1m0s",
	} {
		if got := duration(d); got != want {
			t.Errorf("%v is %s, want %s", d, got, want)
		}
	}
}

func TestSize(t *testing.T) {
	for n, want := range map[uint64]string{
		0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1536: "1.5 KiB", 5 << 20: "5.0 MiB", 1 << 63: "8.0 EiB",
	} {
		if got := size(n); got != want {
			t.Errorf("%d is %s, want %s", n, got, want)
		}
	}
}

func TestUntil(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for _, c := range []struct {
		t    time.Time
		want string
	}{{time.Time{}, ""}, {now.Add(26 * time.Hour), "2026-01-03 05:04:05 (in 1d2h)"}, {now.Add(-time.Minute), "2026-01-02 03:03:05 (1m0s ago)"}} {
		if got := until(now, c.t); got != c.want {
			t.Errorf("%v is %q, want %q", c.t, got, c.want)
		}
	}
	if got := since(now, now.Add(time.Hour)); got != "0s" {
		t.Errorf("in the future since %s", got)
	}
}
