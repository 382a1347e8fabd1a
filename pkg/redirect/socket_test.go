// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"errors"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// socket is a TCP socket that a test handles by system calls, for what package net does not let it do.
type socket int

func newSocket(family, protocol int) (socket, error) {
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return -1, err
	}
	timeout := unix.NsecToTimeval(int64(patience))
	return socket(fd), errors.Join(
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &timeout))
}

func (s socket) close() { _ = unix.Close(int(s)) }

// sockaddr gives an address the form that a socket of a family takes: IPv4 is mapped for IPv6 sockets.
func sockaddr(family int, addr netip.AddrPort) unix.Sockaddr {
	if family == unix.AF_INET {
		return &unix.SockaddrInet4{Addr: addr.Addr().As4(), Port: int(addr.Port())}
	}
	return &unix.SockaddrInet6{Addr: addr.Addr().As16(), Port: int(addr.Port())}
}

// patience is how long a test waits for what should happen at once.
const patience = 5 * time.Second

// connect connects, and waits for the end of it where the socket does not block.
func (s socket) connect(family int, addr netip.AddrPort) error {
	return s.connectWithin(patience, family, addr)
}

func (s socket) connectWithin(limit time.Duration, family int, addr netip.AddrPort) error {
	err := unix.Connect(int(s), sockaddr(family, addr))
	if !errors.Is(err, unix.EINPROGRESS) && !errors.Is(err, unix.EINTR) {
		return err
	}
	if err := s.wait(unix.POLLOUT, limit); err != nil {
		return err
	}
	code, err := unix.GetsockoptInt(int(s), unix.SOL_SOCKET, unix.SO_ERROR)
	if err == nil && code != 0 {
		err = unix.Errno(code)
	}
	return err
}

// ask connects and reads the answer. A reset can come before either has returned.
func (s socket) ask(family int, addr netip.AddrPort) (string, error) {
	if err := s.connect(family, addr); err != nil {
		return "", err
	}
	return s.answer()
}

func (s socket) wait(events int16, limit time.Duration) error {
	for deadline := time.Now().Add(limit); ; {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(s), Events: events}}, int(time.Until(deadline).Milliseconds()))
		switch {
		case errors.Is(err, unix.EINTR) && time.Now().Before(deadline):
			continue
		case err == nil && n == 0:
			return os.ErrDeadlineExceeded
		}
		return err
	}
}

// dissolve undoes a connection: connect() to AF_UNSPEC.
func (s socket) dissolve() error {
	raw := unix.RawSockaddr{Family: unix.AF_UNSPEC}
	return rawConnect(int(s), &raw)
}

func (s socket) answer() (string, error) {
	return answer(s)
}

func (s socket) Read(p []byte) (int, error) {
	for {
		n, err := unix.Read(int(s), p)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if errors.Is(err, unix.EAGAIN) {
			if err := s.wait(unix.POLLIN, patience); err != nil {
				return 0, err
			}
			continue
		}
		return max(n, 0), err
	}
}

// peer is what getpeername() says, unmapped.
func (s socket) peer() (netip.AddrPort, error) {
	sa, err := unix.Getpeername(int(s))
	return fromSockaddr(sa), err
}

func fromSockaddr(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
	}
	return netip.AddrPort{}
}
