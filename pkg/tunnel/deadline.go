// SPDX-License-Identifier: Apache-2.0

package tunnel

import "time"

// deadline is one of a stream's two. Its fields need link.mu.
type deadline struct {
	at    time.Time // zero: none
	timer *time.Timer
}

// set changes the deadline, and lets those who wait for wake look again now and when it passes.
func (d *deadline) set(t time.Time, l *link, wake chan struct{}) {
	d.at = t
	notify(wake)
	if d.timer != nil {
		d.timer.Stop()
	}
	left := time.Until(t)
	switch {
	case t.IsZero() || left <= 0:
	case d.timer != nil:
		d.timer.Reset(left)
	default:
		d.timer = time.AfterFunc(left, func() {
			l.mu.Lock()
			defer l.mu.Unlock()
			if left := time.Until(d.at); left > 0 { // the two clocks differ
				d.timer.Reset(left)
			} else {
				notify(wake)
			}
		})
	}
}

func (d *deadline) passed() bool { return !d.at.IsZero() && !time.Now().Before(d.at) }
