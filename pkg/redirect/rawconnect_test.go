// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// rawConnect is connect() with an address that x/sys cannot spell.
func rawConnect(fd int, addr *unix.RawSockaddr) error {
	_, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(addr)), unsafe.Sizeof(*addr))
	if errno != 0 {
		return errno
	}
	return nil
}
