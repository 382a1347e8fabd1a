// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"errors"
	"math/bits"
	"os"
	"sync/atomic"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// TestIOUring: connect() by a request in a ring.
func TestIOUring(t *testing.T) {
	l := newLab(t)
	k, s := l.ready()
	client, err := newSocket(unix.AF_INET, 0)
	must(t, err)
	defer client.close()
	port := bits.ReverseBytes16(edgePort)
	if err := ringConnect(int(client), unix.RawSockaddrInet4{Family: unix.AF_INET, Port: port, Addr: edge4.As4()}); err != nil {
		if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) {
			t.Skip("the kernel has no io_uring, or it is switched off: ", err)
		}
		t.Fatal(err)
	}
	if got, err := client.answer(); got != dst4.String() {
		t.Errorf("the server saw %q (%v)", got, err)
	}
	if got, err := client.peer(); got != dst4 {
		t.Errorf("getpeername() says %s (%v)", got, err)
	}
	for _, found := range s.origins.Range {
		o := found.(Origin)
		if o.PID != uint32(os.Getpid()) || o.Netns != k.netns.Load() || !o.Host {
			t.Errorf("origin %+v", o)
		}
		t.Log("connected by", o.Comm)
	}
}

// ringConnect makes a ring of one request, connects with it, and waits for the result.
func ringConnect(fd int, addr unix.RawSockaddrInet4) error {
	const opConnect, sqRing, cqRing, requests, getEvents, forceAsync = 16, 0, 0x8000000, 0x10000000, 1, 1 << 4
	type offsets struct {
		head, tail, mask, entries, flags, dropped, array, reserved uint32
		user                                                       uint64
	}
	var params struct {
		sqEntries, cqEntries, flags, cpu, idle, features, wq uint32
		_                                                    [3]uint32
		sq, cq                                               offsets
	}
	ring, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 1, uintptr(unsafe.Pointer(&params)), 0)
	if errno != 0 {
		return errno
	}
	defer unix.Close(int(ring))
	area := func(offset int64) []byte {
		mem, err := unix.Mmap(int(ring), offset, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
		if err != nil {
			panic(err)
		}
		return mem
	}
	sq, cq, sqe := area(sqRing), area(cqRing), area(requests)
	defer func() { _, _, _ = unix.Munmap(sq), unix.Munmap(cq), unix.Munmap(sqe) }()

	request := (*struct {
		op, flags   uint8
		priority    uint16
		fd          int32
		length, ptr uint64
	})(unsafe.Pointer(&sqe[0]))
	request.op, request.flags, request.fd = opConnect, forceAsync, int32(fd)
	request.length, request.ptr = uint64(unsafe.Sizeof(addr)), uint64(uintptr(unsafe.Pointer(&addr)))
	atomic.AddUint32((*uint32)(unsafe.Pointer(&sq[params.sq.tail])), 1) // the one entry of the array is 0, the one request
	if _, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, ring, 1, 1, getEvents, 0, 0); errno != 0 {
		return errno
	}
	// In the completion queue's offsets the sixth field is where the entries are: user data, result, flags.
	if result := *(*int32)(unsafe.Pointer(&cq[params.cq.dropped+8])); result < 0 {
		return unix.Errno(-result)
	}
	return nil
}
