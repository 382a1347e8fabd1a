// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"
)

// canaryTimeout bounds one test; everything happens on this machine.
const canaryTimeout = 2 * time.Second

// CanaryResult tells for each family whether a connection was intercepted as it has to be; nil also stands for a family that
// the host does not have.
type CanaryResult struct {
	IPv4, IPv6 error
}

// Err is nil if both families work.
func (r CanaryResult) Err() error { return errors.Join(r.IPv4, r.IPv6) }

// canary hands arrivals to the test that waits for them. The number of a test travels in the socket's record.
type canary struct {
	running sync.Mutex // one test at a time

	mu      sync.Mutex
	number  uint8 // of the test under way; 1..255
	arrival chan Origin
}

// next starts a test.
func (c *canary) next() (uint8, <-chan Origin) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.number = max(c.number+1, 1)
	c.arrival = make(chan Origin, 1)
	return c.number, c.arrival
}

// arrived is told of each canary that a listener accepted.
func (c *canary) arrived(number uint8, o Origin) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if number != c.number || c.arrival == nil {
		return
	}
	c.arrival <- o
	c.arrival = nil
}

// Canary proves the path of the host's own connections, after Attach and with the listeners being served: this process connects to
// 192.0.2.1 and 2001:db8::1, documentation addresses that are no targets, on a tunneled port, and each connection has to come
// out of [Kernel.Origin] with that destination. Only sockets that this process marked are redirected there; anybody else's go nowhere.
// It has to run in the host's network namespace. It says nothing about pods: compare Redirected and Accepted of their counters.
func (k *Kernel) Canary(ctx context.Context) CanaryResult {
	k.canary.running.Lock()
	defer k.canary.running.Unlock()
	ports := k.TunneledPorts()
	if len(ports) == 0 {
		err := fail("test the interception", errors.New("no port is tunneled"), "")
		return CanaryResult{IPv4: err, IPv6: err}
	}
	var result CanaryResult
	dst := canaryAddrs()
	for _, host := range k.HostAddrs() {
		if host.Is4() {
			result.IPv4 = k.testFamily(ctx, "IPv4", netip.AddrPortFrom(dst[0], ports[0]))
		} else {
			result.IPv6 = k.testFamily(ctx, "IPv6", netip.AddrPortFrom(dst[1], ports[0]))
		}
	}
	return result
}

// canaryAddrs are where the canary connects to over IPv4 and over IPv6.
func canaryAddrs() [2]netip.Addr {
	return [2]netip.Addr{
		netip.AddrFrom4([4]byte{192, 0, 2, 1}),
		netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 15: 1}),
	}
}

func (k *Kernel) testFamily(ctx context.Context, family string, dst netip.AddrPort) error {
	if err := k.testPath(ctx, dst); err != nil {
		return fail("test the interception of "+family, err,
			"the programs have to be attached at the root of the node's cgroup2 hierarchy (--cgroup-root), and no other program on the hook may refuse connections")
	}
	return nil
}

func (k *Kernel) testPath(ctx context.Context, dst netip.AddrPort) error {
	ctx, cancel := context.WithTimeout(ctx, canaryTimeout)
	defer cancel()
	number, arrival := k.canary.next()
	dialer := net.Dialer{
		Control: func(_, _ string, c syscall.RawConn) error {
			return control(c, func(fd int) error {
				return k.mark(fd, kernelSockRecord{Kind: kernelSockKindSOCK_CANARY, Origin: kernelOrigin{Canary: number}})
			})
		},
	}
	dialer.SetMultipathTCP(false)
	conn, err := dialer.DialContext(ctx, "tcp", dst.String())
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	select {
	case <-ctx.Done():
		return fmt.Errorf("%s answered, but the connection did not arrive here", dst)
	case o := <-arrival:
		switch {
		case o.Dst != dst:
			return fmt.Errorf("a connection to %s arrived as one to %s", dst, o.Dst)
		case !o.Host:
			return fmt.Errorf("a connection of this process counts as a pod's")
		case conn.RemoteAddr().String() != dst.String():
			return fmt.Errorf("getpeername() of a connection to %s says %s", dst, conn.RemoteAddr())
		}
		return nil
	}
}
