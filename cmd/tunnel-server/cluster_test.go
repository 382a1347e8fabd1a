// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"reflect"
	"strings"
	"testing"

	"github.com/edge-tunnel/edge-tunnel/pkg/kube"
	"github.com/edge-tunnel/edge-tunnel/pkg/route"
	"github.com/edge-tunnel/edge-tunnel/pkg/tunnel"
	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

// clusterSteps is a cluster whose orders are noted.
type clusterSteps struct {
	*cluster
	known map[string]struct{}
	steps []string
}

func newClusterSteps(connected bool) *clusterSteps {
	c := &clusterSteps{known: make(map[string]struct{})}
	c.cluster = &cluster{connected: connected, targets: c, log: slog.New(slog.DiscardHandler), met: make(map[string]struct{})}
	c.exclude = func(node string) { c.note("exclude %s", node) }
	return c
}

func (c *clusterSteps) note(format string, args ...any) {
	c.steps = append(c.steps, fmt.Sprintf(format, args...))
}

func (c *clusterSteps) replace(claims []route.Claim, cluster route.Rules) (gone []string) {
	was := c.known
	c.known = make(map[string]struct{})
	text := ""
	for _, claim := range claims {
		text += " " + claim.Node
		c.known[claim.Node] = struct{}{}
		delete(was, claim.Node)
	}
	c.note("replace%s, servers %v", text, cluster.Servers)
	for name := range was {
		gone = append(gone, name)
	}
	return gone
}

func (c *clusterSteps) settle(context.Context) error { c.note("settle"); return nil }

func (c *clusterSteps) want(t *testing.T, steps ...string) {
	t.Helper()
	if !reflect.DeepEqual(c.steps, steps) {
		t.Errorf("%s\nwant\n%s", strings.Join(c.steps, "\n"), strings.Join(steps, "\n"))
	}
	c.steps = nil
}

func tunneled(names ...string) kube.NodesState {
	s := kube.NodesState{Rules: route.Rules{Servers: targetAddrs("10.0.0.1")}}
	for i, name := range names {
		s.Tunneled = append(s.Tunneled, route.Claim{Node: name, Addrs: targetAddrs(fmt.Sprintf("10.1.0.%d", i+1))})
	}
	return s
}

// A node that leaves is intercepted no longer before its tunnel goes, and is not let in again; one that comes back is.
func TestNodeLeavesTheCluster(t *testing.T) {
	c := newClusterSteps(false)
	authorize := c.welcome(func(tls.ConnectionState) (tunnel.Identity, error) { return tunnel.Identity{Name: "b"}, nil })
	allowed := func(alpn string) bool {
		_, err := authorize(tls.ConnectionState{NegotiatedProtocol: alpn})
		if err != nil && err.(interface{ Reason() string }).Reason() != "not_tunneled" {
			t.Error(err)
		}
		return err == nil
	}
	if !allowed(wire.ALPNAgent) {
		t.Error("refused before the cluster was seen")
	}
	c.changed(t.Context(), tunneled("a", "b"))
	c.want(t, "replace a b, servers [10.0.0.1]")
	if !allowed(wire.ALPNAgent) {
		t.Error("a tunneled node was refused")
	}
	c.changed(t.Context(), tunneled("a"))
	c.want(t, "replace a, servers [10.0.0.1]", "settle", "exclude b")
	if allowed(wire.ALPNAgent) {
		t.Error("a node that is not tunneled was let in")
	}
	if !allowed(wire.ALPNPeer) {
		t.Error("a server was taken for an agent")
	}
	c.changed(t.Context(), tunneled("a", "b"))
	if !allowed(wire.ALPNAgent) {
		t.Error("a node that came back was refused")
	}
	if err := c.login(tunnel.Identity{Name: "b", Addrs: targetAddrs("10.9.9.9")}); err != nil {
		t.Error(err)
	}
	c.want(t, "replace a b, servers [10.0.0.1]") // and not for the login
}

// What the server remembers of nodes that are gone when it starts is dropped by the first whole list, and not before.
func TestRememberedNodeIsGone(t *testing.T) {
	c := newClusterSteps(false)
	c.known["old"] = struct{}{}
	c.changed(t.Context(), tunneled("a"))
	c.want(t, "replace a, servers [10.0.0.1]", "settle", "exclude old")
}

// --intercept-nodes connected
func TestOnlyConnectedNodes(t *testing.T) {
	c := newClusterSteps(true)
	login := func(name string) {
		t.Helper()
		if err := c.login(tunnel.Identity{Name: name}); err != nil {
			t.Error(err)
		}
	}
	login("a") // before the cluster was seen
	c.want(t)
	c.changed(t.Context(), tunneled("a", "b", "c"))
	c.want(t, "replace a, servers [10.0.0.1]")
	login("b")
	c.want(t, "replace a b, servers [10.0.0.1]")
	login("b") // once more
	c.want(t)
	c.changed(t.Context(), tunneled("a", "b", "c", "d"))
	c.want(t, "replace a b, servers [10.0.0.1]")
}
