// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
	"github.com/edge-tunnel/edge-tunnel/cmd/internal/daemon"
	"github.com/edge-tunnel/edge-tunnel/cmd/internal/kubecert"
	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
	"github.com/edge-tunnel/edge-tunnel/pkg/identity"
	"github.com/edge-tunnel/edge-tunnel/pkg/intercept"
	"github.com/edge-tunnel/edge-tunnel/pkg/redirect"
	"github.com/edge-tunnel/edge-tunnel/pkg/route"
	"github.com/edge-tunnel/edge-tunnel/pkg/tunnel"
)

// server is the running daemon as the admin address and the control socket see it. Everything in it is safe to be asked from
// several goroutines.
type server struct {
	options     options
	ids         *identity.Store
	certificate *kubecert.Certificate
	kernel      kernelView
	known       *route.Known
	targets     *targets
	conns       *intercept.Server
	opened      *admin.Durations // how long it took to open connections
	tunnels     *tunnel.Server
	hop         *hop     // nil without peers
	cluster     *cluster // nil without Kubernetes
	ports       *ports   // nil without a ConfigMap
	network     *network
	guard       *guard
	listen      net.Addr        // where tunnels come in
	life        context.Context // ends when the server is to stop
	started     time.Time
}

// kernelView is what there is to see of [redirect.Kernel].
type kernelView interface {
	RedirectPorts() []uint16
	TunneledPorts() []uint16
	Missing() []string
	Pins() string
	Stats() (redirect.Counters, error)
}

// condition is true if there is no error.
func condition(name string, err error) admin.Condition {
	c := admin.Condition{Name: name, OK: err == nil}
	if err != nil {
		c.Reason = strings.ReplaceAll(err.Error(), "\n", "; ")
	}
	return c
}

// conditions are what readiness is made of: that what should be intercepted is, and is proven to be.
func (s *server) conditions() []admin.Condition {
	g := s.guard.state()
	var stopping error
	if s.life.Err() != nil {
		stopping = errors.New("the server is stopping")
	}
	return []admin.Condition{
		condition("programs", g.hooks),
		condition("canary", g.canary()),
		condition("pods", g.pods),
		condition("listeners", s.network.err()),
		s.targets.condition(),
		daemon.CertificateCondition(s.ids.Stats()),
		condition("accepting", stopping),
	}
}

func (s *server) status() admin.Status {
	conditions := s.conditions()
	stats := s.ids.Stats()
	mode := "all"
	if s.options.hostOnly {
		mode = "host"
	}
	var peers []string
	if s.hop != nil {
		peers = s.hop.peers.Live()
	}
	var cluster *admin.Cluster
	if s.cluster != nil {
		cluster = s.cluster.view()
	}
	certificate := daemon.CertificateView(stats)
	s.certificate.Status(&certificate)
	return admin.Status{
		Role: admin.RoleServer, Name: stats.Self.Name, Version: cli.Version(), PID: os.Getpid(), Started: s.started,
		Ready: admin.AllOK(conditions), Conditions: conditions, Draining: s.life.Err() != nil,
		Tunnels: s.tunnels.Stats().Active, Connections: s.conns.Stats().Open,
		Certificate: certificate,
		Server: &admin.ServerStatus{
			Listen: s.listen.String(), Intercept: mode, NodeAddrs: s.network.addrs(),
			RedirectPorts: s.kernel.RedirectPorts(), TunneledPorts: s.kernel.TunneledPorts(),
			Peers: peers, Targets: s.targets.counts(), Cluster: cluster, PortsConfig: s.ports.view(), Hooks: s.hooks(), Missing: s.kernel.Missing(), Pins: s.kernel.Pins(),
		},
	}
}

// hooks lists our programs, each with its neighbours.
func (s *server) hooks() []admin.Hook {
	programs := s.guard.state().programs
	var list []admin.Hook
	for _, name := range redirect.Hooks() {
		h := admin.Hook{Name: name}
		for _, p := range programs {
			switch {
			case p.Hook != name:
			case p.Ours:
				h.Attached, h.Program, h.Link = true, p.ID, p.Link
			default:
				h.Others = append(h.Others, fmt.Sprintf("%s (id %d)", p.Name, p.ID))
			}
		}
		list = append(list, h)
	}
	return list
}

func (s *server) tunnelList() []admin.Tunnel {
	self := s.ids.Self().Name
	var list []admin.Tunnel
	for _, t := range s.tunnels.Tunnels() {
		view := admin.Tunnel{
			Node: t.Node, Server: self, State: admin.TunnelUp, RemoteAddr: t.Remote, Instance: t.Instance, Software: t.Software,
			Since: t.Since, NotAfter: t.NotAfter, RTTSeconds: t.RTT.Seconds(), Streams: t.Streams,
			SentBytes: t.BytesOut, ReceivedBytes: t.BytesIn,
		}
		if t.Duplicate {
			view.Error = "duplicate_identity: several agents use this node's certificate"
		}
		list = append(list, view)
	}
	if s.hop == nil {
		return list
	}
	for _, t := range s.hop.peers.Tunnels() {
		view := admin.Tunnel{
			Peer: true, Server: cmp.Or(t.ServerID, t.Server), State: admin.TunnelUp, RemoteAddr: t.Remote, Since: t.Since, NotAfter: t.NotAfter,
			RTTSeconds: t.RTT.Seconds(), Streams: t.Streams, SentBytes: t.BytesOut, ReceivedBytes: t.BytesIn,
		}
		if t.ServerID == "" {
			view.State = admin.TunnelConnecting
			if t.State == "waiting" {
				view.State, view.RetrySeconds = admin.TunnelWaiting, max(0, time.Until(t.RetryAt).Seconds())
			}
			if t.LastError != nil {
				view.Error = t.LastError.Error()
			}
		}
		list = append(list, view)
	}
	return list
}

func (s *server) connectionList() []admin.Connection {
	open := s.conns.Connections()
	list := make([]admin.Connection, 0, len(open))
	for _, c := range open {
		list = append(list, admin.Connection{
			Trace: c.Trace, Node: c.Node, Source: c.Src.String(), Destination: c.Dst.String(), Started: c.Since,
			DurationSeconds: time.Since(c.Since).Seconds(), SentBytes: c.Sent, ReceivedBytes: c.Received,
			PID: c.PID, UID: &c.UID, Comm: c.Comm, Cgroup: c.Cgroup,
		})
	}
	return list
}

func (s *server) state() admin.State {
	return admin.State{Status: s.status(), Targets: s.targets.snapshot(), Tunnels: s.tunnelList(), Connections: s.connectionList()}
}

// forget drops a node: its targets, what is stored, and its tunnel, with which its open connections go. The tunnel last: an agent that
// still lives logs in again at once, and is then known again.
func (s *server) forget(ctx context.Context, node string) (admin.Forgotten, error) {
	gone, known, err := s.targets.forget(ctx, node)
	s.tunnels.Forget(node)
	s.conns.Forget(node)
	if err != nil {
		return admin.Forgotten{}, err
	}
	if !known {
		return admin.Forgotten{}, admin.ErrUnknownNode
	}
	return admin.Forgotten{Node: node, Targets: gone}, nil
}
