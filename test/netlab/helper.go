// SPDX-License-Identifier: Apache-2.0

package netlab

import (
	"context"
	"fmt"
	"os"
)

// Helpers are functions of a test binary that run as processes of their own, inside a node: in its cgroup, which a thread of
// the test cannot be. They get the arguments and return an exit status. TestMain calls Run first:
//
//	helpers.Run()
//	goleak.VerifyTestMain(m)
type Helpers map[string]func(args []string) int

// helperVariable tells a re-executed test binary which helper it is.
const helperVariable = "NETLAB_HELPER"

// Run returns at once in the test itself. In a process that [Node.Helper] started it runs the helper and exits.
func (h Helpers) Run() {
	name := os.Getenv(helperVariable)
	if name == "" {
		return
	}
	main, ok := h[name]
	if !ok {
		fmt.Fprintf(os.Stderr, "no helper is called %q\n", name)
		os.Exit(2)
	}
	os.Exit(main(os.Args[1:]))
}

// Helper prepares a helper of this test binary as a process in the node.
func (n *Node) Helper(ctx context.Context, name string, args ...string) *Cmd {
	n.lab.t.Helper()
	self, err := os.Executable()
	if err != nil {
		n.lab.t.Fatalf("find the test binary: %v", err)
	}
	cmd := n.Command(ctx, self, args...)
	cmd.Env = append(cmd.Env, helperVariable+"="+name)
	return cmd
}
