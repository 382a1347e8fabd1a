// SPDX-License-Identifier: Apache-2.0

package tunnel

import "io"

// inbuf reads frames: headers and small bodies through a buffer, many to a read, large bodies past it.
type inbuf struct {
	src   io.Reader
	buf   []byte
	r, w  int
	large bool // the last body went past the buffer, so the next probably will
}

const inbufSize = 4 << 10

// header returns the next headerLen bytes without taking them. What was read before an error is not lost.
func (b *inbuf) header() ([]byte, error) {
	for b.w-b.r < headerLen {
		if b.buf == nil {
			b.buf = make([]byte, inbufSize)
		}
		b.w = copy(b.buf, b.buf[b.r:b.w])
		b.r = 0
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
	_, err := io.ReadFull(b.src, p[n:])
	return err
}

// skip drops n bytes, and returns an error if there are not as many.
func (b *inbuf) skip(n int) error {
	m := min(n, b.w-b.r)
	b.r += m
	_, err := io.CopyN(io.Discard, b.src, int64(n-m))
	return err
}
