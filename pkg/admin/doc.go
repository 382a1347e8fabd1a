// SPDX-License-Identifier: Apache-2.0

// Package admin lets people and machines look at a running daemon, and lets its owner say three words to it.
//
// There are three doors, because they have three kinds of visitors:
//
//   - [Server] is HTTP on a TCP address (loopback by default) for whoever watches: health, readiness with named reasons, metrics, the
//     state as JSON. It is read-only, so it needs no login.
//   - [Scrape] is the metrics alone, over TLS, for who shows a token: it may be reached from other machines.
//   - [Control] is HTTP with JSON on a unix socket of mode 0600, for the daemon's own user: the same state live, and
//     the requests that change something (forget a node, drain). [Client] is its other end.
//
// Neither knows what it shows. State comes in as functions that are called at each request and answer at once from
// memory; they must be safe for use by several goroutines. Metrics are pulled the same way: a function returns
// [Metric] values when a scrape comes, so nothing is registered, nothing is global and nothing is counted twice.
//
// The shapes of the JSON are in views.go. Their names are stable: a field may be added, none changes its meaning.
//
// [Server.Serve], [Scrape.Serve] and [Control.Serve] own the listener that they are given and everything that they start: when their
// context ends, requests in progress get a moment, and they return after the last goroutine has. The socket's file goes away
// with its listener.
package admin
