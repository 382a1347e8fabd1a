// SPDX-License-Identifier: Apache-2.0

package tunnel

import "encoding/binary"

// The yamux frame: a header of 12 bytes (version, type, flags, stream, length, big endian), and after a data header that many
// bytes. In all other types the length is a number without bytes: credit, ping id, go-away code.
const headerLen = 12

type frameType uint8

const (
	typeData   frameType = 0
	typeWindow frameType = 1
	typePing   frameType = 2
	typeGoAway frameType = 3
)

const (
	flagSYN uint16 = 1 << iota
	flagACK
	flagFIN
	flagRST

	allFlags = flagSYN | flagACK | flagFIN | flagRST
)

const (
	// initialWindow is the credit that every stream has from its first frame on, by yamux's definition.
	initialWindow = 256 << 10

	// maxSend is the most data in a frame that we send: with its header it fills one TLS record. Small frames are what lets
	// streams interleave.
	maxSend = 16<<10 - headerLen

	// maxReceive is the most data in a frame that we accept. A frame is buffered whole before yamux sees any of it, because
	// yamux holds a lock of the stream while it reads a body.
	maxReceive = 32 << 10
)

// header is a decoded frame header.
type header struct {
	typ    frameType
	flags  uint16
	id     uint32
	length uint32
}

// body is how many bytes follow the header.
func (h header) body() int {
	if h.typ == typeData {
		return int(h.length)
	}
	return 0
}

// appendTo appends the encoded header to b.
func (h header) appendTo(b []byte) []byte {
	b = append(b, 0, byte(h.typ))
	b = binary.BigEndian.AppendUint16(b, h.flags)
	b = binary.BigEndian.AppendUint32(b, h.id)
	return binary.BigEndian.AppendUint32(b, h.length)
}

// parseHeader decodes the first 12 bytes of b and checks what can be checked without knowing the session.
func parseHeader(b []byte) (header, error) {
	_ = b[headerLen-1]
	h := header{
		typ:    frameType(b[1]),
		flags:  binary.BigEndian.Uint16(b[2:]),
		id:     binary.BigEndian.Uint32(b[4:]),
		length: binary.BigEndian.Uint32(b[8:]),
	}
	switch {
	case b[0] != 0:
		return h, violation("unknown yamux version")
	case h.flags&^allFlags != 0:
		return h, violation("unknown frame flags")
	}
	switch h.typ {
	case typeData:
		if h.length > maxReceive {
			return h, violation("data frame too long")
		}
		fallthrough
	case typeWindow:
		if h.id == 0 {
			return h, violation("stream frame without a stream")
		}
	case typePing:
		if h.id != 0 || (h.flags != flagSYN && h.flags != flagACK) {
			return h, violation("malformed ping")
		}
	case typeGoAway:
		if h.id != 0 || h.flags != 0 {
			return h, violation("malformed go-away")
		}
	default:
		return h, violation("unknown frame type")
	}
	return h, nil
}
