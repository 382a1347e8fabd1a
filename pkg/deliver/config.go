// SPDX-License-Identifier: Apache-2.0

package deliver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"time"
)

// Config says what a Handler may do. The zero value works, and allows nothing.
type Config struct {
	Policy      Policy
	DialTimeout time.Duration // for all targets of one stream together; default 10s, less than servers wait for a status
	MaxConns    int           // streams at once; default 8192
	MaxDials    int           // dials under way at once; default 1024
	Logger      *slog.Logger  // access records at info, starts at debug; nil: none

	// Dial connects to one target, until ctx ends. Nil: plain TCP.
	Dial func(ctx context.Context, target netip.AddrPort) (*net.TCPConn, error)
}

func (c *Config) setDefaults() {
	if c.DialTimeout == 0 {
		c.DialTimeout = 10 * time.Second
	}
	if c.MaxConns == 0 {
		c.MaxConns = 8192
	}
	if c.MaxDials == 0 {
		c.MaxDials = 1024
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Dial == nil {
		c.Dial = dialTCP
	}
}

// Validate returns everything that is wrong with the configuration, joined. Zero numbers stand for their defaults.
func (c Config) Validate() error {
	var errs []error
	if c.MaxConns < 0 || c.MaxDials < 0 {
		errs = append(errs, fmt.Errorf("negative limit: %d connections, %d dials", c.MaxConns, c.MaxDials))
	}
	if c.DialTimeout < 0 {
		errs = append(errs, fmt.Errorf("negative dial timeout: %v", c.DialTimeout))
	}
	for _, rule := range c.Policy.Allow {
		if !rule.Prefix.IsValid() || len(rule.Ports) == 0 {
			errs = append(errs, errors.New("a rule without addresses or without ports"))
		}
	}
	return errors.Join(errs...)
}

// dialTCP dials without MPTCP: the relay wants a plain TCP socket, and so does whoever intercepts on this machine.
func dialTCP(ctx context.Context, target netip.AddrPort) (*net.TCPConn, error) {
	var d net.Dialer
	d.SetMultipathTCP(false)
	conn, err := d.DialContext(ctx, "tcp", target.String()) // DialTCP would say ":0->" in its errors
	if err != nil {
		return nil, err
	}
	return conn.(*net.TCPConn), nil
}
