// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"encoding/binary"
	"io"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Type is the first byte of a message.
type Type uint8

// Message types.
const (
	TypeLogin      Type = 1
	TypeLoginReply Type = 2
	TypeHeader     Type = 3
	TypeReply      Type = 4
	TypeNotice     Type = 5
	TypeNames      Type = 6
)

// String names a message type as error texts do.
func (t Type) String() string {
	switch t {
	case TypeLogin:
		return "login"
	case TypeLoginReply:
		return "login reply"
	case TypeHeader:
		return "stream header"
	case TypeReply:
		return "stream reply"
	case TypeNotice:
		return "notice"
	case TypeNames:
		return "list of names"
	}
	return "message of unknown type"
}

// critical marks an option that a receiver must understand; without it an unknown option is skipped.
const critical = 0x80

// appendHead appends a message head whose length is filled in by finish.
func appendHead(b []byte, t Type, code uint8) []byte {
	return append(b, byte(t), code, 0, 0)
}

// finish writes the length of the message that starts at b[start]. Every field has a limit of its own, and together
// they stay below maxBody (TestLargestMessagesFit), so it cannot fail.
func finish(b []byte, start int) []byte {
	binary.BigEndian.PutUint16(b[start+2:], uint16(len(b)-start-headLen))
	return b
}

// appendOption appends nothing for an empty value: absent and empty are one.
func appendOption(b []byte, tag uint8, value string) []byte {
	if value == "" {
		return b
	}
	b = append(b, tag, byte(len(value)))
	return append(b, value...)
}

// read takes one whole message of type want off r. Its one allocation holds all common messages.
func read(r io.Reader, want Type) (code uint8, body []byte, err error) {
	buf := make([]byte, headLen, 64)
	if _, err := io.ReadFull(r, buf); err != nil {
		return 0, nil, err // io.EOF: the peer closed before its first byte
	}
	if Type(buf[0]) != want {
		return 0, nil, &Error{want, WrongType}
	}
	n := int(binary.BigEndian.Uint16(buf[2:]))
	if n > maxBody {
		return 0, nil, &Error{want, TooLong}
	}
	code = buf[1]
	if headLen+n <= cap(buf) {
		body = buf[headLen : headLen+n]
	} else {
		body = make([]byte, n)
	}
	if _, err := io.ReadFull(r, body); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF // io.EOF is kept for "nothing at all"
		}
		return 0, nil, err
	}
	return code, body, nil
}

func write(w io.Writer, b []byte, err error) error {
	if err != nil {
		return err
	}
	_, err = w.Write(b)
	return err
}

// options walks the options that end a message body.
type options struct {
	msg   Type
	rest  []byte
	tag   uint8
	value []byte
	err   error
}

// next moves to the next option, and reports false at the end and at the first problem, which is then in err. Tags
// ascend, so that nothing can be given twice with two meanings and a message has one encoding only.
func (o *options) next() bool {
	if o.err != nil || len(o.rest) == 0 {
		return false
	}
	if len(o.rest) < 3 || o.rest[0] <= o.tag || o.rest[1] == 0 || len(o.rest) < 2+int(o.rest[1]) {
		o.fail(BadOption)
		return false
	}
	n := 2 + int(o.rest[1])
	o.tag, o.value, o.rest = o.rest[0], o.rest[2:n], o.rest[n:]
	return true
}

// unknown deals with an option that this version does not define.
func (o *options) unknown() {
	if o.tag&critical != 0 {
		o.fail(UnknownOption)
	}
}

func (o *options) fail(p Problem) { o.err = &Error{o.msg, p} }

// name takes the value as a node or server name.
func (o *options) name() string {
	s := string(o.value)
	if !validName(s) {
		o.fail(BadName)
		return ""
	}
	return s
}

// text takes the value as text for people.
func (o *options) text(limit int) string {
	if len(o.value) > limit || !validText(o.value) {
		o.fail(BadText)
		return ""
	}
	return string(o.value)
}

// validName holds names to visible ASCII. Which names are good node names is for the certificate's reader to say; here
// it is enough that a name cannot forge a log line.
func validName(s string) bool {
	if s == "" || len(s) > MaxName {
		return false
	}
	for i := range len(s) {
		if s[i] <= ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}

// validText reports whether b is UTF-8 that prints on one line.
func validText(b []byte) bool {
	for len(b) > 0 {
		r, n := utf8.DecodeRune(b)
		if (r == utf8.RuneError && n == 1) || !unicode.IsPrint(r) {
			return false
		}
		b = b[n:]
	}
	return true
}

// cleanText makes s valid text of at most limit bytes. It cuts and replaces where a name would be refused: these texts
// are often those of errors, and an answer must not fail because its explanation is long.
func cleanText(s string, limit int) string {
	if len(s) <= limit && validText([]byte(s)) {
		return s
	}
	s = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	if len(s) > limit {
		n := limit
		for !utf8.RuneStart(s[n]) {
			n--
		}
		s = s[:n]
	}
	return s
}

// appendMillis appends d in milliseconds, rounded up, in four bytes.
func appendMillis(b []byte, d, limit time.Duration, msg Type) ([]byte, error) {
	if d < 0 || d > limit {
		return b, &Error{msg, BadTime}
	}
	return binary.BigEndian.AppendUint32(b, uint32((d+time.Millisecond-1)/time.Millisecond)), nil
}

func millis(b []byte, limit time.Duration, msg Type) (time.Duration, error) {
	d := time.Duration(binary.BigEndian.Uint32(b)) * time.Millisecond
	if d > limit {
		return 0, &Error{msg, BadTime}
	}
	return d, nil
}
