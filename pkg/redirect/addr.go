// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"fmt"
	"net/netip"
	"strings"
)

// maxNode is the longest node name that a target holds: a DNS name.
const maxNode = 253

// to16 gives an address the form it has in the maps: 16 bytes, IPv4 as ::ffff:a.b.c.d, zeros for none.
func to16(addr netip.Addr) [16]byte {
	if !addr.IsValid() {
		return [16]byte{}
	}
	return addr.As16()
}

// from16 is the reverse.
func from16(b [16]byte) netip.Addr {
	if b == ([16]byte{}) {
		return netip.Addr{}
	}
	return netip.AddrFrom16(b).Unmap()
}

// checkAddr refuses what cannot stand in a map. Zones do not exist in the kernel's view of an address.
func checkAddr(addr netip.Addr) error {
	switch {
	case !addr.IsValid() || addr.IsUnspecified():
		return fmt.Errorf("%s is not an address of a host", addr)
	case addr.Is4In6():
		return fmt.Errorf("%s has to be written as %s", addr, addr.Unmap())
	case addr.Zone() != "":
		return fmt.Errorf("%s has a zone", addr)
	}
	return nil
}

// putString writes text into a C array that ends with NUL.
func putString(to []int8, text string) error {
	if len(text) >= len(to) {
		return fmt.Errorf("%q is longer than %d bytes", text, len(to)-1)
	}
	if strings.IndexByte(text, 0) >= 0 {
		return fmt.Errorf("%q has a NUL byte", text)
	}
	clear(to)
	for i := range len(text) {
		to[i] = int8(text[i])
	}
	return nil
}

// getString reads a C array up to its NUL.
func getString(from []int8) string {
	text := make([]byte, 0, len(from))
	for _, c := range from {
		if c == 0 {
			break
		}
		text = append(text, byte(c))
	}
	return string(text)
}
