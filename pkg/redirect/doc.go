// SPDX-License-Identifier: Apache-2.0

// Package redirect is the user-space owner of the programs in bpf/: it loads, attaches, pins, upgrades and removes them, tells them
// what to intercept, and says of an accepted connection where it wanted to go.
//
// # Lifetimes
//
// Programs, links and maps live in the kernel, pinned below <bpffs>/edge-tunnel/v1, and outlive the process on purpose: while no
// daemon runs, redirected connections are refused at once instead of going direct, and a restarted daemon finds targets and ports in
// force. Only [Cleanup] takes them out.
//
// A [Kernel] is a process's hold on that state. [Open] waits until it is the only one (a lock on the pin directory), reuses the
// pinned maps that it understands and makes new ones, with the contents carried over, for the others. Until [Kernel.Attach]
// the programs of the predecessor stay in force with the maps and settings they have: redirect ports, node addresses, whose connects. Attach
// swaps them, one hook at a time and each atomically, or puts everything back. Targets, ports and opted-out cgroups are put into
// force as they are set: last, by a start that can fail. [Kernel.Close] gives up the lock and detaches nothing.
//
// The order for a daemon is: Open, SetPorts, SetTargets, SetNodeAddrs, Listen for each address and port, Attach, accept, Canary.
//
// # Namespaces
//
// Open and Attach have to run in the host's network namespace: it is what the programs will take for the host's.
//
// # Ownership
//
// The caller closes listeners and connections. A Kernel has no goroutines; its methods may be called from several at once.
package redirect
