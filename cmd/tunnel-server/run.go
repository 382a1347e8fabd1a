// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"syscall"
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

// run is the whole program: what it is made of, then what runs, then how it ends.
func run(ctx context.Context, env cli.Env) error {
	o, err := parse(env)
	if err != nil {
		return err
	}
	log := o.log.Logger(env.Stderr)
	ids, err := identity.Open(o.files, identity.Options{Role: identity.RoleServer, Late: o.cluster.Late(), Log: log})
	if err != nil {
		return err
	}
	var kernel *redirect.Kernel // before anybody dials
	o.cluster.Control = func(network, address string, c syscall.RawConn) error {
		err := kernel.Bypass(network, address, c)
		if errors.Is(err, net.ErrClosed) { // we are on the way out, and the programs are our successor's
			return nil
		}
		return err
	}
	certificate, err := o.cluster.Start(env, identity.RoleServer, ids, log)
	if err != nil {
		return err
	}

	// The kernel's state has one owner at a time: everything that a predecessor may still hold comes after its lock.
	kernel, err = redirect.Open(ctx, redirect.Options{
		BPFFS: o.bpffs, CgroupRoot: o.cgroupRoot, RedirectPort: o.redirectPort, HostOnly: o.hostOnly, Log: log,
	})
	if errors.Is(err, redirect.ErrInUse) && ctx.Err() != nil {
		log.Info("stopped before the start", "why", context.Cause(ctx), "waited_for", err)
		return nil
	}
	if err != nil {
		return err
	}
	defer kernel.Close()
	warnOfEphemeralPorts(kernel, log)
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
	scrape, err := o.scrape.Open(ctx, env, o.kubeconfig, ids.Leaf, log)
	if err != nil {
		return err
	}
	defer scrape.Close()

	known, err := route.OpenKnown(o.stateDir, log)
	if err != nil {
		return cli.WithHint(err, "--state-dir must be a folder that this user can write")
	}
	host, err := hostnet.Read(ctx)
	if err != nil {
		return cli.WithHint(err, "the server must be allowed to open netlink sockets (AF_NETLINK)")
	}
	targets := newTargets(known, kernel, baseRules(o.cidrs), log)
	root, err := kernel.CgroupRoot()
	if err != nil {
		return err
	}
	optOut := &optOut{root: root, folders: o.optOut, set: kernel.SetOptOut, log: log}

	config := tunnel.ServerConfig{
		ID:        ids.Self().Name,
		Authorize: authorize(ids),
		OnLogin:   func(id tunnel.Identity) error { return targets.login(id.Name, id.Addrs) },
		OnChange:  targets.online,
		Log:       log,
	}
	roles := map[string]identity.Role{wire.ALPNAgent: identity.RoleAgent}
	var way *hop // nil without peers
	if len(o.peers) > 0 || o.kubernetes {
		peers := peersOf(ids, cli.VersionLine(env.Name), kernel.Bypass, log)
		if err := peers.Set(o.peers); err != nil {
			return err
		}
		way = newHop(peers, newOwners(peers, known.Names, targets.online), log)
		roles[wire.ALPNPeer] = identity.RoleServer
		config.OnChange, config.Forward, config.OnPeer = way.changed, way.forward, peers.Arrived
		config.Servers = func() int { return 1 + len(peers.Live()) }
	}
	refused := newRefusals(targets.refusals)
	config.OnRefused = refused.login
	config.TLS = ids.ServerTLS(roles)
	var cloud *cluster // nil without Kubernetes
	var further *ports // nil without a ConfigMap
	if o.kubernetes {
		client, err := newClient(env, o, o.cluster.Control, log)
		if err != nil {
			return err
		}
		cloud = newCluster(client, o, targets, log)
		further = newPorts(client, o, kernel.SetPorts, log)
		config.Authorize, config.OnLogin = cloud.welcome(config.Authorize), cloud.login
	}
	tunnels, err := tunnel.NewServer(config)
	if err != nil {
		return err
	}
	if way != nil {
		way.tunnels = tunnels
	}
	opened := admin.ConnectTimes()
	conns, err := intercept.New(intercept.Config{
		Origin:         originOf(kernel),
		Canary:         canaryOf(baseRules(nil)),
		Lookup:         targets.lookup,
		Open:           openerOf(tunnels, way),
		Opened:         opened.Observe,
		MaxConns:       o.connections(),
		MaxConnsPerPod: o.maxPerPod,
		Logger:         log,
	})
	if err != nil {
		return err
	}
	defer conns.Close()
	if cloud != nil {
		cloud.exclude = func(node string) {
			tunnels.Exclude(node)
			conns.Forget(node)
		}
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
	if cloud != nil {
		addr := func() string { return peerAddr(tunnelLn.Addr(), network.addrs()) }
		if way.registry, err = newRegistry(cloud, o, ids.Self().Name, way.peers, addr, refused.list, log); err != nil {
			return err
		}
		way.owners.hint = way.registry.Owner
	}
	defer network.stop()
	network.changed(ctx, host)
	if err := network.err(); err != nil {
		return err
	}

	// Life ends when somebody wants it to, which begins the drain; services end after it.
	life, end := context.WithCancelCause(ctx)
	defer end(nil)
	s := &server{
		options: o, ids: ids, certificate: certificate, kernel: kernel, known: known, targets: targets, conns: conns, opened: opened, tunnels: tunnels, hop: way, cluster: cloud, ports: further,
		network: network, guard: &guard{kernel: kernel, reopen: network.reopen, log: log}, listen: tunnelLn.Addr(), life: life, started: time.Now(),
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
		Leave: func(context.Context) error {
			end(errLeave)
			return nil
		},
	}

	// From here on the kernel changes, where a predecessor's programs may be in force. What is stored and what is pinned is in force, offline,
	// before anything is attached.
	first := o.ports
	if further != nil { // what the ConfigMap says is not known yet
		first = further.before(kernel.TunneledPorts())
	}
	if err := kernel.SetPorts(first); err != nil {
		return err
	}
	if err := optOut.apply(); err != nil {
		return err
	}
	if err := targets.start(); err != nil {
		return err
	}
	// The last step that can fail: a start that does leaves nothing behind, and one that replaces another no gap.
	if err := kernel.Attach(); err != nil {
		return err
	}
	s.guard.look(ctx, true)

	// The front is what a successor needs for itself: it goes before the kernel's state is handed over.
	services, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	group, services := errgroup.WithContext(services)
	front, closeFront := context.WithCancel(services)
	defer closeFront()
	frontGroup, front := errgroup.WithContext(front)

	watcher := hostnet.Watcher{Changed: func(c hostnet.Change) { network.changed(front, c.State) }, Log: log}
	frontGroup.Go(func() error { return watcher.Run(front) })
	frontGroup.Go(func() error { return s.guard.run(front) })
	frontGroup.Go(func() error { return optOut.run(front) })
	frontGroup.Go(func() error { return targets.run(front) })
	frontGroup.Go(func() error { return known.Run(front) })
	frontGroup.Go(func() error { return adminServer.Serve(front, adminLn) })
	frontGroup.Go(func() error { return scrape.Serve(front, adminServer) })
	frontGroup.Go(func() error { return control.Serve(front, controlLn) })
	if cloud != nil {
		frontGroup.Go(func() error { return cloud.nodes.Run(front) })
	}
	if further != nil {
		frontGroup.Go(func() error { return further.source.Run(front) })
	}
	group.Go(func() error { return ids.Run(services) })
	group.Go(func() error { return certificate.Run(services) })
	group.Go(func() error { return tunnels.Serve(services, tunnelLn) })
	group.Go(func() error { daemon.Reload(services, env.Reload, ids, log); return nil })
	group.Go(func() error { recheck(services, ids, tunnels, way, log); return nil })
	group.Go(func() error { tidyMemory(services); return nil })
	if way != nil {
		group.Go(func() error { return way.peers.Run(services) })
		group.Go(func() error { return way.owners.run(services) })
		if way.registry != nil {
			group.Go(func() error { return way.registry.Run(services) })
		}
	}
	log.Info("started", "version", cli.Version(), "name", ids.Self().Name, "tunnels", tunnelLn.Addr().String(),
		"admin", adminLn.Addr().String(), "ports", o.ports, "known_nodes", known.Status().Nodes, "pins", kernel.Pins())
	daemon.Notify(env.Getenv, daemon.Ready, log)
	group.Go(func() error {
		defer stop()
		select {
		case <-life.Done():
		case <-front.Done(): // one of the above failed
			return frontGroup.Wait()
		}
		daemon.Notify(env.Getenv, daemon.Stopping, log)
		log.Info("stopping", "why", context.Cause(life), "connections", conns.Stats().Open)
		var leave func() error
		if s.leaves(services, log) {
			leave = kernel.Leave
		}
		return s.drain(services, log, func() error {
			closeFront()
			return frontGroup.Wait()
		}, leave, kernel.Close)
	})
	err = group.Wait()
	if err == nil && errors.Is(context.Cause(life), errLeave) {
		return s.linger(ctx, adminServer, log)
	}
	return err
}
