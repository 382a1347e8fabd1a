// SPDX-License-Identifier: Apache-2.0

// Package daemon is what tunnel-server and tunnel-agent do alike: open their own listeners, read certificates again when they
// are asked to, and say how those are. It keeps nothing and starts nothing.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"syscall"
	"time"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
	"github.com/edge-tunnel/edge-tunnel/pkg/identity"
)

// Listen opens one of the daemon's own TCP listeners; flag is the one that says where, for the user.
func Listen(ctx context.Context, flag, address string) (net.Listener, error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false) // plain sockets: nothing here needs more
	ln, err := lc.Listen(ctx, "tcp", address)
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, cli.WithHint(fmt.Errorf("%s: %s is in use", flag, address),
			"is it running already? ss -ltnp shows who has the port, and "+flag+" chooses another")
	case err != nil:
		return nil, cli.WithHint(fmt.Errorf("%s: %w", flag, err), "it needs an address of this host")
	}
	return ln, nil
}

// Reload reads certificates and deny file each time that asked says so (SIGHUP), until ctx ends. What cannot be read keeps its last
// good state.
func Reload(ctx context.Context, asked <-chan struct{}, store *identity.Store, log *slog.Logger) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-asked:
		}
		if err := store.Reload(); err != nil {
			log.Error("reload failed, the last good files stay in use", "err", err)
		} else {
			log.Info("reloaded")
		}
	}
}

// OpenFiles is the limit of open files, or fallback if the kernel does not say.
func OpenFiles(fallback uint64) uint64 {
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
		return fallback
	}
	return files.Cur
}

// CertificateCondition is the part of readiness that the daemon's own certificate is.
func CertificateCondition(stats identity.Stats) admin.Condition {
	c := admin.Condition{Name: "certificate"}
	switch {
	case stats.Self.NotAfter.IsZero():
		c.Reason = "there is none yet"
	case time.Now().After(stats.Self.NotAfter):
		c.Reason = "expired on " + stats.Self.NotAfter.Format(time.DateTime)
	case stats.Untrusted != "":
		c.Reason = stats.Untrusted
	default:
		c.OK = true
	}
	return c
}

// CertificateView is the daemon's own certificate, and why its files could not be loaded again if that is so.
func CertificateView(stats identity.Stats) admin.Certificate {
	var errs []string
	for _, set := range stats.Sets {
		if set.Error != "" {
			errs = append(errs, set.Error)
		}
	}
	return admin.Certificate{
		Name: stats.Self.Name, Serial: stats.Self.Serial, NotAfter: stats.Self.NotAfter, Error: strings.Join(errs, "; "),
	}
}

// CertificateExpiry is when the daemon's own certificate ends, in Unix time; 0 if there is none yet.
func CertificateExpiry(stats identity.Stats) int64 {
	if stats.Self.NotAfter.IsZero() {
		return 0
	}
	return stats.Self.NotAfter.Unix()
}

// LoadFailures counts loads of certificates, CA bundles and deny files that failed.
func LoadFailures(stats identity.Stats) uint64 {
	var n uint64
	for _, set := range stats.Sets {
		n += set.Failures
	}
	return n
}
