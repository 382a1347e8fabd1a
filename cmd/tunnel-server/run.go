// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
	"github.com/edge-tunnel/edge-tunnel/cmd/internal/daemon"
	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
	"github.com/edge-tunnel/edge-tunnel/pkg/hostnet"
	"github.com/edge-tunnel/edge-tunnel/pkg/identity"
	"github.com/edge-tunnel/edge-tunnel/pkg/intercept"
	"github.com/edge-tunnel/edge-tunnel/pkg/redirect"
	"github.com/edge-tunnel/edge-tunnel/pkg/route"
	"github.com/edge-tunnel/edge-tunnel/pkg/tunnel"
	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

// moveTimeout is how long a server that stops goes on intercepting while its agents move to other servers.
const moveTimeout = 2 * time.Second

// run is the whole program: what it is made of, then what runs, then how it ends.
func run(ctx context.Context, env cli.Env) error {
	o, err := parse(env)
	if err != nil {
		return err
	}
	log := o.log.Logger(env.Stderr)
	ids, err := identity.Open(o.files, identity.Options{Role: identity.RoleServer, Log: log})
	if err != nil {
		return err
	}

	// The kernel's state has one owner at a time: everything that a predecessor may still hold comes after its lock.
	kernel, err := redirect.Open(ctx, redirect.Options{
		BPFFS: o.bpffs, CgroupRoot: o.cgroupRoot, RedirectPort: o.redirectPort, HostOnly: o.hostOnly, Log: log,
	})
	if err != nil {
		return err
	}
	defer kernel.Close()
	tunnelLn, err := daemon.Listen(ctx, "--listen-tunnel", o.listenTunnel)
	if err != nil {
		return err
	}
	defer tunnelLn.Close()
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

	// What is stored and what is pinned is in force, offline, before anything is attached.
	known, err := route.OpenKnown(o.stateDir, log)
	if err != nil {
		return cli.WithHint(err, "--state-dir must be a folder that this user can write")
	}
	host, err := hostnet.Read(ctx)
	if err != nil {
		return err
	}
	targets := newTargets(known, kernel, baseRules(o.cidrs), log)
	if err := kernel.SetPorts(o.ports); err != nil {
		return err
	}
	root, err := kernel.CgroupRoot()
	if err != nil {
		return err
	}
	optOut := &optOut{root: root, folders: o.optOut, set: kernel.SetOptOut, log: log}
	if err := optOut.apply(); err != nil {
		return err
	}

	var tunnels *tunnel.Server
	conns, err := intercept.New(intercept.Config{
		Origin: originOf(kernel),
		Canary: func(_ net.Conn, o intercept.Origin) bool { return isCanary(o.Dst.Addr()) },
		Lookup: targets.lookup,
		Open: func(ctx context.Context, node string, h wire.Header, _ intercept.Stream) (intercept.Stream, error) {
			return open(ctx, tunnels, node, h)
		},
		MaxConns: o.connections(),
		Logger:   log,
	})
	if err != nil {
		return err
	}
	defer conns.Close()
	tunnels, err = tunnel.NewServer(tunnel.ServerConfig{
		ID:        ids.Self().Name,
		TLS:       ids.ServerTLS(map[string]identity.Role{wire.ALPNAgent: identity.RoleAgent}),
		Authorize: authorize(ids),
		OnLogin:   func(id tunnel.Identity) error { return targets.login(id.Name, id.Addrs) },
		OnChange:  targets.online,
		Log:       log,
	})
	if err != nil {
		return err
	}

	network := &network{
		fixed: o.nodeIPs, loopback: kernel.HostAddrs(), log: log,
		redirects: &redirects{
			first: o.redirectPort, add: conns.Add, remove: conns.Remove,
			listen: func(ctx context.Context, addr netip.AddrPort) (net.Listener, error) { return kernel.Listen(ctx, addr) },
		},
		setAddrs: kernel.SetNodeAddrs,
		setRules: targets.setRules,
		rules:    baseRules(o.cidrs),
	}
	defer network.stop()
	network.changed(ctx, host)
	if err := network.err(); err != nil {
		return err
	}
	if err := targets.start(); err != nil {
		return err
	}
	if err := kernel.Attach(); err != nil {
		return err
	}
	guard := &guard{kernel: kernel, hostOnly: o.hostOnly, log: log}
	guard.look(ctx, true)

	// Life ends when somebody wants it to, which begins the drain; services end after it. The front is what a successor
	// needs for itself: it goes before the kernel's state is handed over.
	life, end := context.WithCancelCause(ctx)
	defer end(nil)
	s := &server{
		options: o, ids: ids, kernel: kernel, known: known, targets: targets, conns: conns, tunnels: tunnels,
		network: network, guard: guard, listen: tunnelLn.Addr(), life: life, started: time.Now(),
	}
	adminServer, err := admin.New(admin.Config{
		Name: env.Name, Version: cli.Version(), Ready: s.conditions, Metrics: s.metrics, State: s.state, Pprof: o.pprof, Log: log,
	})
	if err != nil {
		return err
	}
	control := admin.Control{
		Status: s.status, Targets: s.targets.snapshot, Tunnels: s.tunnelList, Connections: s.connectionList, Forget: s.forget, Log: log,
		Drain: func(context.Context) error {
			end(errors.New("asked to by the control socket"))
			return nil
		},
	}

	services, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	group, services := errgroup.WithContext(services)
	front, closeFront := context.WithCancel(services)
	defer closeFront()
	frontGroup, front := errgroup.WithContext(front)

	watcher := hostnet.Watcher{Changed: func(c hostnet.Change) { network.changed(front, c.State) }, Log: log}
	frontGroup.Go(func() error { return watcher.Run(front) })
	frontGroup.Go(func() error { return guard.run(front) })
	frontGroup.Go(func() error { return optOut.run(front) })
	frontGroup.Go(func() error { return targets.run(front) })
	frontGroup.Go(func() error { return known.Run(front) })
	frontGroup.Go(func() error { return adminServer.Serve(front, adminLn) })
	frontGroup.Go(func() error { return control.Serve(front, controlLn) })
	group.Go(func() error { return ids.Run(services) })
	group.Go(func() error { return tunnels.Serve(services, tunnelLn) })
	group.Go(func() error { daemon.Reload(services, env.Reload, ids, log); return nil })
	group.Go(func() error { recheck(services, ids, tunnels, log); return nil })
	group.Go(func() error {
		defer stop()
		select {
		case <-life.Done():
		case <-front.Done(): // one of the above failed
			return frontGroup.Wait()
		}
		return s.drain(services, func() error {
			closeFront()
			return frontGroup.Wait()
		}, log)
	})
	log.Info("started", "version", cli.Version(), "name", ids.Self().Name, "tunnels", tunnelLn.Addr().String(),
		"ports", o.ports, "known_nodes", known.Status().Nodes, "pins", kernel.Pins())
	return group.Wait()
}

// drain is the way out. Agents are asked to move while everything still works; then all that a successor needs is let
// go, the kernel's state last; then open connections get their time.
func (s *server) drain(ctx context.Context, closeFront func() error, log *slog.Logger) error {
	log.Info("stopping", "why", context.Cause(s.life), "connections", s.conns.Stats().Open)
	bound, cancel := context.WithTimeout(ctx, moveTimeout)
	if s.tunnels.Drain(bound) != nil {
		log.Info("some agents have not moved to another server", "waited", moveTimeout)
	}
	cancel()
	s.network.stop()
	err := closeFront()
	bound, cancel = context.WithTimeout(ctx, s.options.drainTimeout)
	defer cancel()
	s.conns.Stop()
	err = errors.Join(err, s.kernel.Close())
	log.Info("stopped", "reset", s.conns.Drain(bound))
	return err
}

// originOf adapts the kernel's answer.
func originOf(kernel *redirect.Kernel) func(*net.TCPConn) (intercept.Origin, error) {
	return func(conn *net.TCPConn) (intercept.Origin, error) {
		o, err := kernel.Origin(conn)
		if errors.Is(err, redirect.ErrNotIntercepted) {
			return intercept.Origin{}, intercept.ErrNotIntercepted
		}
		return intercept.Origin{Dst: o.Dst, PID: o.PID, UID: o.UID, Comm: o.Comm, Cgroup: o.Cgroup, Netns: o.Netns}, err
	}
}

// open opens a stream to a node's agent. There is one server, so a second try finds the node's newest tunnel.
func open(ctx context.Context, tunnels *tunnel.Server, node string, h wire.Header) (intercept.Stream, error) {
	stream, err := tunnels.Open(ctx, node)
	if err != nil {
		return nil, err
	}
	if err := intercept.WriteHeader(ctx, stream, h); err != nil {
		return nil, err
	}
	return stream, nil
}

// authorize takes a node's name and addresses from its certificate, and from nowhere else.
func authorize(ids *identity.Store) func(tls.ConnectionState) (tunnel.Identity, error) {
	return func(state tls.ConnectionState) (tunnel.Identity, error) {
		p, err := ids.Peer(state)
		if err != nil {
			return tunnel.Identity{}, err
		}
		return tunnel.Identity{Name: p.Name, Addrs: p.Addrs, Serial: p.Serial, NotAfter: p.NotAfter}, nil
	}
}

// isCanary reports whether a destination is one that only the canary connects to.
func isCanary(a netip.Addr) bool {
	for _, p := range baseRules(nil).Reserved {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// recheck judges the open tunnels again when certificates, CA bundle or deny file have changed.
func recheck(ctx context.Context, ids *identity.Store, tunnels *tunnel.Server, log *slog.Logger) {
	for {
		changed := ids.Changed()
		if n := tunnels.Recheck(); n > 0 {
			log.Warn("tunnels are no longer allowed and were dropped", "tunnels", n)
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		}
	}
}
