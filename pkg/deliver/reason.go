// SPDX-License-Identifier: Apache-2.0

package deliver

import (
	"context"
	"errors"
	"net"
	"os"

	"github.com/edge-tunnel/edge-tunnel/pkg/relay"
	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

// Reasons why a stream ended are those of pkg/relay and the names of wire.Status (OK excepted). A stream that is lost
// while the dial is under way is a client_reset or a client_error.
func reasons() []string {
	var list []string
	for _, s := range []wire.Status{wire.StatusRefused, wire.StatusTimedOut, wire.StatusUnreachable, wire.StatusNotAllowed,
		wire.StatusDraining, wire.StatusOverloaded, wire.StatusInternal} {
		list = append(list, s.String())
	}
	for _, r := range []relay.Reason{relay.Closed, relay.ClientReset, relay.RemoteReset, relay.ClientError, relay.RemoteError, relay.Canceled} {
		list = append(list, string(r))
	}
	return list
}

// lostReason names the reason for an error on the stream before the relay began.
func lostReason(ctx context.Context, err error) (reason, detail string) {
	switch {
	case ctx.Err() != nil:
		return string(relay.Canceled), ""
	case relay.IsReset(err):
		return string(relay.ClientReset), ""
	}
	return string(relay.ClientError), err.Error()
}

func timedOut(err error) bool {
	var timeout net.Error
	return errors.Is(err, os.ErrDeadlineExceeded) || errors.As(err, &timeout) && timeout.Timeout()
}
