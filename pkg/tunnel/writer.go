// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"runtime"
	"time"
)

const (
	// The queue of frames for the writer is short, so that what is written later does not wait long: queueTime and the same
	// again for the frames that are being written. How many bytes that is depends on the link; the length is adapted
	// between the two bounds. At less than 30 Mbit/s it is minQueue.
	queueTime = 8 * time.Millisecond
	minQueue  = 32 << 10
	maxQueue  = 128 << 10

	// lazyTime is how long a frame that nobody waits for may wait for company. A timer wakes a thread, so it is not worth less.
	lazyTime = 5 * time.Millisecond
)

// Write takes frames from yamux: headers of window updates that open or acknowledge a stream. Everything else is sent by
// ourselves. It never blocks, so that nothing in yamux can time out.
func (l *link) Write(p []byte) (int, error) {
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
	if h.flags&flagSYN != 0 {
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
		if len(l.control)+len(l.data) > 0 {
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
	l.turns.push(s)
	if l.fill() {
		notify(l.wake)
	}
}

// fill moves pending bytes into the queue while there is room, and reports whether it did. This is the whole of fairness:
// streams take turns, one frame each; one without credit has none. Needs mu.
func (l *link) fill() (filled bool) {
	for len(l.data) < l.queue {
		s := l.turns.pop()
		if s == nil {
			break
		}
		s.inTurns = false
		n := int(min(int64(len(s.pending)), s.credit, maxSend))
		if n == 0 || s.ending || l.streams[s.id] != s {
			continue
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
	return filled
}

// queueData queues a frame. Needs mu.
func (l *link) queueData(s *Stream, p []byte) {
	l.data = header{typ: typeData, id: s.id, length: uint32(len(p))}.appendTo(l.data)
	l.data = append(l.data, p...)
	s.credit -= int64(len(p))
	l.bytesOut.Add(uint64(len(p)))
}

// tellBlocked tells the far end, behind what was sent, that there would be more of s if it had credit. Needs mu.
func (l *link) tellBlocked(s *Stream) {
	if s.told || s.ending || l.streams[s.id] != s {
		return
	}
	s.told = true
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
	for {
		select {
		case <-l.wake:
		case <-l.dead:
			return
		}
		runtime.Gosched() // whoever has something to send by now, let him queue it: one record and one system call for all
		for {
			var closing bool
			control, data, closing = l.takeQueued(control, data)
			if len(control)+len(data) == 0 {
				if closing && !l.raw.closeWrite() {
					l.fail(errClosed)
				}
				break
			}
			begun := time.Now()
			if err := l.writeOut(control, data); err != nil {
				l.fail(linkError(err))
				return
			}
			l.adapt(len(data), time.Since(begun))
		}
	}
}

// takeQueued swaps the queues with two empty buffers, and fills them again: streams prepare the next frames while
// these are written.
func (l *link) takeQueued(control, data []byte) (c, d []byte, closing bool) {
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
	l.batch++
	if l.trim && len(l.data) == 0 {
		l.trim, l.data, data, l.granting = false, nil, nil, nil
		l.raw.trim()
	}
	c, d = l.control, l.data
	l.control, l.data = control[:0], data[:0]
	l.busy = l.busy || len(d) > 0
	l.fill()
	return c, d, l.closing
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

// adapt changes the length of the queue to what the link takes in queueTime, after n bytes of data took that long.
func (l *link) adapt(n int, took time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case n < l.queue:
		// Too little to tell.
	case took > queueTime:
		l.queue = max(l.queue/2, minQueue)
	case took < queueTime/4:
		l.queue = min(l.queue*2, maxQueue)
	}
}
