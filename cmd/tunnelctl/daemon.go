// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"io/fs"
	"os"

	"github.com/spf13/cobra"

	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
)

// daemon is the one to ask. Both kinds have the same control socket at another place.
type daemon struct {
	server, agent string // where the control sockets are by default
	given         string // by --control
}

func newDaemon() *daemon {
	return &daemon{server: "/run/edge-tunnel/server.sock", agent: "/run/edge-tunnel/agent.sock"}
}

// flag adds --control. eitherKind says that the command is for agents as well.
func (d *daemon) flag(cmd *cobra.Command, eitherKind bool) {
	usage := "Control socket `PATH` of the tunnel-server."
	if eitherKind {
		usage = "Control socket `PATH` of the daemon; without it the agent's (" + d.agent + ") is used where there is no server's."
	} else {
		d.agent = ""
	}
	cmd.Flags().StringVar(&d.given, "control", d.server, usage)
	_ = cmd.MarkFlagFilename("control", "sock") // for completion only
}

// client returns a client of the server, or of the agent when only that has a socket.
func (d *daemon) client() *admin.Client {
	if d.given == d.server && d.agent != "" && absent(d.server) && !absent(d.agent) {
		return admin.NewClient(d.agent)
	}
	return admin.NewClient(d.given)
}

func absent(path string) bool {
	_, err := os.Lstat(path)
	return errors.Is(err, fs.ErrNotExist)
}
