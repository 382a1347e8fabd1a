// SPDX-License-Identifier: Apache-2.0

// Tunnel-controller runs in the cloud, once or, to survive a node, twice. It decides who gets certificates for tunnels, and
// signs them.
package main

import "github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"

func main() {
	cli.Main(run)
}
