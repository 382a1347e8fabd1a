// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
)

// conditions are what readiness is made of. One that waits to lead is as ready as the one that does.
func (c *controller) conditions() []admin.Condition {
	election, signer := c.leader.Stats(), c.signer.Stats()
	leader := admin.Condition{Name: "leader", OK: election.Error == "" && election.Leader != "", Reason: election.Error}
	if leader.Reason == "" && !leader.OK {
		leader.Reason = "nobody is known to lead"
	}
	certificates := admin.Condition{Name: "certificates", OK: true}
	switch {
	case !election.Leading:
	case signer.Error != "":
		certificates.OK, certificates.Reason = false, signer.Error
	case len(signer.CAs) == 0:
		certificates.OK, certificates.Reason = false, "the CA has not been read yet"
	}
	return []admin.Condition{leader, certificates, {Name: "accepting", OK: c.life.Err() == nil, Reason: "the controller is stopping"}}
}

func (c *controller) state() admin.State {
	conditions := c.conditions()
	election, signer := c.leader.Stats(), c.signer.Stats()
	view := &admin.ControllerStatus{Leading: election.Leading, Leader: election.Leader}
	if election.Leading {
		view.Waiting = signer.Waiting
		for _, ca := range signer.CAs {
			view.CAs = append(view.CAs, admin.CA{Subject: ca.Subject, Fingerprint: ca.Fingerprint, NotAfter: ca.NotAfter, Signs: ca == signer.Signer})
		}
	}
	return admin.State{Tunnels: []admin.Tunnel{}, Connections: []admin.Connection{}, Status: admin.Status{
		Role: admin.RoleController, Name: c.name, Version: cli.Version(), PID: os.Getpid(), Started: c.started,
		Ready: admin.AllOK(conditions), Conditions: conditions, Draining: c.life.Err() != nil, Controller: view,
	}}
}

// metrics are all metrics of the controller. They are pulled from the parts when somebody asks.
func (c *controller) metrics() []admin.Metric {
	election, signer := c.leader.Stats(), c.signer.Stats()
	leading, cas := 0, 0
	var expiry int64
	if election.Leading {
		leading, cas = 1, len(signer.CAs)
		if !signer.Signer.NotAfter.IsZero() {
			expiry = signer.Signer.NotAfter.Unix()
		}
	}
	return []admin.Metric{
		admin.Gauge("edge_tunnel_controller_leading", "1 if this process does the work, 0 if it waits.", leading),
		admin.Counter("edge_tunnel_controller_terms_total", "How often this process has begun to lead.", election.Terms),
		admin.Gauge("edge_tunnel_controller_requests_waiting", "Requests for certificates that wait to be decided.", signer.Waiting),
		admin.CounterBy("edge_tunnel_controller_certificates_signed_total", "Certificates signed, by signer.", "signer", signer.Signed),
		admin.CounterBy("edge_tunnel_controller_certificates_denied_total", "Requests for certificates denied, by reason.", "reason", signer.Denied),
		admin.Counter("edge_tunnel_controller_decisions_failed_total", "Attempts to decide a request that failed and are repeated.", signer.Failed),
		admin.Gauge("edge_tunnel_controller_cas", "CAs that agents and servers believe, while this process leads.", cas),
		admin.Gauge("edge_tunnel_controller_ca_expiry_timestamp_seconds", "When the CA that signs ends, in Unix time, while this process leads.", expiry),
		admin.Gauge("edge_tunnel_controller_clock_skew_seconds", "How far this machine's clock is ahead of the API server's.", c.skew.Ahead().Seconds()),
	}
}
