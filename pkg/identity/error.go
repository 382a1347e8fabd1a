// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"errors"
	"fmt"
	"io/fs"
)

// Reasons of refusals, for counters and records.
const (
	ReasonNoCertificate  = "no_certificate"  // the other end showed none
	ReasonBadCertificate = "bad_certificate" // too many names or intermediates, not a P-256 key, broken chain
	ReasonUnknownCA      = "unknown_ca"      // no chain to the present bundle
	ReasonExpired        = "expired"         // the leaf or a CA of its chain
	ReasonNotYetValid    = "not_yet_valid"   // the leaf or a CA of its chain; often a wrong clock
	ReasonBadUsage       = "bad_usage"       // extended key usages do not fit the role, or it is a CA
	ReasonWrongRole      = "wrong_role"      // not the role that this protocol asks for, or no role, or two
	ReasonBadName        = "bad_name"        // the common name is not a node or server name
	ReasonWrongHost      = "wrong_host"      // a server's certificate does not name the host that was dialed
	ReasonDenied         = "denied"          // in the deny file
	ReasonBadProtocol    = "bad_protocol"    // no ALPN protocol of ours was agreed on
)

// Refusal says why the other end of a connection was not believed. tls.Conn.HandshakeContext returns it as it is.
type Refusal struct {
	// Name and Serial are what the certificate claims, empty without one. In a handshake the other end has not yet
	// proved to hold its key, so they are good for a log line and for nothing else. Name is cut to 253 bytes.
	Name, Serial string

	reason string
	detail string
}

// Reason returns one of the Reason constants.
func (r *Refusal) Reason() string { return r.reason }

func (r *Refusal) Error() string {
	if r.Serial == "" {
		return fmt.Sprintf("refuse connection: %s: %s", r.reason, r.detail)
	}
	return fmt.Sprintf("refuse certificate of %q (serial %s): %s: %s", r.Name, r.Serial, r.reason, r.detail)
}

// FileError says what is wrong with a file, and what to do about it.
type FileError struct {
	What string // "CA bundle", "certificate", "key", "deny file", "CA index", ...
	Path string
	Err  error

	hint string
}

func (e *FileError) Error() string { return fmt.Sprintf("%s %s: %v", e.What, e.Path, e.Err) }
func (e *FileError) Unwrap() error { return e.Err }

// Hint is one sentence for the user, possibly empty.
func (e *FileError) Hint() string { return e.hint }

// withoutPath drops the operation and path that os puts into its errors: FileError says them already.
func withoutPath(err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}

// RequestError refuses a certificate that the small CA was asked for.
type RequestError struct {
	problem string
	hint    string
}

func (e *RequestError) Error() string { return e.problem }

// Hint is one sentence for the user, possibly empty.
func (e *RequestError) Hint() string { return e.hint }
