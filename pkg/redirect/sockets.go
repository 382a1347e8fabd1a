// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"syscall"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Origin is where an intercepted connection wanted to go, and who opened it. The process is described as it was at connect();
// it may have ended since.
type Origin struct {
	Dst    netip.AddrPort
	PID    uint32 // of the process, in the first PID namespace
	UID    uint32 // in the first user namespace
	GID    uint32
	Comm   string // of the thread; "iou-wrk-N" for io_uring
	Cgroup uint64 // id in the cgroup2 hierarchy
	Netns  uint64 // cookie of the network namespace
	Host   bool   // it is the host's namespace, not a pod's
	Canary bool   // a test of [Kernel.Canary]: close it, and do not count or record it
}

// Origin returns the original destination of a connection that one of the redirect listeners accepted. The error wraps
// [ErrNotIntercepted] if there is none. An accepted connection has its origin from the start; there is no need to wait.
func (k *Kernel) Origin(conn *net.TCPConn) (Origin, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return Origin{}, err
	}
	var rec kernelSockRecord
	var failed error
	if err := raw.Control(func(fd uintptr) { rec, failed = k.record(int(fd)) }); err != nil {
		return Origin{}, err
	}
	if failed != nil {
		return Origin{}, failed
	}
	if rec.Kind != kernelSockKindSOCK_ACCEPTED {
		return Origin{}, ErrNotIntercepted
	}
	o := Origin{
		Dst:    netip.AddrPortFrom(from16(rec.Origin.Addr), rec.Origin.Port),
		PID:    rec.Origin.Pid,
		UID:    rec.Origin.Uid,
		GID:    rec.Origin.Gid,
		Comm:   getString(rec.Origin.Comm[:]),
		Cgroup: rec.Origin.Cgroup,
		Netns:  rec.Origin.Netns,
		Host:   rec.Origin.Netns == k.netns.Load(),
		Canary: rec.Origin.Canary != 0,
	}
	if o.Canary {
		k.canary.arrived(rec.Origin.Canary, o)
	}
	return o, nil
}

// record reads the storage of a socket.
func (k *Kernel) record(fd int) (kernelSockRecord, error) {
	var rec kernelSockRecord
	err := k.sockets.Lookup(int32(fd), &rec)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return rec, ErrNotIntercepted
	}
	if err != nil {
		return rec, explain("read the socket's record", err)
	}
	return rec, nil
}

// mark writes the storage of a socket. The programs saw, or will see, the socket itself: of an MPTCP socket they see a subflow, and
// a record on it has no effect.
func (k *Kernel) mark(fd int, rec kernelSockRecord) error {
	protocol, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	if err != nil {
		return explain("ask for the socket's protocol", err)
	}
	if protocol != unix.IPPROTO_TCP {
		return fail("mark the socket", fmt.Errorf("protocol %d is not TCP", protocol), "call SetMultipathTCP(false) on the net.Dialer or net.ListenConfig")
	}
	k.marking.RLock()
	defer k.marking.RUnlock()
	if k.gone {
		return fail("mark the socket", net.ErrClosed, "")
	}
	err = k.sockets.Update(int32(fd), &rec, ebpf.UpdateAny)
	if former := k.former.Load(); err == nil && former != nil {
		// Whatever the layout of its records is, they begin with the kind.
		old := make([]byte, former.ValueSize())
		binary.NativeEndian.PutUint32(old, uint32(rec.Kind))
		err = former.Update(int32(fd), old, ebpf.UpdateAny)
	}
	if err != nil {
		hint := hintFor(err)
		if errors.Is(err, unix.ENOMEM) {
			hint = "the socket has no room for its record: raise net.core.optmem_max (the default is 131072)"
		}
		return fail("write the socket's record", err, hint)
	}
	return nil
}

// GuardListener marks a socket as the daemon's own listener. It has to come before bind(), which is refused to everybody else on the
// redirect ports.
func (k *Kernel) GuardListener(fd int) error {
	return k.mark(fd, kernelSockRecord{Kind: kernelSockKindSOCK_LISTENER})
}

// Bypass is a [net.Dialer.Control] that keeps the programs off a connection of the daemon's own: without it, a daemon that dials a target
// would reach itself. The Dialer needs SetMultipathTCP(false), too.
func (k *Kernel) Bypass(_, _ string, c syscall.RawConn) error {
	return control(c, func(fd int) error {
		return k.mark(fd, kernelSockRecord{Kind: kernelSockKindSOCK_BYPASS})
	})
}

func control(c syscall.RawConn, do func(fd int) error) error {
	var failed error
	if err := c.Control(func(fd uintptr) { failed = do(int(fd)) }); err != nil {
		return err
	}
	return failed
}

// Listen opens a redirect listener: on one of [Kernel.HostAddrs] or on an address of the node, and one of [Kernel.RedirectPorts]. The
// wildcard is refused, it would offer the listener to networks that have no business with it. The caller closes the listener.
func (k *Kernel) Listen(ctx context.Context, addr netip.AddrPort) (*net.TCPListener, error) {
	op := "listen on " + addr.String()
	if err := checkAddr(addr.Addr()); err != nil {
		return nil, fail(op, err, "")
	}
	if addr.Port() < k.opts.RedirectPort || addr.Port() > k.opts.RedirectPort+Ports-1 {
		return nil, fail(op, fmt.Errorf("the redirect ports are %d-%d", k.opts.RedirectPort, k.opts.RedirectPort+Ports-1), "")
	}
	config := net.ListenConfig{
		Control: func(_, _ string, c syscall.RawConn) error { return control(c, k.GuardListener) },
	}
	// Go's listeners speak MPTCP by default; their accepted sockets are not the ones that the programs saw.
	config.SetMultipathTCP(false)
	listener, err := config.Listen(ctx, "tcp", addr.String())
	if err != nil {
		return nil, fail(op, err, hintForListen(err, addr.Port()))
	}
	tcp := listener.(*net.TCPListener)
	// With fast open the kernel would make the accepted socket before the client's record is handed over, and it may be enabled for all
	// listeners of the machine. Listening sets it, so this comes after.
	raw, err := tcp.SyscallConn()
	if err == nil {
		err = control(raw, func(fd int) error {
			return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_FASTOPEN, 0)
		})
	}
	if err != nil {
		return nil, errors.Join(fail(op, fmt.Errorf("switch off fast open: %w", err), ""), tcp.Close())
	}
	return tcp, nil
}

func hintForListen(err error, port uint16) string {
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		return "something else has the port (ss -ltnp sport = :" + strconv.Itoa(int(port)) + "); stop it, or move all eight with --redirect-port"
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return "this host does not have the address (now); check --node-ip"
	case errors.Is(err, unix.EACCES):
		return "the port belongs to the tunnel-server that runs here, or ran here last with another layout; tunnelctl cleanup removes the guard"
	}
	return hintFor(err)
}
