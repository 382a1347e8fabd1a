// SPDX-License-Identifier: Apache-2.0

package deliver

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"syscall"

	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

// dial tries targets in order, the next one only if the one before refused, and returns what was dialed last.
func (h *Handler) dial(ctx context.Context, targets []netip.AddrPort) (*net.TCPConn, netip.AddrPort, error) {
	var (
		conn   *net.TCPConn
		target netip.AddrPort
		err    error
	)
	for _, target = range targets {
		conn, err = h.cfg.Dial(ctx, target)
		if !errors.Is(err, syscall.ECONNREFUSED) {
			break
		}
	}
	return conn, target, err
}

// statusOf says what a failed dial is called on the wire.
func statusOf(err error) wire.Status {
	var timeout net.Error
	switch {
	case err == nil:
		return wire.StatusOK
	case isAny(err, syscall.ECONNREFUSED, syscall.ECONNRESET):
		return wire.StatusRefused
	case isAny(err, syscall.EHOSTUNREACH, syscall.ENETUNREACH, syscall.EHOSTDOWN, syscall.ENETDOWN, syscall.EACCES, syscall.EPERM,
		syscall.EAFNOSUPPORT, syscall.EINVAL):
		return wire.StatusUnreachable // the last four: a firewall's, a policy route's, or a missing family's way to say it
	case isAny(err, syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.EADDRNOTAVAIL, syscall.EAGAIN):
		return wire.StatusOverloaded // no descriptors, memory or local ports
	case isAny(err, context.DeadlineExceeded, os.ErrDeadlineExceeded, syscall.ETIMEDOUT), errors.As(err, &timeout) && timeout.Timeout():
		return wire.StatusTimedOut
	}
	return wire.StatusInternal
}

func isAny(err error, targets ...error) bool {
	for _, target := range targets {
		if errors.Is(err, target) {
			return true
		}
	}
	return false
}
