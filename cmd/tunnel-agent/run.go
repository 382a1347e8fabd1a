// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
	"github.com/edge-tunnel/edge-tunnel/cmd/internal/daemon"
	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
	"github.com/edge-tunnel/edge-tunnel/pkg/deliver"
	"github.com/edge-tunnel/edge-tunnel/pkg/identity"
	"github.com/edge-tunnel/edge-tunnel/pkg/tunnel"
	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

// run is the whole program: what it is made of, then what runs, then how it ends.
func run(ctx context.Context, env cli.Env) error {
	o, err := parse(env)
	if err != nil {
		return err
	}
	log := o.log.Logger(env.Stderr)

	store, err := identity.Open(o.files, identity.Options{Role: identity.RoleAgent, Late: o.cluster.Late(), Log: log})
	if err != nil {
		return err
	}
	certificate, err := o.cluster.Start(env, identity.RoleAgent, store, log)
	if err != nil {
		return err
	}
	lookup, err := newLookup(env, o, log)
	if err != nil {
		return err
	}
	network := newNetwork(log)
	if err := network.look(ctx); err != nil {
		return err
	}
	loopback := newLoopback(o.loopbackPorts, o.configDir, log)
	adminLn, err := daemon.Listen(ctx, "--admin", o.admin)
	if err != nil {
		return err
	}
	defer adminLn.Close()
	controlLn, err := admin.ListenControl(ctx, o.control)
	if err != nil {
		return err
	}
	defer controlLn.Close()
	scrape, err := o.scrape.Open(ctx, env, o.cluster.Kubeconfig, nil, log) // no server's certificate: it is for logins only
	if err != nil {
		return err
	}
	defer scrape.Close()

	conns := maxConns()
	handler, err := deliver.New(deliver.Config{
		Policy: deliver.Policy{
			Own:         network.has,
			Loopback:    loopback.has,
			Allow:       o.allow,
			ClosedPorts: []uint16{adminLn.Addr().(*net.TCPAddr).AddrPort().Port()},
		},
		MaxConns: conns,
		Logger:   log,
	})
	if err != nil {
		return err
	}
	defer handler.Close()
	servers := o.servers
	name := func(server string) string {
		host, _, _ := net.SplitHostPort(server) // the flag's parser has made it HOST:PORT
		return host
	}
	if lookup != nil {
		servers, name = lookup.ways(), lookup.name
	}
	agent, err := tunnel.NewAgent(tunnel.AgentConfig{
		Servers: servers,
		Ways:    lookup != nil,
		Tunnels: o.tunnels,
		TLS:     func(server string) *tls.Config { return store.ClientTLS(name(server), wire.ALPNAgent) },
		Verify: func(state tls.ConnectionState) error {
			_, err := store.Peer(state)
			return err
		},
		Handle: func(ctx context.Context, s *tunnel.Stream, h wire.Header) {
			handler.Handle(ctx, s.RemoteAddr().String(), s, h)
		},
		Software:   env.Name + " " + cli.Version(),
		Wake:       network.wake,
		MaxStreams: conns + 256, // so that there are some left to say "overloaded" in
		Log:        log,
	})
	if err != nil {
		return err
	}

	// Life ends when somebody wants it to, which begins the drain; services end after it.
	life, end := context.WithCancelCause(ctx)
	defer end(nil)
	a := &app{options: o, store: store, certificate: certificate, lookup: lookup, network: network, loopback: loopback, handler: handler, agent: agent, life: life, started: time.Now()}
	adminServer, err := admin.New(admin.Config{
		Name: env.Name, Version: cli.Version(), Ready: a.conditions, Metrics: a.metrics, State: a.state, Pprof: o.pprof, Log: log,
	})
	if err != nil {
		return err
	}
	control := admin.Control{
		Status: a.status, Tunnels: a.tunnels, Connections: a.connections, Log: log,
		Drain: func(context.Context) error {
			end(errors.New("asked to by the control socket"))
			return nil
		},
	}

	services, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	group, services := errgroup.WithContext(services)
	group.Go(func() error { return store.Run(services) })
	group.Go(func() error { return certificate.Run(services) })
	group.Go(func() error { return lookup.run(services, agent.SetServers) })
	group.Go(func() error { return network.run(services) })
	group.Go(func() error { loopback.run(services); return nil })
	group.Go(func() error { return agent.Run(services) })
	group.Go(func() error { return adminServer.Serve(services, adminLn) })
	group.Go(func() error { return scrape.Serve(services, adminServer) })
	group.Go(func() error { return control.Serve(services, controlLn) })
	group.Go(func() error { daemon.Reload(services, env.Reload, store, log); return nil })
	group.Go(func() error { renew(services, store, agent); return nil })
	group.Go(func() error {
		defer stop()
		select {
		case <-life.Done():
		case <-services.Done(): // one of the above failed
			return nil
		}
		log.Info("stopping", "why", context.Cause(life), "open", handler.Stats().Open)
		bound, cancel := context.WithTimeout(services, o.drainTimeout)
		defer cancel()
		log.Info("stopped", "reset", handler.Drain(bound))
		return nil
	})
	log.Info("started", "version", cli.Version(), "node", store.Self().Name, "servers", a.servers(), "admin", adminLn.Addr().String())
	return group.Wait()
}

// maxConns is how many connections the limit of open files has room for: one each, and a quarter for everything else.
func maxConns() int {
	const most = 8192
	return int(max(16, min(most, daemon.OpenFiles(most)*3/4)))
}

// renew has the tunnels judged and made again when certificates or deny file have changed.
func renew(ctx context.Context, store *identity.Store, agent *tunnel.Agent) {
	for changed := store.Changed(); ; {
		select {
		case <-ctx.Done():
			return
		case <-changed:
		}
		changed = store.Changed()
		agent.Renew()
	}
}
