// SPDX-License-Identifier: Apache-2.0

package intercept

import (
	"context"
	"errors"
	"net"
	"os"

	"github.com/edge-tunnel/edge-tunnel/pkg/relay"
	"github.com/edge-tunnel/edge-tunnel/pkg/relay/ledger"
	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

// Reasons why a connection ended, beside those of ledger.RelayReasons (a connection that got through) and the names of
// wire.Status (one that the agent, or another server, turned down).
const (
	ReasonNotIntercepted = "not_intercepted" // dialed the listener directly
	ReasonOriginFailed   = "origin_failed"   // its destination could not be read
	ReasonCanary         = "canary"          // the program's own test
	ReasonNoRoute        = "no_route"        // its address belongs to no node (any more)
	ReasonNodeFull       = "node_full"       // MaxConnsPerNode
	ReasonPodFull        = "pod_full"        // MaxConnsPerPod, or half of MaxConnsPerNode
	ReasonOpenFailed     = "open_failed"     // no stream, for no reason known here
	ReasonOpenTimedOut   = "open_timed_out"  // no stream within OpenTimeout
	ReasonStatusTimedOut = "status_timed_out"
	ReasonStreamLost     = "stream_lost" // the stream broke before its status came
	ReasonBadReply       = "bad_reply"   // what came was no status
)

// statuses are all that an agent of this version may answer, less OK.
func statuses() []string {
	var names []string
	for s := wire.StatusOK + 1; s.String() != wire.Status(255).String(); s++ {
		names = append(names, s.String())
	}
	return append(names, wire.Status(255).String())
}

func reasons() []string {
	list := append(statuses(), ledger.RelayReasons()...)
	return append(list, ReasonNotIntercepted, ReasonOriginFailed, ReasonCanary, ReasonNoRoute, ReasonNodeFull, ReasonPodFull,
		ReasonOpenFailed, ReasonOpenTimedOut, ReasonStatusTimedOut, ReasonStreamLost, ReasonBadReply)
}

// failure says why a connection did not get through. As an error it passes the relay.
type failure struct {
	reason string
	detail string // for people; may be empty
}

func (f *failure) Error() string { return f.reason + ": " + f.detail }

// openFailure names the reason for an error of Open. Parent is the server's own context.
func openFailure(parent context.Context, err error) *failure {
	var reasoned interface{ Reason() string }
	switch {
	case parent.Err() != nil:
		return &failure{reason: string(relay.Canceled)}
	case errors.Is(err, context.DeadlineExceeded):
		return &failure{ReasonOpenTimedOut, err.Error()}
	case errors.As(err, &reasoned):
		for _, known := range statuses() {
			if reasoned.Reason() == known {
				return &failure{known, err.Error()}
			}
		}
	}
	return &failure{ReasonOpenFailed, err.Error()}
}

// replyFailure names the reason for an error on the stream before its status came.
func replyFailure(parent context.Context, err error) *failure {
	var malformed *wire.Error
	switch {
	case parent.Err() != nil:
		return &failure{reason: string(relay.Canceled)}
	case timedOut(err):
		return &failure{reason: ReasonStatusTimedOut}
	case ledger.TunnelEnd(err) != "":
		return &failure{ledger.TunnelEnd(err), err.Error()}
	case errors.As(err, &malformed):
		return &failure{ReasonBadReply, err.Error()}
	}
	return &failure{ReasonStreamLost, err.Error()}
}

func timedOut(err error) bool {
	var timeout net.Error
	return errors.Is(err, os.ErrDeadlineExceeded) || errors.As(err, &timeout) && timeout.Timeout()
}
