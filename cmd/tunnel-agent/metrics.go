// SPDX-License-Identifier: Apache-2.0

package main

import (
	"slices"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/daemon"
	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
)

// metrics are all metrics of the agent. They are pulled from the parts when somebody asks.
func (a *app) metrics() []admin.Metric {
	tun, conns, id, net := a.agent.Stats(), a.handler.Stats(), a.store.Stats(), a.network.watcher.Stats()
	return slices.Concat([]admin.Metric{
		admin.GaugeBy("edge_tunnel_agent_tunnels", "Tunnels to servers, by state; retired ones only finish their streams.", "state",
			map[string]int{"up": tun.Tunnels, "retired": tun.Retired}),
		admin.Counter("edge_tunnel_agent_dials_total", "Attempts to make a tunnel.", tun.Dials),
		admin.Counter("edge_tunnel_agent_dial_failures_total", "Attempts to make a tunnel that failed.", tun.Failures),
		admin.Counter("edge_tunnel_agent_streams_opened_total", "Streams that servers opened.", tun.StreamsOpened),
		admin.Counter("edge_tunnel_agent_streams_closed_total", "Streams that have ended; opened less closed are open.", tun.StreamsClosed),
		admin.Counter("edge_tunnel_agent_streams_overloaded_total", "Streams reset because there were too many.", tun.Overloaded),
		admin.CounterBy("edge_tunnel_agent_tunnel_bytes_total", "Payload in tunnels, by direction as seen from the agent.", "direction",
			map[string]uint64{"received": tun.BytesIn, "sent": tun.BytesOut}),

		admin.Gauge("edge_tunnel_agent_connections", "Connections being delivered now.", conns.Open),
		admin.Gauge("edge_tunnel_agent_connections_dialing", "Connections whose service is being dialed now.", conns.Dialing),
		admin.Counter("edge_tunnel_agent_connections_begun_total", "Connections that servers asked for.", conns.Begun),
		admin.Counter("edge_tunnel_agent_connections_overflowed_total", "Connections turned away because there were too many, or the agent was stopping.",
			conns.Overflowed),
		admin.CounterBy("edge_tunnel_agent_connections_ended_total", "Connections that have ended, by reason.", "reason", conns.Ended),
		admin.CounterBy("edge_tunnel_agent_connection_bytes_total", "Bytes of connections, by direction as seen from the client.", "direction",
			map[string]int64{"sent": conns.Sent, "received": conns.Received}),

		admin.Gauge("edge_tunnel_agent_certificate_expiry_timestamp_seconds", "When the node's certificate ends, in Unix time.", daemon.CertificateExpiry(id)),
		admin.Counter("edge_tunnel_agent_certificate_load_failures_total", "Certificates, CA bundles and deny files that could not be loaded again.", daemon.LoadFailures(id)),
		admin.Counter("edge_tunnel_agent_network_failures_total", "Failed looks at the node's network.", net.Failures),
	}, a.certificate.Metrics("edge_tunnel_agent_"), a.loopback.metrics(), a.lookup.metrics())
}
