// SPDX-License-Identifier: Apache-2.0

//go:build !nokube

package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
	"github.com/edge-tunnel/edge-tunnel/pkg/kube"
)

// lookupOptions say where servers are looked up if no flag says where they are.
type lookupOptions struct {
	service  string // NAMESPACE/NAME
	stateDir string
}

const serverService = "kube-system/x-tunnel-server-svc"

func (o *lookupOptions) flags(fs *pflag.FlagSet) {
	o.service, o.stateDir = serverService, "/var/lib/edge-tunnel"
	fs.StringVar(&o.service, "server-service", o.service, "Without --server: `NAMESPACE/NAME` of the Service in Kubernetes that leads to tunnel-servers. Its load balancer is dialed, or the"+
		" address in its annotation "+kube.AnnotationExternalAddr+", or the nodes that servers run on: the first that leads in.")
	fs.StringVar(&o.stateDir, "state-dir", o.stateDir, "Keep in this `DIR` where servers were found, for starts without the API server.")
}

// possible says whether there is an API server to ask.
func (o *lookupOptions) possible(env cli.Env, kubeconfig string) bool {
	return kubeconfig != "" || env.Getenv("KUBERNETES_SERVICE_HOST") != ""
}

func (o *lookupOptions) validate(given bool) error {
	if given {
		if o.service != serverService {
			return cli.Usagef("--server-service cannot be given with --server")
		}
		return nil
	}
	var errs []error
	if namespace, name, ok := strings.Cut(o.service, "/"); !ok || namespace == "" || name == "" || strings.Contains(name, "/") {
		errs = append(errs, cli.WithHint(cli.Usagef("--server-service: %q is not NAMESPACE/NAME", o.service), "expected such as "+serverService))
	}
	if !filepath.IsAbs(o.stateDir) {
		errs = append(errs, cli.WithHint(cli.Usagef("--state-dir: %q is relative", o.stateDir), "expected a path that begins with /"))
	}
	return errors.Join(errs...)
}

// lookup finds servers in Kubernetes. Nil: they are given.
type lookup struct {
	servers *kube.Lookup
	service string
	changed chan struct{}
}

// newLookup returns nil if the servers are given.
func newLookup(env cli.Env, o options, log *slog.Logger) (*lookup, error) {
	if len(o.servers) > 0 {
		return nil, nil
	}
	if !o.cluster.On { // or it has done that
		kube.LogTo(log)
	}
	client, err := kube.NewClient(kube.ClientOptions{Kubeconfig: o.cluster.Kubeconfig, UserAgent: env.Name + "/" + cli.Version()})
	if err != nil {
		return nil, cli.WithHint(err, "outside of a pod, --kubeconfig says where the API server is")
	}
	namespace, name, _ := strings.Cut(o.lookup.service, "/")
	agent := o.cluster.Node
	if agent == "" {
		agent, _ = os.Hostname() // it is only to be another one on other machines
	}
	l := &lookup{service: o.lookup.service, changed: make(chan struct{}, 1)}
	l.servers = kube.NewLookup(kube.LookupConfig{
		Client: client, Namespace: namespace, Service: name, Dir: o.lookup.stateDir, Agent: agent, Log: log,
		Changed: func() {
			select {
			case l.changed <- struct{}{}:
			default:
			}
		},
	})
	return l, nil
}

// run tells where servers are each time that it is something new, until ctx ends.
func (l *lookup) run(ctx context.Context, set func([]string) error) error {
	if l == nil {
		return nil
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return l.servers.Run(ctx) })
	group.Go(func() error {
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-l.changed:
			}
			if err := set(l.ways()); err != nil {
				return err
			}
		}
	})
	return group.Wait()
}

// ways are the addresses that are known, the best first.
func (l *lookup) ways() []string { return l.servers.Known().Ways() }

// name is what a server's certificate has to say when it is dialed at an address.
func (l *lookup) name(addr string) string { return l.servers.Known().Name(addr) }

func (l *lookup) view() *admin.Lookup {
	if l == nil {
		return nil
	}
	s := l.servers.Stats()
	v := &admin.Lookup{Service: l.service, Stored: s.Stored, Problems: s.Problems, Since: s.Since, Disk: s.Disk}
	if s.Err != nil {
		v.Error = s.Err.Error()
	}
	return v
}

func (l *lookup) metrics() []admin.Metric {
	if l == nil {
		return nil
	}
	s := l.servers.Stats()
	stale, unsaved := 0.0, 0
	if s.Err != nil {
		stale = time.Since(s.Since).Seconds()
	}
	if s.Disk != "" {
		unsaved = 1
	}
	return []admin.Metric{
		admin.Gauge("edge_tunnel_agent_lookup_addresses", "Addresses at which servers are dialed that were found.", len(l.ways())),
		admin.Gauge("edge_tunnel_agent_lookup_stale_seconds", "Time since when servers cannot be looked up; 0 while they can.", stale),
		admin.Gauge("edge_tunnel_agent_lookup_problems", "What is wrong with what was looked up; the status says what.", len(s.Problems)),
		admin.Gauge("edge_tunnel_agent_lookup_unsaved", "1 if where servers are could not be kept on disk.", unsaved),
	}
}
