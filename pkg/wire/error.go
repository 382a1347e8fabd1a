// SPDX-License-Identifier: Apache-2.0

package wire

import "strings"

// Error says that a message breaks the protocol: read from the peer, or given by the caller to be written. Errors of the
// connection itself are not wrapped in it but returned as they are: io.EOF when the peer closed before the first
// byte of a message, io.ErrUnexpectedEOF when within it.
type Error struct {
	Message Type
	Problem Problem
}

// Problem is what is wrong with a message, in snake_case.
type Problem string

// Problems.
const (
	WrongType     Problem = "wrong_type"     // another message was expected here, or this is no peer of ours
	TooLong       Problem = "too_long"       // body longer than any message may have
	TooShort      Problem = "too_short"      // body shorter than the message's fixed fields
	ReservedBits  Problem = "reserved_bits"  // a reserved byte is not zero
	BadOption     Problem = "bad_option"     // an option is cut off, empty or out of order
	UnknownOption Problem = "unknown_option" // an option that must be understood is not known
	UnknownKind   Problem = "unknown_kind"   // a stream kind that this version does not have
	BadVersion    Problem = "bad_version"    // version 0, or a range that ends before it begins
	BadAddress    Problem = "bad_address"    // no destination, or an address with a zone
	BadName       Problem = "bad_name"       // name too long, or with more than visible ASCII
	BadText       Problem = "bad_text"       // text too long, not UTF-8, or not printable
	BadTime       Problem = "bad_time"       // duration outside its range
)

// Error says which message is bad and how.
func (e *Error) Error() string {
	return "bad " + e.Message.String() + ": " + strings.ReplaceAll(string(e.Problem), "_", " ")
}

// Reason is the problem as a label for metrics and records.
func (e *Error) Reason() string { return string(e.Problem) }
