// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// acceptEvery is how many connections may wait to be accepted; far below any backlog.
const acceptEvery = 64

// connectAll makes connections one after the other and returns what socket, connect and close of each took. They are closed with a reset, so
// that none stays behind and slows the next ones. want is the error that connect has to return.
func (p *probe) connectAll(n int, dst func() netip.AddrPort, want error) ([]time.Duration, error) {
	times := make([]time.Duration, 0, n)
	for i := range n {
		addr := dst()
		begin := time.Now()
		fd, err := connectTo(addr)
		if fd >= 0 {
			unix.Close(fd)
		}
		times = append(times, time.Since(begin))
		if !errors.Is(err, want) {
			return nil, fmt.Errorf("connect to %v: %v instead of %v", addr, err, want)
		}
		if i%acceptEvery == acceptEvery-1 || i == n-1 {
			if err := p.acceptAll(); err != nil {
				return nil, err
			}
		}
	}
	return times, nil
}

// connectTo returns a connected socket. The descriptor is to be closed also after an error, unless it is negative.
func connectTo(addr netip.AddrPort) (int, error) {
	family, to := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Addr: addr.Addr().As16(), Port: int(addr.Port())})
	if addr.Addr().Is4() {
		family, to = unix.AF_INET, &unix.SockaddrInet4{Addr: addr.Addr().As4(), Port: int(addr.Port())}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
		return fd, err
	}
	return fd, unix.Connect(fd, to)
}

// acceptAll empties the listeners' queues.
func (p *probe) acceptAll() error {
	for _, ln := range p.listeners {
		raw, err := ln.SyscallConn()
		if err != nil {
			return err
		}
		var failed error
		if err := raw.Control(func(listener uintptr) { failed = acceptFrom(int(listener)) }); err != nil || failed != nil {
			return errors.Join(err, failed)
		}
	}
	return nil
}

func acceptFrom(listener int) error {
	for {
		fd, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return nil
		case errors.Is(err, unix.ECONNABORTED), errors.Is(err, unix.EINTR):
		case err != nil:
			return err
		default:
			unix.Close(fd)
		}
	}
}

// bindSomewhere calls bind() as most programs do that call it: the kernel chooses the port.
func bindSomewhere() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
}

// peerName asks a connection to addr for its peer. The connection is made by the first call and stays.
func (p *probe) peerName(addr netip.AddrPort) func() error {
	fd := -1
	return func() (err error) {
		if fd < 0 {
			if fd, err = connectTo(addr); err != nil {
				return err
			}
		}
		peer, err := unix.Getpeername(fd)
		if err != nil {
			return err
		}
		if got, ok := peer.(*unix.SockaddrInet4); !ok || netip.AddrFrom4(got.Addr) != addr.Addr() || got.Port != int(addr.Port()) {
			return fmt.Errorf("getpeername of a connection to %v says %v", addr, peer)
		}
		return nil
	}
}
