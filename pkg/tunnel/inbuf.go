// SPDX-License-Identifier: Apache-2.0

package tunnel

import "io"

// inbuf is a read buffer that hands out whole frames. It starts small, because most tunnels are idle most of the time.
// bufio.Reader cannot grow.
type inbuf struct {
	src  io.Reader
	buf  []byte
	r, w int
}

// peek returns the next n bytes without taking them. After an error it can be called again; nothing read is lost.
func (b *inbuf) peek(n int) ([]byte, error) {
	for b.w-b.r < n {
		switch {
		case b.r == b.w:
			b.r, b.w = 0, 0
		case len(b.buf)-b.r < n || b.w == len(b.buf):
			b.w = copy(b.buf, b.buf[b.r:b.w])
			b.r = 0
		}
		if len(b.buf) < n || b.w == len(b.buf) {
			grown := make([]byte, max(n, 2*len(b.buf), 1<<10))
			b.w = copy(grown, b.buf[b.r:b.w])
			b.r = 0
			b.buf = grown
		}
		m, err := b.src.Read(b.buf[b.w:])
		b.w += m
		if m == 0 && err != nil {
			return nil, err
		}
	}
	return b.buf[b.r : b.r+n], nil
}

// take removes and returns up to n of the bytes that are buffered. They are valid until the next peek.
func (b *inbuf) take(n int) []byte {
	p := b.buf[b.r:min(b.r+n, b.w)]
	b.r += len(p)
	return p
}
