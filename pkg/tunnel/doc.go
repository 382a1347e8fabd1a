// SPDX-License-Identifier: Apache-2.0

// Package tunnel carries streams between tunnel-servers and tunnel-agents: yamux over mutual TLS, with the gaps of the
// released yamux closed.
//
// # Lifetimes
//
// A [Server] takes connections from listeners it is given. Each is a pending connection until it has proven who it is (see
// gate.go, turnstile.go: what strangers can cost is bounded), then a tunnel in the registry, at most one that new streams use for each
// node. Serve returns when its context ends and all of its goroutines have.
//
// An [Agent] keeps one tunnel to each distinct server, for ever. Run returns when its context ends and all of its
// goroutines have, handlers included.
//
// A [Peers] keeps one connection to each of the other servers, in which this one opens streams. Run returns as an Agent's does.
//
// A [Stream] belongs to whoever got it: from Server.Open or Peers.Open, or as the argument of Handle on the agent and Forward
// on the server. The owner closes it. When a tunnel dies all of its streams are reset, but still have to be closed; that is how a leak shows in Stats.
//
// # Layers
//
//	Stream              half-close, reset, deadlines, what was received    stream.go, inbox.go, deadline.go
//	link                turns and queues of the writer                     writer.go
//	                    how much may be under way                          flight.go
//	                    frames to streams                                  reader.go, inbuf.go, frame.go
//	                    credit, pings, life and death                      credit.go, link.go
//	tls.Conn
//	raw                 when bytes last arrived, progress of writes        raw.go
//	net.TCPConn
//
// Beside the link, and on top of it, stands a yamux.Session. It numbers streams, hands out those that arrive, and bounds how
// many may be unanswered. It sees that a stream is opened, acknowledged and over; the bytes pass it by. The end that opens streams
// does without one while there are none, see park.go.
//
//	Stream.Write ──► link's queue ──► writer ──► TLS         TLS ──► inbuf ──► inbox ──► Stream.Read, Stream.WriteTo
//	                      ▲                                           │
//	yamux: SYN, ACK ──────┘                                           └──────► yamux: SYN, ACK, end
//
// # Use of yamux
//
// Nothing on the wire is outside of yamux's specification, but less of it is used, and both ends hold the other to it; a
// violation ends the session:
//
//   - The server opens all streams, with odd numbers. It is the yamux client on the connection that it accepted from an agent, or
//     dialed to another server.
//   - A data frame carries at most 32 KiB; 16 KiB less its header is what we send, so that it fits one TLS record.
//   - Either end pings; 16 unanswered pings are a violation, so an answer must not wait behind data.
//   - A window update of nothing, behind the data of a stream, says that its sender waits for credit.
//   - Credit, pings and resets may overtake data. FIN does not.
//   - A go-away with code 0 says "open no more streams here, those that are open go on". An agent sends it when it has
//     moved to another tunnel; a server that drains waits for it.
package tunnel
