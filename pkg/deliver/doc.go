// SPDX-License-Identifier: Apache-2.0

// Package deliver is the edge end of a connection: a server opened a stream with a destination on it, and this package
// decides whether it is dialed, dials, answers with a status, and relays.
//
//	stream, header ──► policy ──► dialing ──► status OK, relaying ──► record
//	                     │          │
//	                     ▼          ▼ refused, timed out, ...
//	                   status, end of stream
//
// The agent alone decides what is dialed; a server, even a stolen one, reaches what Policy says and nothing more.
//
// Handle runs in the caller's goroutine, one for each stream, and owns the stream from its first line on: whatever
// happens, it has been closed or reset when Handle returns. While the dial is under way the stream is watched (it should
// be a relay.Watcher), so that a client that gives up is noticed and the dial with it; what the client sends meanwhile, up to
// wire.MaxRetained bytes, has to find room in the stream.
package deliver
