// SPDX-License-Identifier: Apache-2.0

package tunnel

import "sync"

// inbox is what has arrived on a stream and was not read yet: bytes in chunks, oldest first. Its size is bounded by the
// credit that the stream gave; an empty inbox holds nothing.
//
// The bytes of a frame go straight from TLS into the last chunk, without a lock, and readers use the bytes of the first
// one without a lock. So a chunk is taken out only when it is drained and not being filled.
//
//	first.buf  [ read | front() | ...  ]  ->  ...  ->  last.buf  [ ... | reserve() | free ]
//	                  r         w                                      w
type inbox struct {
	first, last *chunk
	filling     bool // between reserve and commit
}

type chunk struct {
	next *chunk
	buf  []byte
	r, w int // buf[r:w] was not read yet
}

// reserve returns room for the next n bytes, at most maxReceive, to be filled before commit.
func (b *inbox) reserve(n int) []byte {
	if b.last == nil || len(b.last.buf)-b.last.w < n {
		c := chunks.get(n)
		if b.last == nil {
			b.first = c
		} else {
			b.last.next = c
		}
		b.last = c
	}
	b.filling = true
	return b.last.buf[b.last.w : b.last.w+n]
}

// commit lets the n bytes that were reserved be read.
func (b *inbox) commit(n int) {
	b.last.w += n
	b.filling = false
}

// front is the first bytes to be read, empty if there are none. They stay valid until they are dropped.
func (b *inbox) front() []byte {
	if b.first == nil {
		return nil
	}
	return b.first.buf[b.first.r:b.first.w]
}

// drop removes n of the bytes at the front.
func (b *inbox) drop(n int) {
	c := b.first
	c.r += n
	if c.r < c.w || b.filling && c == b.last {
		return
	}
	if b.first = c.next; b.first == nil {
		b.last = nil
	}
	chunks.put(c)
}

// Sizes of chunks. A large one takes several frames, so that a reader that is behind catches up in large steps; a stream that
// has received a line of text and is not read must not hold as much.
const (
	smallChunk = 2 << 10
	largeChunk = 64 << 10
)

// chunks are shared by all links: a pool for each would keep some for every one of 10,000 tunnels.
var chunks chunkPool

type chunkPool struct{ small, large sync.Pool }

func (p *chunkPool) of(size int) *sync.Pool {
	if size == smallChunk {
		return &p.small
	}
	return &p.large
}

func (p *chunkPool) get(n int) *chunk {
	size := smallChunk
	if n > size {
		size = largeChunk
	}
	if c, ok := p.of(size).Get().(*chunk); ok {
		return c
	}
	return &chunk{buf: make([]byte, size)}
}

func (p *chunkPool) put(c *chunk) {
	c.next, c.r, c.w = nil, 0, 0
	p.of(len(c.buf)).Put(c)
}
