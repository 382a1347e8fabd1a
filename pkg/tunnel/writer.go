// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"errors"
	"runtime"
	"time"
)

const (
	// Bounds of the queue of frames for the writer: half of what may wait in the kernel. See flight.go.
	minQueue = 16 << 10
	maxQueue = 128 << 10

	// maxUrgent bounds the frames that overtake those of other streams.
	maxUrgent = 32 << 10

	// lazyTime is how long a frame that nobody waits for may wait for company. A timer wakes a thread, so it is not worth less.
	lazyTime = 5 * time.Millisecond
)

// takeFrame takes a frame from yamux: headers of window updates that open or acknowledge a stream. Everything else is sent by
// ourselves. It never blocks, so that nothing in yamux can time out.
func (l *link) takeFrame(p []byte) (int, error) {
	if len(p) != headerLen {
		return 0, violation("yamux wrote something else than a header")
	}
	h, err := parseHeader(p)
	if err != nil {
		return 0, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		return len(p), nil
	}
	if h.id != 0 {
		if h.id += l.base; h.id < l.base {
			return 0, errors.New("stream numbers are used up")
		}
	}
	if h.flags&flagSYN != 0 {
		l.lastID = h.id
		s := newStream(l, h.id)
		l.streams[h.id] = s
		l.unclaimed[h.id] = s
	}
	switch {
	case h.typ == typeGoAway, h.flags&flagRST != 0: // yamux is at a loss; never seen
		l.queueControl(h)
	case h.flags&(flagSYN|flagACK) != 0 && l.streams[h.id] != nil:
		// The header follows a SYN at once, and the status an ACK unless the dial takes its time.
		l.control = h.appendTo(l.control)
		l.wakeLazily()
	}
	return len(p), nil
}

// queueControl queues a frame that overtakes data. Needs mu.
func (l *link) queueControl(h header) {
	if l.err != nil {
		return
	}
	l.control = h.appendTo(l.control)
	notify(l.wake)
}

// wakeLazily tells the writer of what is queued within lazyTime; before that it goes with what others queue. Needs mu.
func (l *link) wakeLazily() {
	if l.lazy {
		return
	}
	l.lazy = true
	if l.lazyTimer != nil {
		l.lazyTimer.Reset(lazyTime)
		return
	}
	l.lazyTimer = time.AfterFunc(lazyTime, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.lazy = false
		if len(l.control)+len(l.urgent)+len(l.data) > 0 {
			notify(l.wake)
		}
	})
}

// queueTurn lets s send what its Write has pending, one frame in a round of all streams. Needs mu.
func (l *link) queueTurn(s *Stream) {
	if len(s.pending) == 0 || s.inTurns {
		return
	}
	if s.credit == 0 {
		l.tellBlocked(s)
		return
	}
	s.inTurns = true
	if s.share < l.share+maxSend && s.batch != l.batch {
		l.fresh.push(s)
	} else {
		l.turns.push(s)
	}
	if l.fill() {
		notify(l.wake)
	}
}

// fill moves pending bytes into the queues while there is room, and reports whether it did. This is the whole of fairness: streams
// take turns, one frame each; one without credit has none. A stream that has had less than its share (share counts the
// bytes of each, that of the link those of whoever is served) goes first, and its frame overtakes what others have queued. Needs mu.
func (l *link) fill() (filled bool) {
	for {
		var s *Stream
		if len(l.urgent) < maxUrgent {
			s = l.fresh.pop()
		}
		waited := s == nil
		if waited && len(l.data) < l.queue {
			s = l.turns.pop()
		}
		if s == nil {
			return filled
		}
		s.inTurns = false
		n := int(min(int64(len(s.pending)), s.credit, maxSend))
		if n == 0 || s.ending || l.streams[s.id] != s {
			continue
		}
		if waited {
			s.batch = l.batch
		}
		l.queueData(s, s.pending[:n])
		s.pending = s.pending[n:]
		filled = true
		switch {
		case len(s.pending) == 0:
			notify(s.writable)
		case s.credit > 0:
			s.inTurns = true
			l.turns.push(s)
		default:
			l.tellBlocked(s)
		}
	}
}

// queueOf is where the next frame of s goes: in front, unless there are frames of it in data. Needs mu.
func (l *link) queueOf(s *Stream) *[]byte {
	if s.batch == l.batch {
		return &l.data
	}
	return &l.urgent
}

// queueData queues a frame. Needs mu.
func (l *link) queueData(s *Stream, p []byte) {
	q := l.queueOf(s)
	*q = header{typ: typeData, id: s.id, length: uint32(len(p))}.appendTo(*q)
	*q = append(*q, p...)
	l.share = max(l.share, s.share)
	s.share = l.share + uint64(len(p))
	s.credit -= int64(len(p))
	l.bytesOut.Add(uint64(len(p)))
}

// tellBlocked tells the far end, behind what was sent, that there would be more of s if it had credit. Needs mu.
func (l *link) tellBlocked(s *Stream) {
	if s.told || s.ending || l.streams[s.id] != s {
		return
	}
	s.told, s.batch = true, l.batch
	l.data = header{typ: typeWindow, id: s.id}.appendTo(l.data)
	notify(l.wake)
}

// turns is a queue of streams. A stream is in it once at most, see Stream.inTurns.
type turns struct{ first, last *Stream }

func (q *turns) push(s *Stream) {
	if q.first == nil {
		q.first = s
	} else {
		q.last.nextTurn = s
	}
	q.last = s
}

func (q *turns) pop() *Stream {
	s := q.first
	if s != nil {
		q.first, s.nextTurn = s.nextTurn, nil
	}
	return s
}

// writeLoop writes what is queued until the link is dead.
func (l *link) writeLoop() {
	var control, data []byte
	f := newFlight(l.raw.Conn)
	look := time.NewTimer(time.Hour)
	defer look.Stop()
	for {
		select {
		case <-l.wake:
		case <-look.C:
			f.wokenAt(time.Now())
		case <-l.dead:
			return
		}
		look.Stop()
		runtime.Gosched() // whoever has something to send by now, let him queue it: one record and one system call for all
		for {
			var left, closing bool
			may := f.may(time.Now())
			control, data, left, closing = l.takeQueued(control, data, may, min(max(f.unsentLimit()/2, minQueue), maxQueue))
			f.busy = f.busy || left
			if len(control)+len(data) == 0 {
				switch {
				case left:
					look.Reset(time.Until(f.next))
				case closing && !l.raw.closeWrite():
					l.fail(errClosed)
				}
				break
			}
			if err := l.writeOut(control, data); err != nil {
				l.fail(linkError(err))
				return
			}
			f.wrote(len(control) + len(data))
		}
	}
}

// takeQueued swaps the queues with two empty buffers, and fills them again up to the given length: streams prepare the next frames
// while these are written. Unless data may go, it is left.
func (l *link) takeQueued(control, data []byte, may bool, queue int) (c, d []byte, left, closing bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.granting {
		if s.ungranted > 0 && l.streams[s.id] == s {
			l.control = header{typ: typeWindow, id: s.id, length: s.ungranted}.appendTo(l.control)
		}
		s.ungranted = 0
	}
	l.granting = l.granting[:0]
	l.pongs = 0
	l.takes++
	if l.trim && len(l.data)+len(l.urgent) == 0 {
		l.trim, l.data, data, l.urgent, l.granting = false, nil, nil, nil, nil
		l.raw.trim()
	}
	l.queue = queue
	l.busy = l.busy || len(l.data)+len(l.urgent) > 0
	c, d = append(l.control, l.urgent...), data[:0]
	l.control, l.urgent = control[:0], l.urgent[:0]
	if may {
		d, l.data = l.data, d
		l.batch++
	}
	l.fill()
	return c, d, len(l.data) > 0, l.closing
}

// writeOut hands frames to TLS, and the records to the kernel together.
func (l *link) writeOut(control, data []byte) error {
	if len(control) > 0 && len(data) < 4<<10 {
		control = append(control, data...) // one record for both
		data = nil
	}
	l.raw.cork()
	for _, b := range [][]byte{control, data} {
		if len(b) == 0 {
			continue
		}
		if _, err := l.tls.Write(b); err != nil {
			return err
		}
	}
	return l.raw.uncork()
}
