// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"log/slog"
	"net"
)

// What a service manager can be told with [Notify].
const (
	Ready    = "READY=1"
	Stopping = "STOPPING=1"
)

// Notify tells the service manager (systemd, Type=notify) how far the daemon is: what is ordered after it starts when it is Ready. Without
// a $NOTIFY_SOCKET nobody asked. That it cannot be told is no reason to stop.
func Notify(getenv func(string) string, state string, log *slog.Logger) {
	path := getenv("NOTIFY_SOCKET")
	if path == "" {
		return
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err == nil {
		defer conn.Close()
		_, err = conn.Write([]byte(state))
	}
	if err != nil {
		log.Warn("cannot tell the service manager", "state", state, "err", err)
	}
}
