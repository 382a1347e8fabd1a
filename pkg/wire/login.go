// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"encoding/binary"
	"io"
	"time"
)

// Login is the first message on a connection, sent by the end that dialed. Its fixed fields never change, in no
// version, so that any two ends can at least tell each other that they have no version in common.
type Login struct {
	MinVersion, MaxVersion uint16   // versions the dialing end speaks
	Instance               [16]byte // random, made anew at each start of the process: tells a restart from a clone
	Index                  uint16   // which of the instance's connections this is; a new one with the same index takes over from the former
	Software               string   // name and version for people, at most MaxSoftware bytes; may be empty
}

// Pick returns the highest version that both ends speak: the dialing one, and one that speaks lowest to highest.
func (l Login) Pick(lowest, highest uint16) (version uint16, ok bool) {
	v := min(l.MaxVersion, highest)
	if v < max(l.MinVersion, lowest) {
		return 0, false
	}
	return v, true
}

const (
	loginLen    = 2 + 2 + 16 + 2
	optSoftware = 1
)

// AppendBinary appends the encoded message to b.
func (l Login) AppendBinary(b []byte) ([]byte, error) {
	if l.MinVersion == 0 || l.MaxVersion < l.MinVersion {
		return b, &Error{TypeLogin, BadVersion}
	}
	start := len(b)
	b = appendHead(b, TypeLogin, 0)
	b = binary.BigEndian.AppendUint16(b, l.MinVersion)
	b = binary.BigEndian.AppendUint16(b, l.MaxVersion)
	b = append(b, l.Instance[:]...)
	b = binary.BigEndian.AppendUint16(b, l.Index)
	b = appendOption(b, optSoftware, cleanText(l.Software, MaxSoftware))
	return finish(b, start), nil
}

// WriteLogin writes l in one Write call.
func WriteLogin(w io.Writer, l Login) error {
	b, err := l.AppendBinary(make([]byte, 0, 96))
	return write(w, b, err)
}

// ReadLogin reads one Login and not a byte more.
func ReadLogin(r io.Reader) (Login, error) {
	code, b, err := read(r, TypeLogin)
	if err != nil {
		return Login{}, err
	}
	if code != 0 {
		return Login{}, &Error{TypeLogin, ReservedBits}
	}
	if len(b) < loginLen {
		return Login{}, &Error{TypeLogin, TooShort}
	}
	l := Login{
		MinVersion: binary.BigEndian.Uint16(b),
		MaxVersion: binary.BigEndian.Uint16(b[2:]),
		Instance:   [16]byte(b[4:20]),
		Index:      binary.BigEndian.Uint16(b[20:]),
	}
	if l.MinVersion == 0 || l.MaxVersion < l.MinVersion {
		return Login{}, &Error{TypeLogin, BadVersion}
	}
	opts := options{msg: TypeLogin, rest: b[loginLen:]}
	for opts.next() {
		switch opts.tag {
		case optSoftware:
			l.Software = opts.text(MaxSoftware)
		default:
			opts.unknown()
		}
	}
	if opts.err != nil {
		return Login{}, opts.err
	}
	return l, nil
}

// LoginReply is the server's answer. Unless Status is LoginOK both ends close the connection after it.
type LoginReply struct {
	Status     LoginStatus
	Version    uint16        // the version spoken from here on; 0 unless LoginOK
	Servers    uint16        // live servers this one knows of, itself included; 0: it does not know
	RetryAfter time.Duration // wait at least this long before logging in here again; at most MaxRetryAfter
	KeepAlive  time.Duration // longest time between two pings, for both ends; 0: the constant KeepAlive, also its upper bound
	ServerID   string        // who answers; two addresses that answer alike are one server; at most MaxName bytes
	Message    string        // for people; at most MaxText bytes; may be empty
}

const (
	loginReplyLen   = 2 + 2 + 4 + 4
	optServerID     = 1
	optLoginMessage = 2
)

// AppendBinary appends the encoded message to b.
func (l LoginReply) AppendBinary(b []byte) ([]byte, error) {
	if (l.Status == LoginOK) != (l.Version != 0) {
		return b, &Error{TypeLoginReply, BadVersion}
	}
	if !validName(l.ServerID) {
		return b, &Error{TypeLoginReply, BadName}
	}
	start, orig := len(b), b
	b = appendHead(b, TypeLoginReply, uint8(l.Status))
	b = binary.BigEndian.AppendUint16(b, l.Version)
	b = binary.BigEndian.AppendUint16(b, l.Servers)
	b, err := appendMillis(b, l.RetryAfter, MaxRetryAfter, TypeLoginReply)
	if err != nil {
		return orig, err
	}
	b, err = appendMillis(b, l.KeepAlive, KeepAlive, TypeLoginReply)
	if err != nil {
		return orig, err
	}
	b = appendOption(b, optServerID, l.ServerID)
	b = appendOption(b, optLoginMessage, cleanText(l.Message, MaxText))
	return finish(b, start), nil
}

// WriteLoginReply writes l in one Write call.
func WriteLoginReply(w io.Writer, l LoginReply) error {
	b, err := l.AppendBinary(make([]byte, 0, 128))
	return write(w, b, err)
}

// ReadLoginReply reads one LoginReply and not a byte more. A status that this version does not know is no error; it
// is one more way not to be LoginOK.
func ReadLoginReply(r io.Reader) (LoginReply, error) {
	code, b, err := read(r, TypeLoginReply)
	if err != nil {
		return LoginReply{}, err
	}
	if len(b) < loginReplyLen {
		return LoginReply{}, &Error{TypeLoginReply, TooShort}
	}
	l := LoginReply{
		Status:  LoginStatus(code),
		Version: binary.BigEndian.Uint16(b),
		Servers: binary.BigEndian.Uint16(b[2:]),
	}
	if (l.Status == LoginOK) != (l.Version != 0) {
		return LoginReply{}, &Error{TypeLoginReply, BadVersion}
	}
	if l.RetryAfter, err = millis(b[4:], MaxRetryAfter, TypeLoginReply); err != nil {
		return LoginReply{}, err
	}
	if l.KeepAlive, err = millis(b[8:], KeepAlive, TypeLoginReply); err != nil {
		return LoginReply{}, err
	}
	opts := options{msg: TypeLoginReply, rest: b[loginReplyLen:]}
	for opts.next() {
		switch opts.tag {
		case optServerID:
			l.ServerID = opts.name()
		case optLoginMessage:
			l.Message = opts.text(MaxText)
		default:
			opts.unknown()
		}
	}
	if opts.err != nil {
		return LoginReply{}, opts.err
	}
	if l.ServerID == "" {
		return LoginReply{}, &Error{TypeLoginReply, BadName}
	}
	return l, nil
}

// LoginStatus is the server's verdict on a login.
type LoginStatus uint8

// Login statuses.
const (
	LoginOK                 LoginStatus = 0
	LoginDenied             LoginStatus = 1 // the certificate is valid but not welcome
	LoginVersionUnsupported LoginStatus = 2 // no common version
	LoginBadRequest         LoginStatus = 3 // malformed login
	LoginDuplicateIdentity  LoginStatus = 4 // instances with one certificate keep evicting each other; RetryAfter is at least DuplicateWait
	LoginAlreadyConnected   LoginStatus = 5 // this instance has a tunnel to this server, under another index
	LoginOverloaded         LoginStatus = 6
	LoginDraining           LoginStatus = 7 // the server is about to stop
	LoginInternal           LoginStatus = 8
)

// String is the status in snake_case, for labels and records.
func (s LoginStatus) String() string {
	switch s {
	case LoginOK:
		return "ok"
	case LoginDenied:
		return "denied"
	case LoginVersionUnsupported:
		return "version_unsupported"
	case LoginBadRequest:
		return "bad_request"
	case LoginDuplicateIdentity:
		return "duplicate_identity"
	case LoginAlreadyConnected:
		return "already_connected"
	case LoginOverloaded:
		return "overloaded"
	case LoginDraining:
		return "draining"
	case LoginInternal:
		return "internal"
	}
	return "unknown"
}
