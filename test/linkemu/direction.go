// SPDX-License-Identifier: Apache-2.0

package linkemu

import (
	"container/heap"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	headerLen  = 14
	frameSpace = 2048     // a frame with 1500 bytes of payload, and tags
	maxFlight  = 64 << 20 // bytes on their way at most, whatever the settings: the forwarder's memory
	quantum    = 100 * time.Microsecond
)

// Stats are counters since the link was made. What was received is what was sent, dropped or is on its way.
type Stats struct {
	Received, Sent           uint64 // packets
	ReceivedBytes, SentBytes uint64
	Lost                     uint64 // at random
	QueueFull                uint64
	Outage                   uint64
	Refused                  uint64 // by the device at the other end, because it is down
}

// Dropped is the sum of all reasons.
func (s Stats) Dropped() uint64 { return s.Lost + s.QueueFull + s.Outage + s.Refused }

// Direction is one way through the link. Its methods may be called at any time from anywhere.
type Direction struct {
	from, to *os.File
	timer    *os.File // a timerfd: wakes write when the first packet is due. Go's own timers are up to a millisecond late.
	timerFD  syscall.RawConn
	begin    time.Time
	pool     sync.Pool

	mu       sync.Mutex
	set      Settings
	random   *rand.Rand
	outage   bool
	flight   flight        // accepted and not yet due
	bytes    int           // in flight
	sequence uint64        // of the last accepted packet
	free     time.Duration // when everything accepted so far has been sent at the set rate
	last     time.Duration // when the last packet is due that keeps the order
	stats    Stats
	err      error
}

// packet times count from Direction.begin.
type packet struct {
	due      time.Duration
	sequence uint64
	len      int
	frame    [frameSpace]byte
}

func (p *packet) payload() int { return max(0, p.len-headerLen) }

// ip says whether the frame holds an IP packet.
func (p *packet) ip() bool {
	if p.len < headerLen {
		return false
	}
	kind := binary.BigEndian.Uint16(p.frame[headerLen-2:])
	return kind == unix.ETH_P_IP || kind == unix.ETH_P_IPV6
}

// flight is a heap, the packet that is due first on top.
type flight []*packet

func (f flight) Len() int      { return len(f) }
func (f flight) Swap(i, j int) { f[i], f[j] = f[j], f[i] }
func (f *flight) Push(p any)   { *f = append(*f, p.(*packet)) }
func (f flight) Less(i, j int) bool {
	return f[i].due < f[j].due || f[i].due == f[j].due && f[i].sequence < f[j].sequence
}

func (f *flight) Pop() any {
	n := len(*f) - 1
	p := (*f)[n]
	(*f)[n] = nil
	*f = (*f)[:n]
	return p
}

func newDirection(from, to *os.File) (*Direction, error) {
	fd, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_CLOEXEC|unix.TFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("make a timer: %w", err)
	}
	d := &Direction{from: from, to: to, timer: os.NewFile(uintptr(fd), "timerfd"), begin: time.Now()}
	d.pool.New = func() any { return new(packet) }
	if d.timerFD, err = d.timer.SyscallConn(); err != nil {
		return nil, errors.Join(err, d.timer.Close())
	}
	return d, d.Set(Settings{})
}

// Set changes the settings for the packets to come.
func (d *Direction) Set(s Settings) error {
	if err := s.validate(); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	now := time.Since(d.begin)
	waiting := d.waiting(now)
	d.set, d.random = s, rand.New(rand.NewPCG(s.Seed, 0))
	d.free = now + d.takes(waiting)
	return nil
}

// SetOutage cuts or mends this direction.
func (d *Direction) SetOutage(on bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.outage = on
	if !on {
		return
	}
	d.stats.Outage += uint64(len(d.flight))
	d.flight, d.bytes, d.free, d.last = nil, 0, 0, 0
}

// Stats are the counters so far.
func (d *Direction) Stats() Stats {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.stats
}

func (d *Direction) failure() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.err
}

// fail notes what ended a direction, unless that is Close.
func (d *Direction) fail(err error) {
	if errors.Is(err, os.ErrClosed) {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.err = errors.Join(d.err, err)
}

// takes is how long bytes take at the set rate.
func (d *Direction) takes(bytes int) time.Duration {
	if d.set.Rate == 0 {
		return 0
	}
	return time.Duration(float64(bytes) * 8 / float64(d.set.Rate) * float64(time.Second))
}

// waiting is how many bytes have not been sent yet at the set rate: the queue needs no other form.
func (d *Direction) waiting(now time.Duration) int {
	return int(float64(max(0, d.free-now)) / float64(time.Second) * float64(d.set.Rate) / 8)
}

// read decides the fate of each frame as it comes in.
func (d *Direction) read() {
	for {
		p := d.pool.Get().(*packet)
		n, err := d.from.Read(p.frame[:])
		if err != nil {
			d.fail(fmt.Errorf("read a frame: %w", err))
			return
		}
		p.len = n
		if !d.accept(p) {
			d.pool.Put(p)
		}
	}
}

func (d *Direction) accept(p *packet) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	now, size := time.Since(d.begin), p.payload()
	d.stats.Received++
	d.stats.ReceivedBytes += uint64(size)
	switch {
	case d.outage:
		d.stats.Outage++
		return false
	case p.ip() && d.random.Float64() < d.set.Loss:
		d.stats.Lost++
		return false
	case d.set.Rate > 0 && d.set.Queue > 0 && d.waiting(now)+size > d.set.Queue, d.bytes+size > maxFlight:
		d.stats.QueueFull++
		return false
	}
	d.free = max(d.free, now) + d.takes(size)
	p.due = d.free + d.set.Delay
	if d.set.Jitter > 0 {
		p.due += time.Duration(d.random.Int64N(int64(d.set.Jitter) + 1))
	}
	p.due = max(p.due, d.last)
	if d.set.Reorder > 0 && d.random.Float64() < d.set.Reorder {
		p.due += d.set.ReorderBy
	} else {
		d.last = p.due
	}
	d.sequence++
	p.sequence = d.sequence
	d.bytes += size
	heap.Push(&d.flight, p)
	if d.flight[0] == p {
		d.arm(now)
	}
	return true
}

// arm sets the timer to the first packet in flight.
func (d *Direction) arm(now time.Duration) {
	wait := unix.NsecToTimespec(int64(max(d.flight[0].due-now, quantum)))
	var setErr error
	err := d.timerFD.Control(func(fd uintptr) {
		setErr = unix.TimerfdSettime(int(fd), 0, &unix.ItimerSpec{Value: wait}, nil)
	})
	if err := errors.Join(err, setErr); err != nil && !errors.Is(err, os.ErrClosed) {
		d.err = errors.Join(d.err, fmt.Errorf("set the timer: %w", err))
	}
}

// write hands frames to the other device when they are due.
func (d *Direction) write() {
	expired := make([]byte, 8)
	for {
		if _, err := d.timer.Read(expired); err != nil {
			d.fail(fmt.Errorf("wait for the timer: %w", err))
			return
		}
		for p := d.next(); p != nil; p = d.next() {
			_, err := d.to.Write(p.frame[:p.len])
			if errors.Is(err, os.ErrClosed) {
				return
			}
			d.mu.Lock()
			if err == nil {
				d.stats.Sent++
				d.stats.SentBytes += uint64(p.payload())
			} else {
				d.stats.Refused++
			}
			d.mu.Unlock()
			d.pool.Put(p)
		}
	}
}

// next takes the first packet if it is due, and else sets the timer to it.
func (d *Direction) next() *packet {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.flight) == 0 {
		return nil
	}
	if now := time.Since(d.begin); d.flight[0].due > now {
		d.arm(now)
		return nil
	}
	p := heap.Pop(&d.flight).(*packet)
	d.bytes -= p.payload()
	return p
}
