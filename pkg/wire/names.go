// SPDX-License-Identifier: Apache-2.0

package wire

import "io"

// Names lists nodes. On a query stream of a peer connection each list that the opener sends is answered by one with those of its
// nodes that the other server has a tunnel of. An empty list is valid.
type Names []string

// SplitNames cuts a list into lists that fit into one message each.
func SplitNames(nodes []string) []Names {
	var lists []Names
	from, size := 0, 0
	for i, n := range nodes {
		if size+1+len(n) > maxBody {
			lists = append(lists, Names(nodes[from:i]))
			from, size = i, 0
		}
		size += 1 + len(n)
	}
	if from < len(nodes) {
		lists = append(lists, Names(nodes[from:]))
	}
	return lists
}

// AppendBinary appends the encoded message to b.
func (n Names) AppendBinary(b []byte) ([]byte, error) {
	start, orig := len(b), b
	b = appendHead(b, TypeNames, 0)
	for _, name := range n {
		if !validName(name) {
			return orig, &Error{TypeNames, BadName}
		}
		b = append(b, byte(len(name)))
		b = append(b, name...)
	}
	if len(b)-start-headLen > maxBody {
		return orig, &Error{TypeNames, TooLong}
	}
	return finish(b, start), nil
}

// WriteNames writes n in one Write call.
func WriteNames(w io.Writer, n Names) error {
	b, err := n.AppendBinary(make([]byte, 0, MaxMessage))
	return write(w, b, err)
}

// ReadNames reads one list and not a byte more.
func ReadNames(r io.Reader) (Names, error) {
	code, b, err := read(r, TypeNames)
	if err != nil {
		return nil, err
	}
	if code != 0 {
		return nil, &Error{TypeNames, ReservedBits}
	}
	var n Names
	for len(b) > 0 {
		size := 1 + int(b[0])
		if len(b) < size {
			return nil, &Error{TypeNames, TooShort}
		}
		name := string(b[1:size])
		if !validName(name) {
			return nil, &Error{TypeNames, BadName}
		}
		n, b = append(n, name), b[size:]
	}
	return n, nil
}
