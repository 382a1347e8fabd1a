// SPDX-License-Identifier: Apache-2.0

// Tunnel-server runs on each cloud node. It intercepts connections to edge addresses in the kernel and carries them to
// the agents on the edge nodes, which dial in.
package main

import "github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"

func main() {
	cli.Main(run)
}
