// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"encoding/binary"
	"io"
	"net/netip"
)

// Kind says what a stream is for.
type Kind uint8

// Stream kinds.
const (
	KindConnect Kind = 1 // one intercepted TCP connection; the other end answers with a Reply
	KindNotice  Kind = 2 // a Notice follows; no answer
	KindQuery   Kind = 3 // peer connections only: Names follow, each is answered by Names
)

// String is the kind in snake_case.
func (k Kind) String() string {
	switch k {
	case KindConnect:
		return "connect"
	case KindNotice:
		return "notice"
	case KindQuery:
		return "query"
	}
	return "unknown"
}

// Header is the first message on every stream. For KindNotice and KindQuery all fields but Kind are empty.
type Header struct {
	Kind  Kind
	Trace uint64         // random, the same in the records of both ends; shown as 16 hex digits
	Dst   netip.AddrPort // where the client wanted to go
	Src   netip.AddrPort // the client as the server saw it; the zero value when not known
	Node  string         // whose tunnel is wanted, at most MaxName bytes; on peer connections always, else never
}

const (
	connectLen = 8 + 18 + 18
	optNode    = 1
)

// AppendBinary appends the encoded message to b.
func (h Header) AppendBinary(b []byte) ([]byte, error) {
	switch h.Kind {
	case KindConnect:
	case KindNotice, KindQuery:
		return appendHead(b, TypeHeader, uint8(h.Kind)), nil
	default:
		return b, &Error{TypeHeader, UnknownKind}
	}
	if !h.Dst.IsValid() || h.Dst.Port() == 0 || h.Dst.Addr().Zone() != "" || h.Src.Addr().Zone() != "" {
		return b, &Error{TypeHeader, BadAddress}
	}
	if h.Node != "" && !validName(h.Node) {
		return b, &Error{TypeHeader, BadName}
	}
	start := len(b)
	b = appendHead(b, TypeHeader, uint8(KindConnect))
	b = binary.BigEndian.AppendUint64(b, h.Trace)
	b = appendAddrPort(b, h.Dst)
	b = appendAddrPort(b, h.Src)
	b = appendOption(b, optNode, h.Node)
	return finish(b, start), nil
}

// WriteHeader writes h in one Write call.
func WriteHeader(w io.Writer, h Header) error {
	b, err := h.AppendBinary(make([]byte, 0, 64))
	return write(w, b, err)
}

// ReadHeader reads one Header and not a byte more. Addresses come out unmapped.
func ReadHeader(r io.Reader) (Header, error) {
	code, b, err := read(r, TypeHeader)
	if err != nil {
		return Header{}, err
	}
	h := Header{Kind: Kind(code)}
	opts := options{msg: TypeHeader, rest: b}
	switch h.Kind {
	case KindConnect:
		if len(b) < connectLen {
			return Header{}, &Error{TypeHeader, TooShort}
		}
		h.Trace = binary.BigEndian.Uint64(b)
		h.Dst = addrPort(b[8:])
		h.Src = addrPort(b[26:])
		opts.rest = b[connectLen:]
		if h.Dst.Port() == 0 {
			return Header{}, &Error{TypeHeader, BadAddress}
		}
	case KindNotice, KindQuery:
	default:
		return Header{}, &Error{TypeHeader, UnknownKind}
	}
	for opts.next() {
		switch {
		case h.Kind == KindConnect && opts.tag == optNode:
			h.Node = opts.name()
		default:
			opts.unknown()
		}
	}
	if opts.err != nil {
		return Header{}, opts.err
	}
	return h, nil
}

// appendAddrPort writes 16 bytes of address, IPv4 as ::ffff:a.b.c.d, and two of port; zeros for the zero value.
func appendAddrPort(b []byte, ap netip.AddrPort) []byte {
	var a [16]byte
	if ap.IsValid() {
		a = ap.Addr().As16()
	}
	b = append(b, a[:]...)
	return binary.BigEndian.AppendUint16(b, ap.Port())
}

func addrPort(b []byte) netip.AddrPort {
	if [18]byte(b) == ([18]byte{}) {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(netip.AddrFrom16([16]byte(b)).Unmap(), binary.BigEndian.Uint16(b[16:]))
}
