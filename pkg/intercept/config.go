// SPDX-License-Identifier: Apache-2.0

package intercept

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/relay"
	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

// Origin is who connected, and to where, before the kernel redirected it.
type Origin struct {
	Dst      netip.AddrPort // the original destination
	PID, UID uint32
	Comm     string // the thread's name, up to 15 bytes of its own choice
	Cgroup   uint64 // cgroup2 id
	Netns    uint64 // namespace cookie
	Host     bool   // it is the host's namespace, not a pod's
}

// ErrNotIntercepted is what an Origin function returns for a connection that nobody redirected: somebody dialed the
// listener itself.
var ErrNotIntercepted = errors.New("connection was not intercepted")

// Stream is one stream to an agent. It must take wire.MaxRetained bytes without the far end's reading any of them;
// its Reset must make pending reads and writes return.
type Stream = relay.Conn

// Config says what a Server needs. Origin, Lookup and Open are required.
type Config struct {
	// Origin tells where an accepted connection was going, or fails with ErrNotIntercepted.
	Origin func(*net.TCPConn) (Origin, error)

	// Canary is asked first, and returns true for a connection that is the program's own test of the interception. The
	// connection is closed when it returns. May be nil.
	Canary func(net.Conn, Origin) bool

	// Lookup names the node that owns an address.
	Lookup func(netip.Addr) (node string, ok bool)

	// Open opens a stream to the node's agent and writes h on it (see WriteHeader) before it returns, which it does
	// soon after ctx ends. The stream outlives ctx. On the second try, failed is the first stream: its owner is the one to
	// avoid. An error may have a method Reason() string with the name of a wire.Status, "no_tunnel" say; any
	// other error is counted as open_failed.
	Open func(ctx context.Context, node string, h wire.Header, failed Stream) (Stream, error)

	// Opened is told, for each connection that got through, how long it took from accept to the agent's status. May be nil.
	Opened func(time.Duration)

	MaxConns        int           // open connections altogether; default 16384. Keep it below the limit of open files
	MaxConnsPerNode int           // open connections to one node; default 4096. A pod has half of them at most
	MaxConnsPerPod  int           // open connections of one cgroup outside the host's network namespace; default a quarter of MaxConns
	OpenTimeout     time.Duration // for one call of Open; default 10s
	StatusTimeout   time.Duration // from header to status; default 15s, more than an agent's dial may take
	Logger          *slog.Logger  // access records at info, starts at debug; nil: none
}

func (c *Config) setDefaults() {
	def := func(n *int, v int) {
		if *n == 0 {
			*n = v
		}
	}
	wait := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	if c.Opened == nil {
		c.Opened = func(time.Duration) {}
	}
	def(&c.MaxConns, 16384)
	def(&c.MaxConnsPerNode, 4096)
	def(&c.MaxConnsPerPod, max(1, c.MaxConns/4))
	wait(&c.OpenTimeout, 10*time.Second)
	wait(&c.StatusTimeout, 15*time.Second)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
}

// Validate returns everything that is wrong with the configuration, joined. Zero numbers stand for their defaults.
func (c Config) Validate() error {
	var errs []error
	if c.Origin == nil || c.Lookup == nil || c.Open == nil {
		errs = append(errs, errors.New("intercept needs Origin, Lookup and Open"))
	}
	if c.MaxConns < 0 || c.MaxConnsPerNode < 0 || c.MaxConnsPerPod < 0 {
		errs = append(errs, fmt.Errorf("negative connection limit: %d, per node %d, per pod %d", c.MaxConns, c.MaxConnsPerNode, c.MaxConnsPerPod))
	}
	if c.OpenTimeout < 0 || c.StatusTimeout < 0 {
		errs = append(errs, fmt.Errorf("negative timeout: open %v, status %v", c.OpenTimeout, c.StatusTimeout))
	}
	return errors.Join(errs...)
}

// WriteHeader writes h on a new stream, for at most as long as ctx lasts. On failure the stream has been reset.
func WriteHeader(ctx context.Context, s Stream, h wire.Header) error {
	stop := context.AfterFunc(ctx, func() { s.Reset() })
	err := wire.WriteHeader(s, h)
	if !stop() && err == nil {
		err = ctx.Err() // the reset is under way: the stream is of no use
	}
	if err != nil {
		s.Reset()
		return fmt.Errorf("write stream header: %w", err)
	}
	return nil
}
