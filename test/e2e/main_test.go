// SPDX-License-Identifier: Apache-2.0

// Package e2e tests the real programs from end to end: tunnel-server, tunnel-agent, tunnel-controller and tunnelctl are built once (with the
// race detector if the tests have it) and run in a lab of network namespaces ([netlab]). It needs root.
//
// A test makes a world, and starts in it what it needs:
//
//	w := newWorld(t)
//	cloud := w.cloud("cloud-1")                  // a cloud node, its certificate issued
//	pod := cloud.pod("pod-1")
//	edge := w.site("home").edge("edge-1")        // behind a NAT router, its certificate issued for its addresses
//	server := cloud.startServer()                // ready when it returns
//	agent := edge.startAgent([]*host{cloud})     // its tunnels are up and its targets online when it returns
//	addr := edge.serve(10250, echo)              // a service of the edge: a Go function
//	conn, err := cloud.dial(addr)                // a *net.TCPConn whose connect() was made on the cloud node
//	server.waitEnded("refused", 1)               // metrics
//	server.record(conn.LocalAddr())              // the access record
//
// For the usual case newSite does all of that at once.
//
// # Sockets of a node
//
// Programs in the kernel see which cgroup and network namespace a socket was made in. So each host has a process of its own, its
// hands, that connects and listens there, and passes the sockets to the test, which uses them as its own ([host.dial],
// [host.listen]; hands_test.go). Whatever needs more than a socket is a helper process (helpers below, [host.helper]) or a
// program ([netlab.Node.Command]).
//
// # The end
//
// Everything goes with the test. Then the world looks for what may have been left: processes, cgroup folders, mounts, namespaces, BPF
// links; a daemon that reported a data race or panicked fails the test (leak_test.go).
package e2e

import (
	"os"
	"testing"

	"github.com/edge-tunnel/edge-tunnel/test/netlab"
	"go.uber.org/goleak"
)

// helpers are processes inside of nodes; see [host.helper]. Each is in the file that uses it.
var helpers = netlab.Helpers{
	"caller":        callerMain,
	"hands":         handsMain,
	"half-open":     halfOpenMain,
	"ask-in-cgroup": askInCgroupMain,
	"connect-flood": connectFloodMain,
}

func TestMain(m *testing.M) {
	helpers.Run()
	goleak.VerifyTestMain(m, goleak.Cleanup(func(status int) {
		removePrograms()
		os.Exit(status)
	}))
}
