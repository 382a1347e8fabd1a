// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"errors"
	"syscall"
)

// Errors of Server.Open. A stream that could not be opened was never seen by an agent.
var (
	ErrNoTunnel   error = &Error{reason: "no_tunnel", text: "no tunnel to this node"}
	ErrDraining   error = &Error{reason: "draining", text: "server is draining"}
	ErrOverloaded error = &Error{reason: "overloaded", text: "too many streams in this tunnel"}
)

// Why a session ended. They are the causes of a ResetError and the reasons that are logged.
var (
	errClosed    = &Error{reason: "closed", text: "tunnel closed"}
	errPeerGone  = &Error{reason: "peer_closed", text: "tunnel closed by the far end"}
	errDeadLink  = &Error{reason: "dead_link", text: "nothing heard from the far end"}
	errEvicted   = &Error{reason: "evicted", text: "another instance of this node logged in"}
	errReplaced  = &Error{reason: "replaced", text: "replaced by a newer tunnel"}
	errExpired   = &Error{reason: "expired", text: "certificate expired"}
	errForgotten = &Error{reason: "forgotten", text: "node was forgotten"}
	errExcluded  = &Error{reason: "mode_changed", text: "node is not tunneled any more"}
	errShutdown  = &Error{reason: "shutdown", text: "shutting down"}
)

// Error is a refusal or the end of a tunnel, with a short label for metrics and records.
type Error struct {
	reason string
	text   string
	cause  error
}

// Error is the text for people.
func (e *Error) Error() string {
	if e.cause != nil {
		return e.text + ": " + e.cause.Error()
	}
	return e.text
}

// Reason is the label, in snake_case, out of a fixed set.
func (e *Error) Reason() string { return e.reason }

// Unwrap is what led to it, or nil.
func (e *Error) Unwrap() error { return e.cause }

// violation makes the error of a peer that breaks the protocol; its session is closed.
func violation(text string) *Error {
	return &Error{reason: "protocol_violation", text: "protocol violation: " + text}
}

// ResetError is what reads and writes return on a stream that ended without a FIN: the far end reset it, or its tunnel
// died. errors.Is(err, syscall.ECONNRESET) holds for it.
type ResetError struct {
	// Tunnel is why the tunnel ended; nil when the far end reset this stream only.
	Tunnel error
}

// Error is the text for people.
func (e *ResetError) Error() string {
	if e.Tunnel != nil {
		return "stream reset: " + e.Tunnel.Error()
	}
	return "stream reset by the far end"
}

// Reason is "reset_by_peer", "tunnel_lost", or "mode_changed" if the tunnel was dropped on purpose.
func (e *ResetError) Reason() string {
	switch {
	case e.Tunnel == nil:
		return "reset_by_peer"
	case errors.Is(e.Tunnel, errExcluded):
		return errExcluded.reason
	}
	return "tunnel_lost"
}

// Is makes it an ECONNRESET.
func (e *ResetError) Is(target error) bool { return target == syscall.ECONNRESET }

// Unwrap is why the tunnel ended, if it did.
func (e *ResetError) Unwrap() error { return e.Tunnel }

// reasonOf is the label of the first error in the chain that has one.
func reasonOf(err error, otherwise string) string {
	var r interface{ Reason() string }
	if errors.As(err, &r) {
		return r.Reason()
	}
	return otherwise
}
