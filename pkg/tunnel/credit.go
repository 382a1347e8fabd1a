// SPDX-License-Identifier: Apache-2.0

package tunnel

// Credit, as the receiver of a stream counts it, in bytes since the stream began:
//
//	consumed <= received <= granted
//
// granted is what the far end was told: window beyond consumed, or what was granted before the window shrank. window starts at
// what the protocol gives for nothing.
//
// A sender that has used its credit and has more to send says so behind its data, with a window update of nothing. If by then the
// reader has taken everything that came, both ends wait for the window, and it grows fourfold, or as the budgets allow. If the reader is behind, or if the far
// end still has credit, the window is not what limits. No clock is needed: losses, which make a window take several round
// trips, make no difference.
//
// What windows have beyond the first is taken from a budget of the session and one of the process. A stream that took less than a
// window between two pings gets half of it from then on. Credit that was granted cannot be taken back, so the budget has it
// again only when that was used, or when the stream ends.

// consume notes that the local user has read n bytes of s. Needs mu.
func (l *link) consume(s *Stream, n int) {
	s.consumed += uint64(n)
	if l.streams[s.id] != s || s.finSeen || s.closed {
		return
	}
	l.widen(s)
	l.grant(s)
	if s.extra > s.window-initialWindow {
		l.charge(s)
	}
}

// widen makes the window of s larger if both ends wait for it, and again only when what that gave was used up. Fourfold, because
// TCP doubles in a round trip, and a window that has losses in it takes two. Needs mu.
func (l *link) widen(s *Stream) {
	if !s.blocked || s.consumed < s.received || s.received < s.widened {
		return
	}
	s.blocked = false
	for _, wider := range []int{4 * s.window, 2 * s.window} {
		more := wider - s.window
		if wider <= l.set.maxWindow && l.budget >= more && l.total.windows.Load()+int64(more) <= int64(l.set.allWindows) {
			s.window = wider
			l.charge(s)
			s.widened = max(s.granted, s.consumed+uint64(wider))
			return
		}
	}
}

// narrow halves the windows of streams that have made no use of theirs since it was last called. Needs mu.
func (l *link) narrow() {
	for _, s := range l.streams {
		if s.window > initialWindow && s.consumed-s.narrowed < uint64(s.window) {
			s.window /= 2
			l.charge(s)
		}
		s.narrowed = s.consumed
	}
}

// charge takes from the budgets what s may receive beyond the first window, or gives back what it no longer may. Needs mu.
func (l *link) charge(s *Stream) {
	l.recharge(s, max(s.window, int(s.granted-s.consumed))-initialWindow)
}

func (l *link) recharge(s *Stream, extra int) {
	l.budget -= extra - s.extra
	l.total.windows.Add(int64(extra - s.extra))
	s.extra = extra
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
