// SPDX-License-Identifier: Apache-2.0

// Command tunnelctl makes certificates for edge-tunnel, shows what a running daemon does, and removes what it leaves in
// the kernel.
//
// Each command is in the file of its name; run.go joins them, daemon.go finds the daemon to ask, output.go has the two ways to answer.
package main

import "github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"

func main() { cli.Main(run) }
