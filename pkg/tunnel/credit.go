// SPDX-License-Identifier: Apache-2.0

package tunnel

import "time"

// Credit, as the receiver of a stream counts it, in bytes since the stream began:
//
//	consumed <= received <= granted
//
// granted is what the far end was told, and is at most window beyond consumed. window starts at what the protocol gives for
// nothing and doubles while the reader takes a whole window in less than two round trips: then the link, not the reader, is
// what waits. What all windows of a session have beyond the first is taken from one budget. Credit that was granted cannot be
// taken back, so a window never shrinks; the budget returns when the stream ends.

// shortRTT stands in for round trips below it: on a fast network the time to turn around is not the link's.
const shortRTT = 2 * time.Millisecond

// consume notes that the local user has read n bytes of s. Needs mu.
func (l *link) consume(s *Stream, n int) {
	s.consumed += uint64(n)
	if l.streams[s.id] != s || s.finSeen || s.closed {
		return
	}
	l.widen(s)
	l.grant(s)
}

// widen doubles the window of s when it is what limits the stream. Needs mu.
func (l *link) widen(s *Stream) {
	if s.consumed-s.epochConsumed < uint64(s.window) {
		return
	}
	now := time.Now()
	rtt := max(l.rttMin, shortRTT)
	more := s.window
	if now.Sub(s.epoch) < 2*rtt && s.window*2 <= l.set.maxWindow && l.budget >= more {
		l.budget -= more
		s.window += more
	}
	s.epoch, s.epochConsumed = now, s.consumed
}

// grant queues credit for s if enough has come together. Needs mu.
func (l *link) grant(s *Stream) {
	target := s.consumed + uint64(s.window)
	if s.finSeen || target < s.granted+uint64(s.window/4) {
		return
	}
	s.ungranted += uint32(target - s.granted)
	s.granted = target
	l.granting = append(l.granting, s)
	notify(l.wake)
}
