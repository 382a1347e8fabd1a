// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/tls"
	"log/slog"
	"slices"
	"sync"
	"syscall"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
	"github.com/edge-tunnel/edge-tunnel/pkg/kube"
	"github.com/edge-tunnel/edge-tunnel/pkg/route"
	"github.com/edge-tunnel/edge-tunnel/pkg/tunnel"
	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

// cluster has the Node objects of Kubernetes say what agents' certificates say otherwise: which nodes are tunneled, and at which addresses.
// Until they have been listed once, whole, what is stored and pinned stays in force, and every agent with a certificate is welcome.
type cluster struct {
	client    kube.Client
	nodes     *kube.Nodes
	connected bool // a node is a target from its agent's first login on, not before
	targets   interface {
		replace(claims []route.Claim, cluster route.Rules) (gone []string)
		settle(context.Context) error
	}
	exclude func(node string) // drops a node's tunnels, and what is counted about it
	log     *slog.Logger

	mu    sync.Mutex // guards what follows, and calls of replace
	state kube.NodesState
	named map[string]struct{} // tunneled nodes of the state; nil: there has been none
	met   map[string]struct{} // nodes whose agents have logged in, ever; only kept if connected
}

// notTunneled is why a login is refused.
type notTunneled struct{ node string }

func (e notTunneled) Error() string {
	return "the Node " + e.node + " is not there, or its labels say that it is reached without a tunnel"
}

func (notTunneled) Reason() string { return "not_tunneled" }

// newClient makes a client of the API server, whose own connections are not intercepted: what claims its address must not cut us off.
func newClient(env cli.Env, o options, control func(string, string, syscall.RawConn) error, log *slog.Logger) (kube.Client, error) {
	kube.LogTo(log)
	client, err := kube.NewClient(kube.ClientOptions{Kubeconfig: o.kubeconfig, UserAgent: cli.VersionLine(env.Name), Control: control})
	if err != nil {
		return nil, cli.WithHint(err, "in a pod the ServiceAccount's token is needed, elsewhere --kubeconfig FILE")
	}
	return client, nil
}

// newCluster makes one that lacks exclude.
func newCluster(client kube.Client, o options, targets *targets, log *slog.Logger) *cluster {
	c := &cluster{client: client, connected: o.connected, targets: targets, log: log, met: make(map[string]struct{})}
	if c.connected {
		for _, name := range targets.known.Names() {
			c.met[name] = struct{}{}
		}
	}
	c.nodes = kube.NewNodes(kube.NodesConfig{Client: client, Edge: o.edge, Self: o.nodeName, Services: o.services, Changed: c.changed, Log: log})
	return c
}

// changed puts a state of the cluster into force.
func (c *cluster) changed(ctx context.Context, state kube.NodesState) {
	named := make(map[string]struct{}, len(state.Tunneled))
	for _, claim := range state.Tunneled {
		named[claim.Node] = struct{}{}
	}
	c.mu.Lock()
	was := c.named
	c.state, c.named = state, named
	gone := c.apply()
	c.mu.Unlock()
	for name := range was {
		if _, still := named[name]; !still {
			gone = append(gone, name)
		}
	}
	if len(gone) == 0 {
		return
	}
	slices.Sort(gone)
	gone = slices.Compact(gone)
	// First nobody is sent there any more. If the kernel does not take it, the tunnels go all the same.
	ctx, cancel := context.WithTimeout(ctx, forgetTimeout)
	defer cancel()
	if err := c.targets.settle(ctx); err != nil {
		c.log.Error("nodes that left are still intercepted", "nodes", len(gone), "err", err)
	}
	for _, name := range gone {
		c.exclude(name)
	}
	c.log.Info("nodes are not tunneled any more", "nodes", gone[:min(len(gone), maxReportsPerBuild)], "number", len(gone))
}

// apply needs mu.
func (c *cluster) apply() (gone []string) {
	claims := c.state.Tunneled
	if c.connected {
		claims = slices.DeleteFunc(slices.Clone(claims), func(claim route.Claim) bool {
			_, met := c.met[claim.Node]
			return !met
		})
	}
	return c.targets.replace(claims, c.state.Rules)
}

// welcome adds to authorize that an agent's node has to be tunneled, once that is known.
func (c *cluster) welcome(authorize func(tls.ConnectionState) (tunnel.Identity, error)) func(tls.ConnectionState) (tunnel.Identity, error) {
	return func(state tls.ConnectionState) (tunnel.Identity, error) {
		id, err := authorize(state)
		if err != nil || state.NegotiatedProtocol != wire.ALPNAgent {
			return id, err
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		if _, tunneled := c.named[id.Name]; c.named != nil && !tunneled {
			return id, notTunneled{id.Name}
		}
		return id, nil
	}
}

// login notes that a node's agent is there. What its certificate says about addresses does not count.
func (c *cluster) login(id tunnel.Identity) error {
	if !c.connected {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, met := c.met[id.Name]; !met {
		c.met[id.Name] = struct{}{}
		if c.named != nil {
			c.apply()
		}
	}
	return nil
}

func (c *cluster) view() *admin.Cluster {
	s := c.nodes.Status()
	v := &admin.Cluster{Complete: s.Complete, Nodes: s.Nodes, Since: s.Since}
	if s.Err != nil {
		v.Error = s.Err.Error()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	v.Tunneled = len(c.named)
	return v
}
