// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
	"github.com/edge-tunnel/edge-tunnel/cmd/internal/daemon"
	"github.com/edge-tunnel/edge-tunnel/cmd/internal/kubecert"
	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
	"github.com/edge-tunnel/edge-tunnel/pkg/deliver"
	"github.com/edge-tunnel/edge-tunnel/pkg/identity"
	"github.com/edge-tunnel/edge-tunnel/pkg/tunnel"
)

// app is the running agent as the admin address and the control socket see it. Everything in it is safe to be asked from
// several goroutines.
type app struct {
	options     options
	store       *identity.Store
	certificate *kubecert.Certificate
	lookup      *lookup // nil: servers are those of the options
	network     *network
	loopback    *loopback
	handler     *deliver.Handler
	agent       *tunnel.Agent
	life        context.Context // ends when the agent is to stop
	started     time.Time
}

// conditions are what readiness is made of.
func (a *app) conditions() []admin.Condition {
	return []admin.Condition{a.tunnelCondition(), daemon.CertificateCondition(a.store.Stats()), {
		Name: "accepting", OK: a.life.Err() == nil, Reason: "the agent is stopping",
	}}
}

func (a *app) tunnelCondition() admin.Condition {
	var problems []string
	for _, t := range a.agent.Tunnels() {
		switch {
		case t.ServerID != "" && t.State != "retired": // also while the next one is made
			return admin.Condition{Name: "tunnel", OK: true}
		case t.Server == "" && t.LastError != nil:
			problems = append(problems, t.LastError.Error())
		case t.LastError != nil:
			problems = append(problems, fmt.Sprintf("%s: %v", t.Server, t.LastError))
		default:
			problems = append(problems, t.Server+": connecting")
		}
	}
	return admin.Condition{Name: "tunnel", Reason: "no tunnel is up (" + strings.Join(problems, "; ") + ")"}
}

// servers are the addresses that are dialed.
func (a *app) servers() []string {
	if a.lookup != nil {
		return a.lookup.ways()
	}
	return a.options.servers
}

func (a *app) status() admin.Status {
	conditions := a.conditions()
	stats := a.store.Stats()
	rules := make([]string, len(a.options.allow))
	for i, r := range a.options.allow {
		rules[i] = r.String()
	}
	certificate := daemon.CertificateView(stats)
	a.certificate.Status(&certificate)
	return admin.Status{
		Role: admin.RoleAgent, Name: stats.Self.Name, Version: cli.Version(), PID: os.Getpid(), Started: a.started,
		Ready: admin.AllOK(conditions), Conditions: conditions, Draining: a.life.Err() != nil,
		Tunnels: a.agent.Stats().Tunnels, Connections: a.handler.Stats().Open,
		Certificate: certificate,
		Agent: &admin.AgentStatus{
			Servers: a.servers(), Lookup: a.lookup.view(), Addrs: a.network.addrs(), LocalhostPorts: a.loopback.ports(), Allow: rules,
			LocalhostConfig: a.loopback.view(),
		},
	}
}

func (a *app) tunnels() []admin.Tunnel {
	node := a.store.Self().Name
	var list []admin.Tunnel
	for _, t := range a.agent.Tunnels() {
		view := admin.Tunnel{
			Node: node, Server: t.ServerID, State: admin.TunnelUp, RemoteAddr: t.Remote, Since: t.Since, NotAfter: t.NotAfter,
			RTTSeconds: t.RTT.Seconds(), Streams: t.Streams, SentBytes: t.BytesOut, ReceivedBytes: t.BytesIn,
		}
		if t.ServerID == "" {
			view.Server = t.Server
		}
		switch {
		case t.ServerID != "": // also while the next one is made
		case t.State == "dialing":
			view.State = admin.TunnelConnecting
		case t.State == "waiting":
			view.State = admin.TunnelWaiting
			view.RetrySeconds = max(0, time.Until(t.RetryAt).Seconds())
		}
		if t.LastError != nil {
			view.Error = t.LastError.Error()
		}
		list = append(list, view)
	}
	return list
}

func (a *app) connections() []admin.Connection {
	node := a.store.Self().Name
	var list []admin.Connection
	for _, c := range a.handler.Connections() {
		list = append(list, admin.Connection{
			Trace: c.Trace, Node: node, Source: text(c.Src), Destination: text(c.Dst), Dialed: text(c.Dialed),
			Started: c.Since, DurationSeconds: time.Since(c.Since).Seconds(), SentBytes: c.Sent, ReceivedBytes: c.Received,
		})
	}
	return list
}

func (a *app) state() admin.State {
	return admin.State{Status: a.status(), Tunnels: a.tunnels(), Connections: a.connections()}
}

// text is the address, or nothing: the zero value's own text is "invalid AddrPort".
func text(ap netip.AddrPort) string {
	if !ap.IsValid() {
		return ""
	}
	return ap.String()
}
