// SPDX-License-Identifier: Apache-2.0

package wire

import "io"

// Reply answers the header of a connect stream. After StatusOK the bytes of the edge service follow; after anything
// else FIN does, and the receiver resets the stream (a reset by the sender could overtake the reply).
type Reply struct {
	Status  Status
	Message string // for people; at most MaxText bytes; may be empty
}

const optReplyMessage = 1

// AppendBinary appends the encoded message to b. It never fails; the error is there for encoding.BinaryAppender.
func (p Reply) AppendBinary(b []byte) ([]byte, error) {
	start := len(b)
	b = appendHead(b, TypeReply, uint8(p.Status))
	b = appendOption(b, optReplyMessage, cleanText(p.Message, MaxText))
	return finish(b, start), nil
}

// WriteReply writes p in one Write call.
func WriteReply(w io.Writer, p Reply) error {
	b, err := p.AppendBinary(make([]byte, 0, 64))
	return write(w, b, err)
}

// ReadReply reads one Reply and not a byte more. A status that this version does not know is no error, and is not
// retryable.
func ReadReply(r io.Reader) (Reply, error) {
	code, b, err := read(r, TypeReply)
	if err != nil {
		return Reply{}, err
	}
	p := Reply{Status: Status(code)}
	opts := options{msg: TypeReply, rest: b}
	for opts.next() {
		switch opts.tag {
		case optReplyMessage:
			p.Message = opts.text(MaxText)
		default:
			opts.unknown()
		}
	}
	if opts.err != nil {
		return Reply{}, opts.err
	}
	return p, nil
}

// Status says what became of a connect stream.
type Status uint8

// Stream statuses.
const (
	StatusOK          Status = 0  // dialed, connected
	StatusRefused     Status = 1  // the port is closed
	StatusTimedOut    Status = 2  // the dial got no answer
	StatusUnreachable Status = 3  // no route, or an ICMP error
	StatusNotAllowed  Status = 4  // the agent's policy forbids this destination
	StatusNotOwner    Status = 5  // peer only: this server holds no tunnel of the node
	StatusNoTunnel    Status = 6  // the tunnel went away before the stream reached it
	StatusDraining    Status = 7  // this end is about to stop
	StatusOverloaded  Status = 8  // too many streams
	StatusBadRequest  Status = 9  // the header was malformed
	StatusInternal    Status = 10 // anything else; the dial may have been made
)

// Retryable reports whether the status proves that no dial was made, so that the connection may be tried once more on
// another owner. Statuses unknown to this version prove nothing.
func (s Status) Retryable() bool {
	return s == StatusNotOwner || s == StatusNoTunnel || s == StatusDraining
}

// String is the status in snake_case, for labels and records.
func (s Status) String() string {
	switch s {
	case StatusOK:
		return "ok"
	case StatusRefused:
		return "refused"
	case StatusTimedOut:
		return "timed_out"
	case StatusUnreachable:
		return "unreachable"
	case StatusNotAllowed:
		return "not_allowed"
	case StatusNotOwner:
		return "not_owner"
	case StatusNoTunnel:
		return "no_tunnel"
	case StatusDraining:
		return "draining"
	case StatusOverloaded:
		return "overloaded"
	case StatusBadRequest:
		return "bad_request"
	case StatusInternal:
		return "internal"
	}
	return "unknown"
}
