// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"errors"
	"io"
)

// inbuf reads frames: headers and small bodies through a buffer, many to a read, large bodies past it.
type inbuf struct {
	src   io.Reader
	buf   []byte
	r, w  int
	large bool // the last body went past the buffer, so the next probably will
	small bool // no bodies are expected: make do with little
	spare [4 * headerLen]byte
}

const inbufSize = 4 << 10

// provide makes buf what it should be, and moves what is in it to its beginning: less than a header.
func (b *inbuf) provide() {
	buf := b.buf
	switch {
	case b.small:
		buf = b.spare[:]
	case len(buf) < inbufSize:
		buf = make([]byte, inbufSize)
	}
	b.w = copy(buf, b.buf[b.r:b.w])
	b.buf, b.r = buf, 0
}

// header returns the next headerLen bytes without taking them. What was read before an error is not lost.
func (b *inbuf) header() ([]byte, error) {
	for b.w-b.r < headerLen {
		b.provide()
		end := len(b.buf)
		if b.large {
			end = headerLen // whatever of the body is read along with its header has to be copied once more
		}
		m, err := b.src.Read(b.buf[b.w:end])
		b.w += m
		if m == 0 && err != nil {
			return nil, err
		}
	}
	return b.buf[b.r : b.r+headerLen], nil
}

// fill reads len(p) bytes.
func (b *inbuf) fill(p []byte) error {
	n := copy(p, b.buf[b.r:b.w])
	b.r += n
	b.large = len(p)-n >= inbufSize
	_, err := io.ReadFull(patient{b.src}, p[n:])
	return err
}

// skip drops n bytes, and returns an error if there are not as many.
func (b *inbuf) skip(n int) error {
	m := min(n, b.w-b.r)
	b.r += m
	_, err := io.CopyN(io.Discard, patient{b.src}, int64(n-m))
	return err
}

// patient reads on after a kick: only between frames may a reader go.
type patient struct{ io.Reader }

func (r patient) Read(p []byte) (int, error) {
	for {
		n, err := r.Reader.Read(p)
		if !errors.Is(err, errKicked) {
			return n, err
		}
		if n > 0 {
			return n, nil
		}
	}
}
