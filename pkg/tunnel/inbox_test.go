// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"bytes"
	"math/rand/v2"
	"testing"
)

// Frames of all sizes go in, pieces of all sizes come out, also between reserve and commit; the bytes stay the same, and an
// empty inbox holds nothing.
func TestInboxKeepsBytes(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	var box inbox
	var in, out []byte
	read := func() {
		b := box.front()
		if len(b) > 0 {
			n := 1 + rnd.IntN(len(b))
			out = append(out, b[:n]...)
			box.drop(n)
		}
	}
	for range 5000 {
		n := 1 + rnd.IntN(maxReceive)
		if rnd.IntN(2) == 0 {
			n = 1 + rnd.IntN(100)
		}
		room := box.reserve(n)
		if len(room) != n {
			t.Fatal(len(room), n)
		}
		for i := range room {
			room[i] = byte(rnd.Uint32())
		}
		read()
		box.commit(n)
		in = append(in, room...)
		for range rnd.IntN(4) {
			read()
		}
		if rnd.IntN(8) == 0 {
			for len(box.front()) > 0 {
				read()
			}
			if box.first != nil || box.last != nil {
				t.Fatal("an empty inbox holds a chunk")
			}
		}
	}
	for len(box.front()) > 0 {
		read()
	}
	if !bytes.Equal(in, out) {
		t.Errorf("%d bytes in, %d out, not the same", len(in), len(out))
	}
}

// What few bytes cost while nobody reads them.
func TestInboxIsSmallForSmallFrames(t *testing.T) {
	var box inbox
	for range 20 {
		box.reserve(100)
		box.commit(100)
	}
	if n := len(box.first.buf); n != smallChunk || box.first != box.last {
		t.Errorf("a chunk of %d for 2000 bytes", n)
	}
}
