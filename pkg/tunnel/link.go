// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
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
	allWindows int           // the same for all sessions of this process
}

const (
	// backlog is yamux's bound for streams that the far end has not acknowledged. Ours is half of it, so that
	// yamux.OpenStream, which takes no context, never has to wait.
	backlog  = 1024
	maxOpens = backlog / 2

	maxPongs = 16 // answers to pings that wait to be sent

	// lingerTime is how long a stream that was closed on our side only waits for the FIN of the far end.
	lingerTime = 5 * time.Second
)

// link is the connection as a yamux session sees it: an io.ReadWriteCloser whose Read and Write pass the headers of frames.
// It stands between the session and TLS. yamux numbers the streams and hands them out; data, credit, pings and the ends of
// streams are dealt with here, because the released yamux
//
//   - copies each byte twice and changes goroutines twice for each frame, and lets pings queue behind data;
//   - knows one fixed window for all streams (see credit.go);
//   - cannot reset a stream, nor tell its reset from the death of the session or from its FIN.
//
// Frames are queued here and written by one goroutine, many to a TLS record (see writer.go); pings, credit and resets
// overtake data. The goroutine in which yamux reads the session reads and sorts them (see reader.go).
//
// Lock order: yamux's own locks, then mu. Nothing of yamux is called with mu held.
type link struct {
	tls    io.ReadWriter // *tls.Conn
	raw    *raw
	set    settings
	opener bool // this end opens all streams; a SYN from the far end is a violation
	total  *counters

	in inbuf // owned by the goroutine in which yamux calls Read

	opens chan struct{} // held by streams we opened, until yamux has seen that the far end acknowledges
	wake  chan struct{} // tells the writer that there is something to write
	dead  chan struct{} // closed by fail

	bytesIn, bytesOut atomic.Uint64 // payload of streams

	mu        sync.Mutex
	err       error // why the link is dead
	streams   map[uint32]*Stream
	unclaimed map[uint32]*Stream // opened by either end, not yet fetched by open or accept; may be reset by then
	shown     []header           // frames to show to yamux
	base      uint32             // added to yamux's stream numbers, see park.go
	lastID    uint32             // of the streams that this end opened
	used      time.Time          // at that tick there were streams
	onIdle    func()             // called, without mu, when there were none for parkAfter
	control   []byte             // encoded frames that overtake data
	urgent    []byte             // encoded frames of streams of which nothing is in data; they overtake it
	data      []byte             // encoded frames in order
	batch     uint64             // counts what became of data: a stream of that number has frames in it
	queue     int                // length of data at which streams have to wait
	fresh     turns              // streams that wait and have had less than their share
	turns     turns              // the others
	share     uint64             // see fill
	takes     uint64             // how often the writer has taken control and urgent
	lazy      bool               // lazyTimer runs
	lazyTimer *time.Timer        // tells the writer of frames that were queued without doing so
	granting  []*Stream          // streams with credit to be sent
	budget    int                // what is left of settings.budget
	pongs     int                // answers in control
	pingID    uint32
	pinged    time.Time // when our last ping was queued
	pingOpen  bool      // and is not answered
	nextPing  time.Time
	suspect   time.Time // dead by then unless raw.heard differs from heardThen; zero: not suspected
	heardThen int64
	busy      bool // data was sent since the last tick
	trim      bool // the writer shall let go of its buffers
	rtt       time.Duration
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
		opens:     make(chan struct{}, maxOpens),
		wake:      make(chan struct{}, 1),
		dead:      make(chan struct{}),
		streams:   make(map[uint32]*Stream),
		unclaimed: make(map[uint32]*Stream),
		queue:     minQueue,
		batch:     1,
		takes:     1,
		budget:    set.budget,
		empty:     make(chan struct{}),
	}
}

func (l *link) alive() bool {
	select {
	case <-l.dead:
		return false
	default:
		return true
	}
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
	l.control, l.data, l.granting, l.lingering, l.urgent, l.fresh, l.turns = nil, nil, nil, nil, nil, turns{}, turns{}
	for _, t := range [...]*time.Timer{l.timer, l.lazyTimer} {
		if t != nil {
			t.Stop()
		}
	}
	l.mu.Unlock()
	// Not tls.Conn.Close: it may wait seconds to send an alert that nobody needs.
	_ = l.raw.Close()
}

// endStream makes s unusable for the local end and forgets it. Needs mu.
func (l *link) endStream(s *Stream, err error) {
	if s.err == nil {
		s.err = err
		s.wakeAll()
	}
	l.remove(s)
}

func (l *link) removeIfFinished(s *Stream) {
	if s.finSeen && s.finSent {
		l.remove(s)
	}
}

// remove forgets s: no frame of it is sent or received from now on. Needs mu.
func (l *link) remove(s *Stream) {
	if l.streams[s.id] != s {
		return
	}
	delete(l.streams, s.id)
	l.recharge(s, 0)
	if l.opener && !s.acked {
		l.acknowledge(s) // or yamux would wait for it for ever
	}
	l.shown = append(l.shown, header{typ: typeWindow, flags: flagRST, id: s.id})
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

// acknowledge lets yamux see one acknowledgement of each stream that was opened: without one it keeps an entry for ever, with
// two it gives back the slot of another stream. Needs mu.
func (l *link) acknowledge(s *Stream) {
	s.acked = true
	l.shown = append(l.shown, header{typ: typeWindow, flags: flagACK, id: s.id})
}

// resetStream resets s at both ends. cause is what the local user of the stream sees from now on.
func (l *link) resetStream(s *Stream, cause error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.resetLocked(s, cause)
}

func (l *link) resetLocked(s *Stream, cause error) {
	if l.err != nil || l.streams[s.id] != s {
		return
	}
	rst := header{typ: typeWindow, flags: flagRST, id: s.id}
	if s.later == l.takes || s.later != 0 && s.batch == l.batch {
		q := l.queueOf(s)
		*q = rst.appendTo(*q) // it must not overtake
		notify(l.wake)
	} else {
		l.queueControl(rst)
	}
	l.endStream(s, cause)
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
	if silence := l.raw.silence(); now.Before(l.nextPing) {
		// not yet
	} else if len(l.streams) == 0 && l.rtt > 0 && l.suspect.IsZero() && silence < l.set.keepAlive/2 {
		l.nextPing = now.Add(l.pingPause() - silence) // the far end's ping, and our answer, have shown both that the other lives
	} else {
		l.ping(now)
		l.narrow()
	}
	for len(l.lingering) > 0 && !now.Before(l.lingering[0].until) {
		l.resetLocked(l.lingering[0].stream, net.ErrClosed)
		l.lingering = l.lingering[1:]
	}
	next := minTime(deadline, l.nextPing)
	if len(l.lingering) > 0 {
		next = minTime(next, l.lingering[0].until)
	}
	if len(l.streams) > 0 || l.busy {
		l.used = now
	}
	idle := l.onIdle != nil && now.Sub(l.used) >= parkAfter
	l.trim = !l.busy
	l.busy = false
	l.timer.Reset(max(time.Until(next), time.Millisecond))
	l.mu.Unlock()
	if idle {
		l.onIdle()
	}
}

// pingPause is how long after a ping the next one is due, with jitter so that the pings of many tunnels spread, and those of the two ends.
func (l *link) pingPause() time.Duration {
	return l.set.keepAlive*7/10 + rand.N(l.set.keepAlive*3/10)
}

// ping queues a ping and sets the time of the next one. Needs mu.
func (l *link) ping(now time.Time) {
	l.nextPing = now.Add(l.pingPause())
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

// rebase makes the numbers of the next yamux session follow those of the last. There are no streams.
func (l *link) rebase() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, h := range l.shown {
		if h.flags&flagACK != 0 {
			l.releaseOpen()
		}
	}
	l.shown = nil
	if l.lastID > 0 {
		l.base = l.lastID + 1
	}
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
