// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"io"
	"time"
)

// Notice tells the other end of a session something that no stream asked for. It follows a Header of kind
// KindNotice.
type Notice struct {
	Kind     NoticeKind
	ClosesIn time.Duration // NoticeDrain: until the sender's listeners close; at most MaxClosesIn
	Message  string        // for people; at most MaxText bytes; may be empty
}

// NoticeKind says what a notice is about.
type NoticeKind uint8

// NoticeDrain: the sender is about to stop and opens no more streams on this session after ClosesIn. An agent logs in
// elsewhere now; open streams go on.
const NoticeDrain NoticeKind = 1

// String is the kind in snake_case.
func (k NoticeKind) String() string {
	if k == NoticeDrain {
		return "drain"
	}
	return "unknown"
}

const (
	noticeLen        = 4
	optNoticeMessage = 1
)

// AppendBinary appends the encoded message to b.
func (n Notice) AppendBinary(b []byte) ([]byte, error) {
	start, orig := len(b), b
	b = appendHead(b, TypeNotice, uint8(n.Kind))
	b, err := appendMillis(b, n.ClosesIn, MaxClosesIn, TypeNotice)
	if err != nil {
		return orig, err
	}
	b = appendOption(b, optNoticeMessage, cleanText(n.Message, MaxText))
	return finish(b, start), nil
}

// WriteNotice writes n in one Write call.
func WriteNotice(w io.Writer, n Notice) error {
	b, err := n.AppendBinary(make([]byte, 0, 64))
	return write(w, b, err)
}

// ReadNotice reads one Notice and not a byte more. A kind that this version does not know is no error; the receiver
// ignores it.
func ReadNotice(r io.Reader) (Notice, error) {
	code, b, err := read(r, TypeNotice)
	if err != nil {
		return Notice{}, err
	}
	if len(b) < noticeLen {
		return Notice{}, &Error{TypeNotice, TooShort}
	}
	n := Notice{Kind: NoticeKind(code)}
	if n.ClosesIn, err = millis(b, MaxClosesIn, TypeNotice); err != nil {
		return Notice{}, err
	}
	opts := options{msg: TypeNotice, rest: b[noticeLen:]}
	for opts.next() {
		switch opts.tag {
		case optNoticeMessage:
			n.Message = opts.text(MaxText)
		default:
			opts.unknown()
		}
	}
	if opts.err != nil {
		return Notice{}, opts.err
	}
	return n, nil
}
