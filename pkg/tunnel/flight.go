// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"errors"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// flight decides when the kernel gets more data, so that little of it waits in places where nothing can overtake it. There are two:
//
//   - The kernel's own queue, of what was not sent yet. It gets what the link carries in unsentTime.
//   - The queue in front of the link's narrowest part. TCP fills it until it overflows, or nearly, and what overflows holds up all
//     streams for another round trip. So no more is under way than the link carries within a round trip that waits nowhere, and a
//     quarter more.
//
// What the link carries is the best rate of the last two periods of bwPeriod, not counting times in which there was less to
// send. While it grows, up to three times as much may be under way: TCP's slow start comes first. By this rule alone, who shares a
// link with others that keep its queue full would lose more with each period. Therefore as much as fits into the present round
// trip, less a tenth, may always be under way, up to four times the other; if the queue is our own, that empties it.
//
// The fields belong to the writer's goroutine.
type flight struct {
	ask func() (tcpState, error) // nil: not a TCP connection, nothing is known and all may go

	room int       // bytes that may be written before next
	next time.Time // when ask is called again; with room that was used up, at once

	at        time.Time     // of the last measurement
	delivered uint32        // packets, at that time
	bw        [2]float64    // bytes a second, the best of this period and of the one before
	period    time.Duration // how much of this one has passed
	full      float64       // the rate that growth is measured by
	flat      int           // measurements since it grew
	busy      bool          // there was always more to send since the last measurement, which tells what the link carries
	late      time.Duration // how late the writer was woken, lately
}

const (
	unsentTime = 4 * time.Millisecond
	minUnsent  = 16 << 10
	minFlight  = 64 << 10
	bwPeriod   = 15 * time.Second

	// A link whose round trip is short has a queue of shortQueue all the same: the machine's own pauses are as long.
	shortQueue = 5 * time.Millisecond

	// On a machine that is so busy that the writer runs late, more has to be under way.
	maxLate = 50 * time.Millisecond

	drain = 10 // measurements after the last growth, in which a queue is our own

	shortestLook, longestLook = 500 * time.Microsecond, 10 * time.Millisecond
)

func newFlight(c net.Conn) flight {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return flight{}
	}
	conn, err := sc.SyscallConn()
	if err != nil {
		return flight{}
	}
	return flight{ask: func() (s tcpState, err error) {
		var info *unix.TCPInfo
		ctlErr := conn.Control(func(fd uintptr) { info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) })
		if err := errors.Join(ctlErr, err); err != nil {
			return s, err
		}
		packets := int(info.Unacked) - int(info.Sacked) - int(info.Lost) + int(info.Retrans)
		return tcpState{
			srtt: time.Duration(info.Rtt) * time.Microsecond, minRTT: time.Duration(info.Min_rtt) * time.Microsecond,
			inFlight: packets * int(info.Snd_mss), unsent: int(info.Notsent_bytes), delivered: info.Delivered, mss: info.Snd_mss,
		}, nil
	}}
}

// tcpState is what the kernel says of a connection.
type tcpState struct {
	srtt, minRTT     time.Duration
	inFlight, unsent int // bytes
	delivered, mss   uint32
}

// may reports whether data may be written now. If not, it may be asked again at next.
func (f *flight) may(now time.Time) bool {
	switch {
	case f.ask == nil:
		return true
	case now.Before(f.next):
		return f.room > 0
	}
	s, err := f.ask()
	if err != nil {
		f.ask = nil // the write will fail as well
		return true
	}
	return f.decide(now, s)
}

func (f *flight) decide(now time.Time, s tcpState) bool {
	f.measure(now, s)
	unsent := f.unsentLimit()
	f.room = min(unsent-s.unsent, f.limit(s)-s.inFlight-s.unsent)
	wait := max(min(longestLook, s.srtt/4), shortestLook)
	f.next = now.Add(wait)
	if f.room >= unsent/2 {
		return true
	}
	if rate := f.rate(); rate > 0 {
		wait = min(wait, time.Duration(float64(unsent/2-f.room)/rate*float64(time.Second)))
	}
	f.room, f.next = 0, now.Add(max(wait, shortestLook))
	return false
}

// measure takes the rate of the last round trip.
func (f *flight) measure(now time.Time, s tcpState) {
	took := now.Sub(f.at)
	if took < max(min(s.srtt, 2*s.minRTT), shortQueue) {
		return
	}
	packets := s.delivered - f.delivered
	first, busy := f.at.IsZero(), f.busy
	f.at, f.delivered, f.busy = now, s.delivered, false
	if first {
		return
	}
	if busy {
		f.period += took
		f.flat++
	}
	if f.period > bwPeriod {
		f.period, f.bw[1], f.bw[0] = 0, f.bw[0], 0
		f.full = f.rate()
	}
	rate := float64(packets) * float64(s.mss) / took.Seconds()
	f.bw[0] = max(f.bw[0], rate)
	if rate >= f.full*5/4 {
		f.full, f.flat = rate, 0
	}
}

// rate is what the link carries, in bytes a second; 0: not known.
func (f *flight) rate() float64 { return max(f.bw[0], f.bw[1]) }

// limit is how many bytes may be under way.
func (f *flight) limit(s tcpState) int {
	alone := max(s.minRTT*5/4, s.minRTT+shortQueue) + f.late
	trip := alone
	switch {
	case f.growing() && s.srtt <= alone:
		trip *= 3
	case f.growing():
		trip = max(alone, min(s.srtt*3/2, 3*alone))
	case f.flat > drain:
		trip = max(alone, min(s.srtt*9/10, 4*alone))
	}
	return max(minFlight, int(f.rate()*trip.Seconds()))
}

// unsentLimit is how many bytes may wait in the kernel.
func (f *flight) unsentLimit() int {
	least := minUnsent
	if f.growing() {
		least = minFlight
	}
	return max(least, int(f.rate()*(unsentTime+2*f.late).Seconds()))
}

func (f *flight) growing() bool { return f.flat < 3 }

// wrote notes that n bytes went to the kernel.
func (f *flight) wrote(n int) {
	if f.room > 0 && n >= f.room {
		f.next = time.Time{}
	}
	f.room -= n
}

// wokenAt notes how late the writer was woken that had to wait until next.
func (f *flight) wokenAt(now time.Time) { f.late = min(max(now.Sub(f.next), f.late*7/8), maxLate) }
