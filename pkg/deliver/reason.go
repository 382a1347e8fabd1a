// SPDX-License-Identifier: Apache-2.0

package deliver

import (
	"context"
	"errors"

	"github.com/edge-tunnel/edge-tunnel/pkg/relay"
	"github.com/edge-tunnel/edge-tunnel/pkg/relay/ledger"
	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

// reasons why a stream ended are those of ledger.RelayReasons and the names of wire.Status (OK excepted). A stream that is
// reset while the dial is under way ends like one that is reset later.
func reasons() []string {
	var list []string
	for _, s := range []wire.Status{wire.StatusRefused, wire.StatusTimedOut, wire.StatusUnreachable, wire.StatusNotAllowed,
		wire.StatusDraining, wire.StatusOverloaded, wire.StatusInternal} {
		list = append(list, s.String())
	}
	return append(list, ledger.RelayReasons()...)
}

// lostReason names the reason for an error on the stream before the relay began.
func lostReason(ctx context.Context, err error) (reason, detail string) {
	r := relay.Result{Reason: relay.ClientError, Err: err}
	switch {
	case ctx.Err() != nil:
		r.Reason = relay.Canceled
	case relay.IsReset(err):
		r.Reason = relay.ClientReset
	}
	return ended(ctx, r)
}

// errStopping is the cause of a context that Drain ended.
var errStopping = errors.New("the agent is stopping")

// ended names the reason for the end of a relay under ctx.
func ended(ctx context.Context, r relay.Result) (reason, detail string) {
	if r.Reason == relay.Canceled && !errors.Is(context.Cause(ctx), errStopping) {
		return ledger.TunnelLost, ""
	}
	return ledger.Ended(r)
}
