// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"errors"

	"github.com/edge-tunnel/edge-tunnel/pkg/relay"
)

// TunnelLost is the reason when not a stream but its whole tunnel ended.
const TunnelLost = "tunnel_lost"

// RelayReasons are all that Ended returns.
func RelayReasons() []string {
	return []string{TunnelLost, string(relay.Closed), string(relay.ClientReset), string(relay.RemoteReset),
		string(relay.ClientError), string(relay.RemoteError), string(relay.Canceled)}
}

// Ended names the reason for the end of a relay, with a detail for people where the reason alone says little.
func Ended(r relay.Result) (reason, detail string) {
	switch {
	case r.Reason != relay.Canceled && IsTunnelLost(r.Err):
		return TunnelLost, r.Err.Error()
	case r.Reason == relay.ClientError || r.Reason == relay.RemoteError:
		return string(r.Reason), r.Err.Error()
	}
	return string(r.Reason), ""
}

// IsTunnelLost reports whether err, or what it wraps, has the method Reason() string and that returns TunnelLost.
func IsTunnelLost(err error) bool {
	var reasoned interface{ Reason() string }
	return errors.As(err, &reasoned) && reasoned.Reason() == TunnelLost
}
