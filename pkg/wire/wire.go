// SPDX-License-Identifier: Apache-2.0

// Package wire is the protocol between a tunnel-server and a tunnel-agent, and between two tunnel-servers: the login
// that precedes yamux, the header that begins each stream, the status that answers it, and notices. SPEC.md, beside
// this file, is the contract; this package only turns its messages into bytes and back.
//
// It owns no connection, no goroutine and no memory between calls. Every message is a plain struct with a pair of
// functions:
//
//	WriteX(w, x)  encodes and makes exactly one Write call, so one TLS record or one yamux frame
//	ReadX(r)      reads exactly the bytes of one message, never one beyond it, so that the caller can hand the
//	              same reader to yamux, or to a relay, afterwards
//
// and x.AppendBinary(b) for callers that put the bytes of a message in front of others in one buffer.
//
// Deadlines are the caller's: a reader that is fed one byte an hour blocks for as long as its connection lets it.
// What a reader can be made to allocate is bounded by MaxMessage.
package wire

import "time"

// Application protocol names (ALPN). They say who dials: an agent, or another server.
const (
	ALPNAgent = "edge-tunnel/1"
	ALPNPeer  = "edge-tunnel-peer/1"
)

// Protocol versions this package speaks.
const (
	MinVersion = 1
	Version    = 1
)

// Port is where a server takes tunnels, of agents and of peers.
const Port = 10262

// Sizes in bytes that no message may exceed. A sender cuts Software and Message to size; anything else over its
// limit is an error at the sender and malformed at the receiver.
const (
	MaxMessage  = headLen + maxBody // of any message, head included
	MaxName     = 253               // Header.Node, LoginReply.ServerID: what a DNS name may have
	MaxSoftware = 64                // Login.Software
	MaxText     = 255               // Message of replies and notices

	headLen = 4
	maxBody = 1024
)

// Rules of the protocol that are numbers, and that both ends therefore take from here.
const (
	// MaxRetained is how much a server sends, and keeps for a second try, before the status of a stream is known.
	MaxRetained = 64 << 10

	// KeepAlive is the longest time between two pings of one end, and what LoginReply.KeepAlive 0 stands for.
	KeepAlive = 10 * time.Second

	// DeadAfter is the longest time for which a dead link may go unnoticed.
	DeadAfter = 20 * time.Second

	// DuplicateWait is the shortest RetryAfter of LoginDuplicateIdentity.
	DuplicateWait = time.Minute

	// MaxRetryAfter bounds LoginReply.RetryAfter, so that no server can send an agent away for a day.
	MaxRetryAfter = 10 * time.Minute

	// MaxClosesIn bounds Notice.ClosesIn.
	MaxClosesIn = 10 * time.Minute
)
