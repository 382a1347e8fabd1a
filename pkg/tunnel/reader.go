// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"errors"
	"io"
	"time"
)

// show moves what yamux must see to p.
func (l *link) show(p []byte) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	b := p[:0]
	n := 0
	for ; n < len(l.shown) && len(p)-len(b) >= headerLen; n++ {
		h := l.shown[n]
		h.id -= l.base
		b = h.appendTo(b)
		if h.flags&flagACK != 0 {
			l.releaseOpen() // not before: yamux waits for acknowledgements as well, without a context
		}
	}
	l.shown = append(l.shown[:0], l.shown[n:]...)
	return len(b)
}

func (l *link) releaseOpen() {
	select {
	case <-l.opens:
	default:
	}
}

func linkError(err error) error {
	var e *Error
	switch {
	case errors.As(err, &e):
		return e
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return errPeerGone
	}
	return &Error{reason: "link_lost", text: "connection lost", cause: err}
}

// receive reads one frame and does what it says.
func (l *link) receive() error {
	b, err := l.in.header()
	if err != nil {
		return err
	}
	h, err := parseHeader(b)
	if err != nil {
		return err
	}
	l.in.r += headerLen
	switch h.typ {
	case typePing:
		return l.receivePing(h)
	case typeGoAway:
		return l.receiveGoAway(h)
	}
	s, room, err := l.receiveHeader(h)
	if err != nil {
		return err
	}
	if room == nil {
		err = l.in.skip(h.body())
	} else {
		err = l.in.fill(room)
	}
	if err != nil {
		return err
	}
	if s != nil {
		l.receiveBody(s, len(room), h.flags&flagFIN != 0)
	}
	return nil
}

// receiveHeader judges a frame and does everything but its body and its FIN, which comes after the body. room is where the
// body belongs, nil if nobody wants it; s is nil if there is nothing left to do.
func (l *link) receiveHeader(h header) (s *Stream, room []byte, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s = l.streams[h.id]
	if h.flags&flagSYN != 0 {
		switch {
		case l.opener:
			return nil, nil, violation("stream opened towards the end that opens streams")
		case h.id%2 == 0, s != nil, l.unclaimed[h.id] != nil:
			return nil, nil, violation("stream opened twice")
		case l.err != nil:
			return nil, nil, nil
		case len(l.streams) >= l.set.maxStreams, len(l.unclaimed) >= maxOpens+maxOpens/2:
			l.total.refusedStreams.Add(1)
			l.queueControl(header{typ: typeWindow, flags: flagRST, id: h.id})
			return nil, nil, nil
		}
		s = newStream(l, h.id)
		l.streams[h.id] = s
		l.unclaimed[h.id] = s
		l.shown = append(l.shown, header{typ: typeWindow, flags: flagSYN, id: h.id})
	}
	if s == nil {
		return nil, nil, nil // still on its way when we reset the stream
	}
	if l.opener && !s.acked {
		l.acknowledge(s) // any answer is one
	}
	if h.flags&flagRST != 0 {
		l.endStream(s, &ResetError{}) // what arrived before can still be read
		return nil, nil, nil
	}
	if s.finSeen && (h.body() > 0 || h.flags&flagFIN != 0) {
		return nil, nil, violation("more after the end of a stream")
	}
	switch {
	case h.typ == typeWindow && h.length > 0:
		if s.credit+int64(h.length) > 1<<30 {
			return nil, nil, violation("too much credit")
		}
		s.credit += int64(h.length)
		s.told = false
		l.queueTurn(s)
	case h.typ == typeWindow && h.flags == 0:
		s.blocked = true
		l.consume(s, 0)
	}
	if n := h.body(); n > 0 {
		if s.received+uint64(n) > s.granted {
			return nil, nil, violation("data without credit")
		}
		s.received += uint64(n)
		s.blocked = false
		l.bytesIn.Add(uint64(n))
		if !s.closed {
			room = s.in.reserve(n)
		}
	}
	return s, room, nil
}

// receiveBody passes on what has been put into the room for it.
func (l *link) receiveBody(s *Stream, n int, fin bool) {
	if n == 0 && !fin {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if n > 0 && !s.closed {
		s.in.commit(n)
	}
	if fin && l.streams[s.id] == s {
		s.finSeen = true
		l.removeIfFinished(s)
	}
	notify(s.readable)
}

func (l *link) receivePing(h header) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if h.flags == flagSYN {
		if l.pongs == maxPongs {
			return violation("too many pings")
		}
		l.pongs++
		l.queueControl(header{typ: typePing, flags: flagACK, length: h.length})
		return nil
	}
	if !l.pingOpen || h.length != l.pingID {
		return nil
	}
	l.pingOpen = false
	l.rtt = max(time.Since(l.pinged), time.Microsecond)
	return nil
}

func (l *link) receiveGoAway(h header) error {
	if h.length != 0 {
		return &Error{reason: "peer_failed", text: "far end reports an error"}
	}
	l.mu.Lock()
	first := !l.asked
	l.asked = true
	l.mu.Unlock()
	if first && l.onGoAway != nil {
		l.onGoAway()
	}
	return nil
}
