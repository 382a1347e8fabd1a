// SPDX-License-Identifier: Apache-2.0

// Package intercept is the cloud end of a connection: it accepts what the kernel redirected, learns where the client
// wanted to go, opens a stream to the agent of the edge node that owns the address, and relays.
//
//	accepted ──► origin ──► lookup ──► opening ──► waiting ───► relaying ──► record
//	               │ none     │ miss      │ error    │ status     │
//	               ▼          ▼           ▼          ▼ not OK     ▼ FIN both ways, a reset, or drain
//	             reset      reset       reset      reset        closed or reset
//
// The status decides late, on purpose: services that speak first would never speak if the header waited for the client's bytes,
// and every connection would pay a round trip if the client's bytes waited for the status. So the relay runs from the
// start. Its direction from the agent begins with the status; until that has come the other one sends the client's bytes (and
// its FIN) right behind the header and keeps them, at most wire.MaxRetained of them. A status that proves that no dial
// was made starts the one second try, on another owner, with the kept bytes; after any other the edge service may have seen
// bytes, and the only honest answer is a reset.
//
// A Server owns its listeners, every accepted connection and every stream that Open gave it, and a goroutine for each. Open
// connections survive Remove and the loss of their route. Drain and Close return when all goroutines have ended.
//
// Where the destination comes from is the Origin function's business: the kernel's socket storage today. Another
// source, such as a transparent listener whose local address is the destination, is another Origin function.
package intercept
