// SPDX-License-Identifier: Apache-2.0

// Tunnel-agent runs on each edge node. It keeps tunnels open to the servers in the cloud, which it dials, and delivers the
// connections that come through them to the services of its node.
package main

import "github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"

func main() {
	cli.Main(run)
}
