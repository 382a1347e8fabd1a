// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
	"github.com/edge-tunnel/edge-tunnel/cmd/internal/daemon"
	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
	"github.com/edge-tunnel/edge-tunnel/pkg/kube"
)

// controller is the running program as the admin address sees it.
type controller struct {
	name      string
	skew      *kube.Skew
	leader    *kube.Leader
	signer    *kube.Signer
	publisher *kube.Publisher
	records   string          // NAMESPACE/NAME
	life      context.Context // ends when it is to stop
	started   time.Time
}

// lead is what one of several processes does.
func (c *controller) lead(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return c.signer.Run(ctx) })
	group.Go(func() error { return c.publisher.Run(ctx) })
	return group.Wait()
}

// run is the whole program. Only SIGTERM ends it: a leadership that is lost is waited for again.
func run(ctx context.Context, env cli.Env) error {
	o, err := parse(env)
	if err != nil {
		return err
	}
	log := o.log.Logger(env.Stderr)
	kube.LogTo(log)
	c := &controller{skew: &kube.Skew{}, records: o.records, life: ctx, started: time.Now()}
	host, err := os.Hostname()
	if err != nil {
		return fmt.Errorf("find own name: %w", err)
	}
	c.name = host + "_" + rand.Text()[:8] // a pod's name is its host's; a process that is started again is another one
	client, err := kube.NewClient(kube.ClientOptions{
		Kubeconfig: o.kubeconfig, UserAgent: env.Name + "/" + cli.Version(), QPS: 50, Wrap: c.skew.Wrap,
	})
	if err != nil {
		return cli.WithHint(err, "outside of a pod, --kubeconfig says where the API server is")
	}
	c.signer, err = kube.NewSigner(kube.SignerConfig{
		Client: client, Namespace: o.namespace, Secret: o.secret, Trust: o.trust, Service: o.service, Agent: o.agent, Server: o.server,
		CA: o.ca, Skew: c.skew.Ahead, Log: log,
	})
	if err != nil {
		return err
	}
	namespace, name, _ := strings.Cut(o.records, "/")
	c.publisher, err = kube.NewPublisher(kube.PublisherConfig{
		Client: client, Component: env.Name, Self: o.nodeName, RecordsNamespace: namespace, RecordsName: name, Leases: o.leases,
		Status: o.status, Edge: o.edge, Log: log,
	})
	if err != nil {
		return err
	}
	c.leader, err = kube.NewLeader(kube.LeaderConfig{Client: client, Namespace: o.namespace, Name: o.lease, Identity: c.name, Log: log})
	if err != nil {
		return err
	}
	adminLn, err := daemon.Listen(ctx, "--admin", o.admin)
	if err != nil {
		return err
	}
	defer adminLn.Close()
	scrape, err := o.scrape.Open(ctx, env, o.kubeconfig, nil, log)
	if err != nil {
		return err
	}
	defer scrape.Close()
	adminServer, err := admin.New(admin.Config{
		Name: env.Name, Version: cli.Version(), Ready: c.conditions, Metrics: c.metrics, State: c.state, Pprof: o.pprof, Log: log,
	})
	if err != nil {
		return err
	}

	// The admin address answers until the lease has been given back.
	services, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	group, services := errgroup.WithContext(services)
	group.Go(func() error { return adminServer.Serve(services, adminLn) })
	group.Go(func() error { return scrape.Serve(services, adminServer) })
	group.Go(func() error {
		defer stop()
		both, cancel := context.WithCancel(ctx)
		defer cancel()
		defer context.AfterFunc(services, cancel)()
		return c.leader.Run(both, c.lead)
	})
	log.Info("started", "version", cli.Version(), "name", c.name, "namespace", o.namespace, "admin", adminLn.Addr().String())
	err = group.Wait()
	log.Info("stopped", "why", context.Cause(ctx))
	return err
}
