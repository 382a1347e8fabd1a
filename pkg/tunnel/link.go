// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// settings of a session; both ends of a tunnel have the same type but may differ in values.
type settings struct {
	keepAlive  time.Duration // longest time between two of our pings
	maxStreams int           // streams at one time
	maxWindow  int           // bytes one stream may have on the way to us, at most
	budget     int           // bytes by which all windows together may exceed initialWindow each
}

const (
	// backlog is yamux's bound for streams that the far end has not acknowledged. Ours is half of it, so that
	// yamux.OpenStream, which takes no context, never has to wait.
	backlog  = 1024
	maxOpens = backlog / 2

	// dataTokens is how many data frames may be on their way from Stream.Write to the kernel. Streams queue for a token in
	// order of arrival, one frame each: that is the whole of fairness.
	dataTokens = 2

	maxPongs = 16 // answers to pings that wait to be sent

	// lingerTime is how long a stream that was closed on our side only waits for the FIN of the far end.
	lingerTime = 5 * time.Second
)

// link is the connection as a yamux session sees it: an io.ReadWriteCloser whose Read and Write pass whole frames. It
// stands between the session and TLS and closes the gaps of the released yamux:
//
//   - frames are queued here and written by one goroutine, many to a TLS record; Write never blocks, so nothing in
//     yamux can time out half way;
//   - pings, credit and resets overtake data;
//   - pings are ours alone, yamux sees none;
//   - yamux believes in one large, fixed window; what the far end is granted is decided here (see credit.go);
//   - a reset is sent to the far end and shown to the local session, which has no other way to drop one stream;
//   - it is known of each stream whether its FIN was seen, which yamux forgets when a session dies.
//
// Lock order: yamux's own locks, then mu. Nothing of yamux is called with mu held.
type link struct {
	tls    io.ReadWriter // *tls.Conn
	raw    *raw
	set    settings
	opener bool // this end opens all streams; a SYN from the far end is a violation
	total  *counters

	// Reading side, owned by the goroutine in which yamux calls Read.
	in      inbuf
	head    []byte // of the frame being shown, what yamux has not taken yet
	headBuf [headerLen]byte
	body    int     // the same of its body
	settled *Stream // gets credit once yamux has dealt with the frame
	credit  int64

	// Writing side, owned by the goroutine in which yamux calls Write.
	pending header // data header that waits for its body
	partial bool

	tokens chan struct{} // held by data frames, see dataTokens
	opens  chan struct{} // held by streams we opened, until the far end acknowledges
	wake   chan struct{} // tells the writer that there is something to write
	dead   chan struct{} // closed by fail

	bytesIn, bytesOut atomic.Uint64 // payload of streams

	mu        sync.Mutex
	err       error // why the link is dead
	streams   map[uint32]*Stream
	unclaimed map[uint32]*Stream // opened by either end, not yet fetched by open or accept; may be reset by then
	inject    []header           // frames to show to yamux as if they had arrived
	control   []byte             // encoded frames that overtake data
	data      []byte             // encoded frames in order
	frames    int                // data frames in data, each of which holds a token
	granting  []*Stream          // streams with credit to be sent
	budget    int                // what is left of settings.budget
	pongs     int
	pingID    uint32
	pinged    time.Time // when our last ping was queued
	pingOpen  bool      // and is not answered
	nextPing  time.Time
	suspect   time.Time // dead by then unless raw.heard differs from heardThen; zero: not suspected
	heardThen int64
	busy      bool // data was sent since the last tick
	trim      bool // the writer shall let go of its buffers
	rtt       time.Duration
	rttMin    time.Duration
	rttMinAt  time.Time
	lingering []lingering
	timer     *time.Timer
	leaving   bool          // we sent a go-away
	asked     bool          // the far end did
	onGoAway  func()        // called once, from the reader, without mu
	empty     chan struct{} // closed when leaving and no stream is left
	closing   bool          // send what is queued, then a FIN
}

type lingering struct {
	stream *Stream
	until  time.Time
}

func newLink(conn io.ReadWriter, r *raw, opener bool, set settings, total *counters) *link {
	return &link{
		tls: conn, raw: r, set: set, opener: opener, total: total,
		in:        inbuf{src: conn},
		tokens:    make(chan struct{}, dataTokens),
		opens:     make(chan struct{}, maxOpens),
		wake:      make(chan struct{}, 1),
		dead:      make(chan struct{}),
		streams:   make(map[uint32]*Stream),
		unclaimed: make(map[uint32]*Stream),
		budget:    set.budget,
		empty:     make(chan struct{}),
	}
}

// Read gives yamux the bytes of one frame at a time, never of two: when it asks for more than a frame has left, it has dealt
// with all of that frame.
func (l *link) Read(p []byte) (int, error) {
	if len(l.head) == 0 && l.body == 0 {
		if err := l.nextFrame(); err != nil {
			l.fail(err)
			return 0, io.EOF
		}
	}
	n := copy(p, l.head)
	l.head = l.head[n:]
	m := copy(p[n:], l.in.take(min(len(p)-n, l.body)))
	l.body -= m
	return n + m, nil
}

// nextFrame blocks until there is a frame to show.
func (l *link) nextFrame() error {
	l.settle()
	for {
		if h, ok := l.injected(); ok {
			l.head, l.body = h.appendTo(l.headBuf[:0]), 0
			return nil
		}
		h, err := l.peekFrame()
		if err != nil {
			var ne net.Error
			if errors.As(err, &ne) && ne.Timeout() && l.alive() {
				// poke interrupted us. The deadline is lifted before the queue is looked at again, so none is missed. A TLS
				// connection survives a read that timed out (it does not survive such a write).
				_ = l.raw.SetReadDeadline(time.Time{})
				continue
			}
			return linkError(err)
		}
		l.in.take(headerLen)
		shown, show, err := l.receive(h)
		if err != nil {
			return err
		}
		if skip := h.body() - shown.body(); !show {
			l.in.take(h.body())
			continue
		} else if skip > 0 {
			l.in.take(skip)
		}
		l.head, l.body = shown.appendTo(l.headBuf[:0]), shown.body()
		return nil
	}
}

// peekFrame waits until a whole frame is buffered and returns its header.
func (l *link) peekFrame() (header, error) {
	b, err := l.in.peek(headerLen)
	if err != nil {
		return header{}, err
	}
	h, err := parseHeader(b)
	if err == nil {
		_, err = l.in.peek(headerLen + h.body())
	}
	return h, err
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

func (l *link) alive() bool {
	select {
	case <-l.dead:
		return false
	default:
		return true
	}
}

// settle gives a stream the credit of the frame that yamux has just dealt with. Had we given it before, Stream.Write could
// find less credit in yamux than here, and wait inside yamux with a token.
func (l *link) settle() {
	if l.settled == nil {
		return
	}
	l.mu.Lock()
	l.settled.credit += l.credit
	l.mu.Unlock()
	notify(l.settled.more)
	l.settled = nil
}

func (l *link) injected() (header, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.inject) == 0 {
		l.inject = nil
		return header{}, false
	}
	h := l.inject[0]
	l.inject = l.inject[1:]
	return h, true
}

// poke interrupts a blocked Read so that it looks at inject. Called without mu or with it.
func (l *link) poke() { _ = l.raw.SetReadDeadline(time.Unix(1, 0)) }

// receive judges a frame from the far end and does our share of its work. It returns the frame as yamux shall see it, if at
// all; its body is either that of h or empty.
func (l *link) receive(h header) (shown header, show bool, err error) {
	switch h.typ {
	case typePing:
		return h, false, l.receivePing(h)
	case typeGoAway:
		return h, false, l.receiveGoAway(h)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.streams[h.id]
	if h.flags&flagSYN != 0 {
		switch {
		case l.opener:
			return h, false, violation("stream opened towards the end that opens streams")
		case h.id%2 == 0, s != nil, l.unclaimed[h.id] != nil:
			return h, false, violation("stream opened twice")
		case l.err != nil:
			return h, false, nil
		case len(l.streams) >= l.set.maxStreams, len(l.unclaimed) >= maxOpens+maxOpens/2:
			l.total.refusedStreams.Add(1)
			l.queueControl(header{typ: typeWindow, flags: flagRST, id: h.id})
			return h, false, nil
		}
		s = newStream(l, h.id)
		l.streams[h.id] = s
		l.unclaimed[h.id] = s
	}
	if s == nil {
		return h, false, nil // still on its way when we reset the stream
	}
	if l.opener {
		// Any answer is an acknowledgement. yamux must see exactly one per stream: without one it keeps an entry for
		// ever, with two it gives back the slot of another stream.
		h.flags &^= flagACK
		if !s.acked {
			l.acknowledge(s)
			h.flags |= flagACK
		}
	} else {
		h.flags &^= flagACK
	}
	if h.flags&flagRST != 0 {
		shown, show = l.receiveReset(s, h)
		return shown, show, nil
	}
	if h.typ == typeWindow && h.length > 0 {
		if s.credit+int64(h.length) > 1<<30 {
			return h, false, violation("too much credit")
		}
		l.settled, l.credit = s, int64(h.length)
	}
	if h.typ == typeData && h.length > 0 {
		if s.finSeen || s.received+uint64(h.length) > s.granted {
			return h, false, violation("data after the end, or without credit")
		}
		s.received += uint64(h.length)
		l.bytesIn.Add(uint64(h.length))
		if s.closed {
			h.length = 0
		}
	}
	if h.flags&flagFIN != 0 {
		if s.finSeen {
			return h, false, violation("stream ended twice")
		}
		s.finSeen = true
		l.removeIfFinished(s)
	}
	return h, true, nil
}

// receiveReset ends s. What arrived before the reset can still be read: yamux would throw it away, so it is shown an
// end of data, which Stream.Read turns into the reset.
func (l *link) receiveReset(s *Stream, h header) (header, bool) {
	l.endStream(s, &ResetError{})
	ack := h.flags & flagACK
	switch {
	case s.received == s.consumed:
		return header{typ: typeWindow, flags: flagRST | ack, id: s.id}, true
	case !s.finSeen:
		s.disguised = true
		return header{typ: typeWindow, flags: flagFIN | ack, id: s.id}, true
	default:
		s.disguised = true
		return h, false
	}
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
	now := time.Now()
	l.rtt = max(now.Sub(l.pinged), time.Microsecond)
	if l.rttMin == 0 || l.rtt < l.rttMin || now.Sub(l.rttMinAt) > time.Minute {
		l.rttMin, l.rttMinAt = l.rtt, now
	}
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

// Write takes frames from yamux, header and body in a Write each.
func (l *link) Write(p []byte) (int, error) {
	if l.partial {
		l.partial = false
		l.sendData(l.pending, p)
		return len(p), nil
	}
	if len(p) != headerLen {
		return 0, violation("yamux wrote something else than a header")
	}
	h, err := parseHeader(p)
	if err != nil {
		return 0, err
	}
	if h.body() > 0 {
		l.pending, l.partial = h, true
		return len(p), nil
	}
	l.sendHeader(h)
	return len(p), nil
}

func (l *link) sendData(h header, body []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil || l.streams[h.id] == nil {
		l.releaseToken()
		return
	}
	if l.data == nil {
		l.data = make([]byte, 0, headerLen+len(body))
	}
	l.data = append(h.appendTo(l.data), body...)
	l.frames++
	l.busy = true
	l.bytesOut.Add(uint64(len(body)))
	notify(l.wake)
}

func (l *link) sendHeader(h header) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		return
	}
	if h.typ == typePing || h.typ == typeGoAway {
		l.queueControl(h)
		return
	}
	if h.flags&flagSYN != 0 {
		s := newStream(l, h.id)
		l.streams[h.id] = s
		l.unclaimed[h.id] = s
	}
	s := l.streams[h.id]
	if s == nil {
		return // of a stream that was reset since
	}
	if h.typ == typeWindow {
		s.promised += uint64(h.length)
		h.length = 0
	}
	switch {
	case h.flags&flagFIN != 0:
		// After the data of the stream, so not with the control frames.
		l.data = h.appendTo(l.data)
		s.finSent = true
		l.removeIfFinished(s)
		notify(l.wake)
	case h.flags != 0:
		l.queueControl(h)
	default:
		l.grant(s)
	}
}

// queueControl queues a frame that overtakes data. Needs mu.
func (l *link) queueControl(h header) {
	if l.err != nil {
		return
	}
	l.control = h.appendTo(l.control)
	notify(l.wake)
}

// Close is called by yamux when it gives up the session.
func (l *link) Close() error {
	l.fail(errClosed)
	return nil
}

// fail ends the link. The first error stays. yamux follows, as its Read fails; Stream users see a ResetError.
func (l *link) fail(err error) {
	l.mu.Lock()
	if l.err != nil {
		l.mu.Unlock()
		return
	}
	l.err = err
	close(l.dead)
	for _, s := range l.streams {
		l.endStream(s, &ResetError{Tunnel: err})
	}
	clear(l.unclaimed)
	l.control, l.data, l.granting, l.lingering = nil, nil, nil, nil
	if l.timer != nil {
		l.timer.Stop()
	}
	l.mu.Unlock()
	// Not tls.Conn.Close: it may wait seconds to send an alert that nobody needs.
	_ = l.raw.Close()
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
		for {
			var closing bool
			control, data, closing = l.takeQueued(control, data)
			if len(control)+len(data) == 0 {
				if closing && !l.raw.closeWrite() {
					l.fail(errClosed)
				}
				break
			}
			if err := l.writeOut(control, data); err != nil {
				l.fail(linkError(err))
				return
			}
		}
	}
}

// takeQueued swaps the queues with two empty buffers. The tokens of the data frames are given back here, so that streams
// prepare the next frames while these are written.
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
	for range l.frames {
		l.releaseToken()
	}
	l.frames = 0
	if l.trim && len(l.data) == 0 {
		l.trim, l.data, data = false, nil, nil
	}
	c, d = l.control, l.data
	l.control, l.data = control[:0], data[:0]
	return c, d, l.closing
}

func (l *link) writeOut(control, data []byte) error {
	if len(control) > 0 && len(data) < 4<<10 {
		control = append(control, data...) // one record for both
		data = nil
	}
	if len(control) > 0 {
		if _, err := l.tls.Write(control); err != nil {
			return err
		}
	}
	if len(data) > 0 {
		if _, err := l.tls.Write(data); err != nil {
			return err
		}
	}
	return nil
}

func (l *link) releaseToken() {
	select {
	case <-l.tokens:
	default:
	}
}

// endStream makes s unusable for the local end and forgets it. Needs mu.
func (l *link) endStream(s *Stream, err error) {
	if s.err == nil {
		s.err = err
		close(s.done)
	}
	l.remove(s)
}

func (l *link) removeIfFinished(s *Stream) {
	if s.finSeen && s.finSent {
		l.remove(s)
	}
}

// remove forgets s: no frame of it is sent or shown from now on. Needs mu.
func (l *link) remove(s *Stream) {
	if l.streams[s.id] != s {
		return
	}
	delete(l.streams, s.id)
	l.budget += int(s.window) - initialWindow
	if l.opener && !s.acked {
		l.acknowledge(s)
	}
	if l.leaving && len(l.streams) == 0 {
		l.signalEmpty()
	}
}

func (l *link) signalEmpty() {
	select {
	case <-l.empty:
	default:
		close(l.empty)
	}
}

func (l *link) acknowledge(s *Stream) {
	s.acked = true
	select {
	case <-l.opens:
	default:
	}
}

// resetStream resets s at both ends. cause is what the local user of the stream sees from now on.
func (l *link) resetStream(s *Stream, cause error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.resetLocked(s, cause)
}

func (l *link) resetLocked(s *Stream, cause error) {
	if l.err != nil {
		return
	}
	if l.streams[s.id] == s {
		flags := flagRST
		if l.opener && !s.acked {
			flags |= flagACK // or yamux would wait for it for ever
		}
		l.queueControl(header{typ: typeWindow, flags: flagRST, id: s.id})
		l.inject = append(l.inject, header{typ: typeWindow, flags: flags, id: s.id})
		l.endStream(s, cause)
		l.poke()
	} else if s.disguised {
		s.disguised = false
		l.inject = append(l.inject, header{typ: typeWindow, flags: flagRST, id: s.id})
		l.poke()
	}
}

// startTimer begins pinging and watching.
func (l *link) startTimer() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err == nil {
		l.timer = time.AfterFunc(0, l.tick)
	}
}

func (l *link) deadAfter() time.Duration { return l.set.keepAlive * 9 / 5 }

// tick does what time brings: pings, the verdict on a silent link, the end of lingering streams. It never blocks.
func (l *link) tick() {
	now := time.Now()
	deadline := now.Add(l.deadAfter() - l.raw.silence())
	if !now.Before(deadline) {
		l.fail(errDeadLink)
		return
	}
	l.mu.Lock()
	if l.err != nil {
		l.mu.Unlock()
		return
	}
	if l.raw.heard.Load() != l.heardThen {
		l.suspect = time.Time{}
	}
	if !l.suspect.IsZero() {
		if !now.Before(l.suspect) {
			l.mu.Unlock()
			l.fail(errDeadLink)
			return
		}
		deadline = minTime(deadline, l.suspect)
	}
	if !now.Before(l.nextPing) {
		l.ping(now)
	}
	for len(l.lingering) > 0 && !now.Before(l.lingering[0].until) {
		l.resetLocked(l.lingering[0].stream, net.ErrClosed)
		l.lingering = l.lingering[1:]
	}
	next := minTime(deadline, l.nextPing)
	if len(l.lingering) > 0 {
		next = minTime(next, l.lingering[0].until)
	}
	idle := l.idleStreams()
	l.trim = !l.busy
	l.busy = false
	l.timer.Reset(max(time.Until(next), time.Millisecond))
	l.mu.Unlock()
	for _, s := range idle {
		s.mux.Shrink()
	}
}

// ping queues a ping and sets the time of the next one, with jitter so that the pings of many tunnels spread. Needs mu.
func (l *link) ping(now time.Time) {
	l.nextPing = now.Add(l.set.keepAlive/2 + rand.N(l.set.keepAlive*3/10))
	if l.pingOpen {
		// The answer is late. One that is under way keeps its time; what matters for life is that bytes arrive.
		l.queueControl(header{typ: typePing, flags: flagSYN, length: l.pingID})
		return
	}
	l.pingID++
	l.pinged, l.pingOpen = now, true
	l.queueControl(header{typ: typePing, flags: flagSYN, length: l.pingID})
}

// probe declares the link dead unless something arrives within d.
func (l *link) probe(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil || l.timer == nil {
		return
	}
	now := time.Now()
	l.ping(now)
	l.suspect, l.heardThen = now.Add(d), l.raw.heard.Load()
	l.timer.Reset(d)
}

// idleStreams are those whose buffers can shrink: empty, and quiet since the last tick. Needs mu.
func (l *link) idleStreams() []*Stream {
	var idle []*Stream
	for _, s := range l.streams {
		if s.mux == nil || s.received != s.consumed || s.received == s.shrunkAt {
			continue
		}
		if s.received == s.quietAt {
			s.shrunkAt = s.received
			idle = append(idle, s)
		}
		s.quietAt = s.received
	}
	return idle
}

// leave asks the far end to open no more streams here. empty is closed when the last one has ended.
func (l *link) leave() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.leaving || l.err != nil {
		return
	}
	l.leaving = true
	l.queueControl(header{typ: typeGoAway})
	if len(l.streams) == 0 {
		l.signalEmpty()
	}
}

// rearmEmpty makes empty wait again: a stream was opened after it was closed.
func (l *link) rearmEmpty() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.streams) > 0 {
		l.empty = make(chan struct{})
	}
}

// closeSoon closes the link once everything queued has been sent. The far end answers our FIN with its own.
func (l *link) closeSoon() {
	l.mu.Lock()
	l.closing = true
	l.mu.Unlock()
	notify(l.wake)
}

func (l *link) cause() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// numStreams counts streams that neither ended in both directions nor were reset.
func (l *link) numStreams() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.streams)
}

func notify(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

func minTime(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}
