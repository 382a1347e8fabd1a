// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"time"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/daemon"
	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
	"github.com/edge-tunnel/edge-tunnel/pkg/kube"
)

// moveTimeout is how long a server that stops goes on intercepting while its agents move to other servers.
const moveTimeout = 2 * time.Second

// leavingTimeout is how long the API server has to say whether this node is left for good.
const leavingTimeout = 2 * time.Second

// errLeave is why the server ends when it was asked to leave the node for good.
var errLeave = errors.New("asked to leave the node by the control socket")

// leaves decides whether what is in the kernel goes with us. It stays if nobody knows: without it, connections to edge addresses go astray
// while a successor starts.
func (s *server) leaves(ctx context.Context, log *slog.Logger) bool {
	if errors.Is(context.Cause(s.life), errLeave) {
		return true
	}
	if s.options.daemonSet == "" {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, leavingTimeout)
	defer cancel()
	namespace, name, _ := strings.Cut(s.options.daemonSet, "/")
	why, err := kube.Leaving(ctx, s.cluster.client, namespace, name, s.options.nodeName)
	switch {
	case err != nil:
		log.Warn("cannot tell whether this node is left for good, so what is in the kernel stays", "err", err)
	case why == "":
		log.Info("a successor is expected, so what is in the kernel stays")
	default:
		log.Info("this node is left for good, so nothing stays in the kernel", "why", why)
	}
	return why != ""
}

// drain is the way out. Agents are asked to move while everything still works; then all that a successor needs is let
// go, the kernel's state last, because that is what it waits for; then open connections get their time. leave is not nil if nothing shall stay in the
// kernel: that goes while our listeners are still open, so no connect is refused.
func (s *server) drain(ctx context.Context, log *slog.Logger, closeFront, leave, closeKernel func() error) error {
	bound, cancel := context.WithTimeout(ctx, moveTimeout)
	if s.tunnels.Drain(bound) != nil {
		log.Info("some agents have not moved to another server", "waited", moveTimeout)
	}
	cancel()
	err := closeFront()
	if leave != nil {
		err = errors.Join(err, leave())
	}
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

// linger does nothing, and says that it is alive, until somebody ends the process: one that ended by itself would be started again.
func (s *server) linger(ctx context.Context, server *admin.Server, log *slog.Logger) error {
	log.Info("nothing is left on this node but this process, which waits to be ended")
	ln, err := daemon.Listen(ctx, "--admin", s.options.admin)
	if ctx.Err() != nil {
		return nil
	}
	if err != nil {
		return err
	}
	return server.Serve(ctx, ln)
}
