// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"testing"
	"time"
)

// water is a link as a fluid: a narrow part with a queue before it, then the way there and back. TCP hands on what it gets at once.
type water struct {
	rate    float64       // bytes a second
	trip    time.Duration // there and back, without a queue
	foreign float64       // bytes of others in the queue, which they keep there whatever we do

	now       time.Time
	queue     float64
	under     []float64       // what left the narrow part, in steps, oldest first
	waited    []time.Duration // in the queue, the same
	delivered float64
	highest   time.Duration // round trip
}

const step = time.Millisecond

func (w *water) srtt() time.Duration {
	return w.trip + time.Duration((w.queue+w.foreign)/w.rate*float64(time.Second))
}

func (w *water) inFlight() (n float64) {
	for _, m := range w.under {
		n += m
	}
	return n + w.queue
}

func (w *water) ask() (tcpState, error) {
	const mss = 1448
	srtt := w.trip
	if len(w.waited) > 0 {
		srtt += w.waited[0] // what has arrived tells
	}
	return tcpState{srtt: srtt, minRTT: w.trip, inFlight: int(w.inFlight()), delivered: uint32(w.delivered / mss), mss: mss}, nil
}

// run lets a writer that always has more use the link, and returns what arrived, in bytes a second.
func (w *water) run(f *flight, d time.Duration) float64 {
	begun := w.delivered
	w.highest = 0
	for range d / step {
		w.now = w.now.Add(step)
		// What is ours in the queue leaves it in proportion.
		leaves := 0.0
		if w.queue > 0 {
			leaves = min(w.queue, w.rate*step.Seconds()*w.queue/(w.queue+w.foreign))
		}
		w.queue -= leaves
		w.under, w.waited = append(w.under, leaves), append(w.waited, w.srtt()-w.trip)
		for len(w.under) > int(w.trip/step) {
			w.delivered += w.under[0]
			w.under, w.waited = w.under[1:], w.waited[1:]
		}
		for f.may(w.now) {
			n := min(max(f.unsentLimit()/2, minQueue), maxQueue)
			f.busy = true
			f.wrote(n)
			w.queue += float64(n)
		}
		f.busy = true
		w.highest = max(w.highest, w.srtt())
	}
	return (w.delivered - begun) / d.Seconds()
}

func newWater(mbit float64, trip time.Duration) (*flight, *water) {
	w := &water{rate: mbit * 1e6 / 8, trip: trip, now: time.Now()}
	return &flight{ask: w.ask}, w
}

func TestFlightFillsTheLinkAndNotItsQueue(t *testing.T) {
	for _, c := range []struct {
		mbit float64
		trip time.Duration
	}{{10, 50 * time.Millisecond}, {100, 100 * time.Millisecond}, {300, 50 * time.Millisecond}, {1000, 4 * time.Millisecond}, {20, 600 * time.Millisecond}} {
		f, w := newWater(c.mbit, c.trip)
		first := w.run(f, 20*c.trip+time.Second)
		began := w.highest
		then := w.run(f, 60*time.Second)
		t.Logf("%v Mbit/s, %v: %.2f of it at first, queue up to %v; then %.2f, round trip up to %v",
			c.mbit, c.trip, first/w.rate, began-c.trip, then/w.rate, w.highest)
		if first < 0.6*w.rate || then < 0.97*w.rate {
			t.Errorf("%v Mbit/s, %v: %.2f of it at first, then %.2f", c.mbit, c.trip, first/w.rate, then/w.rate)
		}
		frames := step + 2*time.Duration(max(float64(minQueue)/w.rate, 0.002)*float64(time.Second))
		if most := max(c.trip*5/4, c.trip+shortQueue) + frames; w.highest > most {
			t.Errorf("%v Mbit/s, %v: the round trip was %v, want at most %v", c.mbit, c.trip, w.highest, most)
		}
		if began > 4*(c.trip*5/4+shortQueue)+frames {
			t.Errorf("%v Mbit/s, %v: the round trip was %v in the beginning", c.mbit, c.trip, began)
		}
	}
}

func TestFlightFollowsTheLink(t *testing.T) {
	f, w := newWater(20, 40*time.Millisecond)
	w.run(f, 10*time.Second)
	w.rate *= 8
	if got := w.run(f, 3*time.Second); got < 0.7*w.rate {
		t.Errorf("faster: %.2f of it", got/w.rate)
	}
	w.rate /= 8
	w.run(f, 3*bwPeriod)
	if got := w.run(f, 5*time.Second); got < 0.97*w.rate || w.highest > 60*time.Millisecond {
		t.Errorf("slower again: %.2f of it, round trip up to %v", got/w.rate, w.highest)
	}
	// A longer way than the kernel's least round trip says, which is kept for minutes.
	least := w.trip
	w.trip *= 4
	f.ask = func() (tcpState, error) {
		s, err := w.ask()
		s.minRTT = least
		return s, err
	}
	w.run(f, 10*time.Second)
	if got := w.run(f, 30*time.Second); got < 0.75*w.rate {
		t.Errorf("longer: %.2f of it", got/w.rate)
	}
}

// Others who keep the queue full make the round trip longer than it would be alone. That is no reason to give way to them.
func TestFlightKeepsItsShare(t *testing.T) {
	f, w := newWater(100, 50*time.Millisecond)
	w.foreign = w.rate * 0.05
	first := w.run(f, 10*time.Second)
	last := 0.0
	for range 6 {
		last = w.run(f, 10*time.Second)
	}
	t.Logf("%.2f of the link, after a minute %.2f", first/w.rate, last/w.rate)
	if first < 0.2*w.rate || last < 0.5*first {
		t.Errorf("%.2f of the link, after a minute %.2f", first/w.rate, last/w.rate)
	}
}

func TestFlightAfterARest(t *testing.T) {
	f, w := newWater(100, 100*time.Millisecond)
	w.run(f, 5*time.Second)
	// A key every 20 ms for an hour.
	for range 3600 * 50 {
		w.now = w.now.Add(20 * time.Millisecond)
		w.delivered += 1448
		f.may(w.now)
		f.wrote(100)
	}
	w.under, w.waited, w.queue = nil, nil, 0
	if got := w.run(f, time.Second); got < 0.7*w.rate {
		t.Errorf("%.2f of the link", got/w.rate)
	}
}

func TestFlightAllowsForLateWakes(t *testing.T) {
	f, w := newWater(100, 20*time.Millisecond)
	w.run(f, 5*time.Second)
	s, _ := w.ask()
	limit, unsent := f.limit(s), f.unsentLimit()
	f.wokenAt(f.next.Add(10 * time.Millisecond))
	if f.limit(s) < limit+int(w.rate*0.009) || f.unsentLimit() < unsent+int(w.rate*0.018) {
		t.Errorf("%d and %d became %d and %d", limit, unsent, f.limit(s), f.unsentLimit())
	}
	for range 100 {
		f.wokenAt(f.next)
	}
	if f.limit(s) > limit+100 || f.unsentLimit() > unsent+100 {
		t.Errorf("%d and %d became %d and %d", limit, unsent, f.limit(s), f.unsentLimit())
	}
}
