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
	conditions := []admin.Condition{leader, certificates}
	published := c.publisher.Stats()
	parts := []struct{ name, problem string }{{"cluster", published.Error}}
	if published.Records != nil {
		parts = append(parts, struct{ name, problem string }{"records", published.Records.Error})
	}
	if published.Status != nil {
		parts = append(parts, struct{ name, problem string }{"node_status", published.Status.Error})
	}
	for _, part := range parts {
		condition := admin.Condition{Name: part.name, OK: true}
		if election.Leading && part.problem != "" {
			condition.OK, condition.Reason = false, part.problem
		}
		conditions = append(conditions, condition)
	}
	return append(conditions, admin.Condition{Name: "accepting", OK: c.life.Err() == nil, Reason: "the controller is stopping"})
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
	if r := c.publisher.Stats().Records; election.Leading && r != nil {
		view.Records = &admin.Records{ConfigMap: c.records, Records: r.Records, SizeBytes: r.Bytes, MaxBytes: r.Limit, LeftOut: r.LeftOut, Error: r.Error}
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
	published := c.publisher.Stats()
	metrics := []admin.Metric{
		admin.Gauge("edge_tunnel_controller_leading", "1 if this process does the work, 0 if it waits.", leading),
		admin.Counter("edge_tunnel_controller_terms_total", "How often this process has begun to lead.", election.Terms),
		admin.Gauge("edge_tunnel_controller_requests_waiting", "Requests for certificates that wait to be decided.", signer.Waiting),
		admin.CounterBy("edge_tunnel_controller_certificates_signed_total", "Certificates signed, by signer.", "signer", signer.Signed),
		admin.CounterBy("edge_tunnel_controller_certificates_denied_total", "Requests for certificates denied, by reason.", "reason", signer.Denied),
		admin.Counter("edge_tunnel_controller_decisions_failed_total", "Attempts to decide a request that failed and are repeated.", signer.Failed),
		admin.Gauge("edge_tunnel_controller_cas", "CAs that agents and servers believe, while this process leads.", cas),
		admin.Gauge("edge_tunnel_controller_ca_expiry_timestamp_seconds", "When the CA that signs ends, in Unix time, while this process leads.", expiry),
		admin.Gauge("edge_tunnel_controller_clock_skew_seconds", "How far this machine's clock is ahead of the API server's.", c.skew.Ahead().Seconds()),
		admin.Counter("edge_tunnel_controller_leases_deleted_total", "Leases deleted of servers that were gone for good.", published.Swept),
		admin.Counter("edge_tunnel_controller_events_written_total", "Events written.", published.Events.Written),
		admin.Counter("edge_tunnel_controller_events_dropped_total", "Events that were too many, or could not be written.", published.Events.Dropped),
	}
	if r := published.Records; r != nil {
		metrics = append(metrics,
			admin.Gauge("edge_tunnel_controller_dns_records", "Lines of names and addresses in the ConfigMap for CoreDNS, when this process last looked.", r.Records),
			admin.Gauge("edge_tunnel_controller_dns_bytes", "Bytes of that ConfigMap.", r.Bytes),
			admin.Gauge("edge_tunnel_controller_dns_limit_bytes", "Bytes that a ConfigMap can have.", r.Limit),
			admin.Gauge("edge_tunnel_controller_dns_nodes_left_out", "Nodes that lack a name or an address there for want of room.", r.LeftOut),
			admin.Counter("edge_tunnel_controller_dns_writes_total", "Writes of that ConfigMap.", r.Writes),
			admin.Counter("edge_tunnel_controller_dns_failures_total", "Attempts to put it right that failed and are repeated.", r.Failures),
		)
	}
	if st := published.Status; st != nil {
		metrics = append(metrics,
			admin.GaugeBy("edge_tunnel_controller_nodes", "Tunneled nodes by the reason of their condition EdgeTunnelReady, while this process leads.", "reason", st.Nodes),
			admin.Gauge("edge_tunnel_controller_conditions_waiting", "Conditions that are not yet what they should be.", st.Waiting),
			admin.Counter("edge_tunnel_controller_conditions_written_total", "Writes of conditions, or attempts.", st.Writes),
			admin.Counter("edge_tunnel_controller_condition_failures_total", "Attempts that failed and are repeated.", st.Failures),
		)
	}
	return metrics
}
