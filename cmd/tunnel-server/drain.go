// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"log/slog"
	"time"
)

// moveTimeout is how long a server that stops goes on intercepting while its agents move to other servers.
const moveTimeout = 2 * time.Second

// drain is the way out. Agents are asked to move while everything still works; then all that a successor needs is let
// go, the kernel's state last, because that is what it waits for; then open connections get their time.
func (s *server) drain(ctx context.Context, log *slog.Logger, closeFront, closeKernel func() error) error {
	bound, cancel := context.WithTimeout(ctx, moveTimeout)
	if s.tunnels.Drain(bound) != nil {
		log.Info("some agents have not moved to another server", "waited", moveTimeout)
	}
	cancel()
	err := closeFront()
	s.network.stop()
	s.conns.Stop()
	err = errors.Join(err, closeKernel())

	log.Info("open connections may finish", "connections", s.conns.Stats().Open, "within", s.options.drainTimeout)
	bound, cancel = context.WithTimeout(ctx, s.options.drainTimeout)
	defer cancel()
	reset := s.conns.Drain(bound)
	if s.hop != nil {
		reset += s.hop.drain(bound)
	}
	log.Info("stopped", "reset", reset)
	return err
}
