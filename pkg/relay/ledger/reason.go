// SPDX-License-Identifier: Apache-2.0

package ledger

import (
	"errors"

	"github.com/edge-tunnel/edge-tunnel/pkg/relay"
)

// The reasons when not a stream but its whole tunnel ended.
const (
	TunnelLost  = "tunnel_lost"
	ModeChanged = "mode_changed" // its node is reached without a tunnel now
)

// RelayReasons are all that Ended returns.
func RelayReasons() []string {
	return []string{TunnelLost, ModeChanged, string(relay.Closed), string(relay.ClientReset), string(relay.RemoteReset),
		string(relay.ClientError), string(relay.RemoteError), string(relay.Canceled)}
}

// Ended names the reason for the end of a relay, with a detail for people where the reason alone says little.
func Ended(r relay.Result) (reason, detail string) {
	switch {
	case r.Reason != relay.Canceled && TunnelEnd(r.Err) != "":
		return TunnelEnd(r.Err), r.Err.Error()
	case r.Reason == relay.ClientError || r.Reason == relay.RemoteError:
		return string(r.Reason), r.Err.Error()
	}
	return string(r.Reason), ""
}

// TunnelEnd returns TunnelLost or ModeChanged if err, or what it wraps, has the method Reason() string and that returns it, otherwise "".
func TunnelEnd(err error) string {
	var reasoned interface{ Reason() string }
	if errors.As(err, &reasoned) {
		if r := reasoned.Reason(); r == TunnelLost || r == ModeChanged {
			return r
		}
	}
	return ""
}
