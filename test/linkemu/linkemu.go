// SPDX-License-Identifier: Apache-2.0

// Package linkemu is a long, slow or bad link in user space, for kernels without netem: two TAP devices (or whatever else
// gives and takes one Ethernet frame at a time) and a forwarder between them.
//
//	near ─► [ loss ─► queue, rate ─► delay, jitter ] ─► far     Link.Up
//	near ◄─ [ delay, jitter ◄─ queue, rate ◄─ loss ] ◄─ far     Link.Down
//
// Frames are as the kernel sends them to a device without offloads: at most 1500 bytes of payload each, whole and with
// checksum. Only payload counts, for rates, queues and statistics. Frames that are neither IPv4 nor IPv6 are never lost
// at random: a lost ARP request would cost a second, which no link costs a packet.
//
// A packet is never early. It is late by what the machine takes to wake the forwarder, and by up to a tenth of a millisecond more, because
// packets that are due at nearly the same time share one wake-up.
//
// Whoever makes a [Link] closes it, and the link closes its devices.
package linkemu

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Settings of one direction. The zero value is a wire: no delay, no limit, no loss.
type Settings struct {
	Rate      int64         // bits a second; zero is no limit
	Queue     int           // bytes that may wait for their turn at Rate, the packet that arrives included; zero is no limit
	Delay     time.Duration // from the last bit sent to the last bit received
	Jitter    time.Duration // up to that much more, at random; the order stays
	Loss      float64       // share of packets
	Reorder   float64       // share of packets that are late by ReorderBy, so that those behind them overtake
	ReorderBy time.Duration
	Seed      uint64 // of all that is random: the same packets in the same order have the same fate
}

func (s Settings) validate() error {
	if s.Rate < 0 || s.Queue < 0 || s.Delay < 0 || s.Jitter < 0 || s.ReorderBy < 0 {
		return fmt.Errorf("a link cannot have negative settings: %+v", s)
	}
	for _, share := range []float64{s.Loss, s.Reorder} {
		if !(share >= 0 && share <= 1) { // NaN is refused too
			return fmt.Errorf("a share of packets is between 0 and 1, not %v", share)
		}
	}
	return nil
}

// Link is two directions.
type Link struct {
	Up   *Direction // near to far
	Down *Direction // far to near

	near, far *os.File
	wg        sync.WaitGroup
}

// New joins two devices, which belong to the link from here on, also if there is an error. Both directions begin as wires.
func New(near, far *os.File) (*Link, error) {
	l := &Link{near: near, far: far}
	var err1, err2 error
	l.Up, err1 = newDirection(near, far)
	l.Down, err2 = newDirection(far, near)
	if err := errors.Join(err1, err2); err != nil {
		return nil, errors.Join(err, l.closeFiles())
	}
	for _, d := range []*Direction{l.Up, l.Down} {
		l.wg.Go(d.read)
		l.wg.Go(d.write)
	}
	return l, nil
}

// Set gives both directions the same settings. Packets that are on their way keep theirs.
func (l *Link) Set(s Settings) error { return errors.Join(l.Up.Set(s), l.Down.Set(s)) }

// SetOutage cuts or mends the link. What is on its way when the link is cut is lost.
func (l *Link) SetOutage(on bool) {
	l.Up.SetOutage(on)
	l.Down.SetOutage(on)
}

// Close ends the forwarder, drops what is on its way and closes the devices. The error says what ended a direction before.
func (l *Link) Close() error {
	err := l.closeFiles()
	l.wg.Wait()
	return errors.Join(err, l.Up.failure(), l.Down.failure())
}

func (l *Link) closeFiles() error {
	errs := []error{l.near.Close(), l.far.Close()}
	for _, d := range []*Direction{l.Up, l.Down} {
		if d != nil {
			errs = append(errs, d.timer.Close())
		}
	}
	return errors.Join(errs...)
}

// OpenTAP makes a TAP device in the network namespace of the calling thread. It is gone when the file is closed.
func OpenTAP(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun: %w", err)
	}
	request, err := unix.NewIfreq(name)
	if err == nil {
		request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make TAP device %s: %w", name, err), unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), name), nil // only now: a device without a name cannot be polled
}
