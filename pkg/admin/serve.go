// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"golang.org/x/net/netutil"
)

const (
	maxConns  = 64          // at once, on each door
	maxHeader = 16 << 10    // bytes of a request's header
	maxBody   = 4 << 10     // bytes of a request's body
	grace     = time.Second // for requests in progress at the end
)

// serve answers on ln, with TLS if that is configured, until ctx ends. It closes ln and returns after the last goroutine has.
func serve(ctx context.Context, ln net.Listener, encrypted *tls.Config, handler http.Handler, writeTimeout time.Duration, log *slog.Logger) error {
	var conns sync.WaitGroup
	requests, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	server := &http.Server{
		Handler:     handler,
		BaseContext: func(net.Listener) context.Context { return requests },
		// Neither Shutdown nor Close waits for what runs; each connection has one goroutine between these states.
		ConnState: func(_ net.Conn, state http.ConnState) {
			switch state {
			case http.StateNew:
				conns.Add(1)
			case http.StateClosed:
				conns.Done()
			}
		},
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug), // strangers' mistakes
	}

	stopped := make(chan struct{})
	unwatch := context.AfterFunc(ctx, func() {
		defer close(stopped)
		limit, cancelLimit := context.WithTimeout(context.WithoutCancel(ctx), grace)
		defer cancelLimit()
		if server.Shutdown(limit) != nil {
			cancel() // a profile that still runs ends here
			_ = server.Close()
		}
	})
	ln = netutil.LimitListener(ln, maxConns)
	if encrypted != nil {
		ln = tls.NewListener(ln, encrypted)
	}
	err := server.Serve(ln)
	if unwatch() { // the listener failed by itself
		_ = server.Close()
	} else {
		<-stopped
	}
	cancel()
	conns.Wait()
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

func orDiscard(log *slog.Logger) *slog.Logger {
	if log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return log
}
