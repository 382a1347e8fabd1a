// SPDX-License-Identifier: Apache-2.0

package main

import (
	"time"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/daemon"
	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
	"github.com/edge-tunnel/edge-tunnel/pkg/intercept"
	"github.com/edge-tunnel/edge-tunnel/pkg/redirect"
)

// metrics are all metrics of the server. They are pulled from the parts, and from the kernel's maps, when somebody asks.
func (s *server) metrics() []admin.Metric {
	tun, conns, id, known, g := s.tunnels.Stats(), s.conns.Stats(), s.ids.Stats(), s.known.Status(), s.guard.state()
	list := []admin.Metric{
		admin.GaugeBy("edge_tunnel_tunnels", "Tunnels of agents, by state; retired ones only finish their streams.", "state",
			map[string]int{"up": tun.Active, "retired": tun.Retired, "pending": tun.Pending}),
		admin.Counter("edge_tunnel_tunnel_connections_total", "Connections that were accepted where tunnels come in.", tun.Accepted),
		admin.Counter("edge_tunnel_tunnel_probes_total", "Of these, those that were closed before their first byte.", tun.Probes),
		admin.Counter("edge_tunnel_logins_total", "Agents that logged in.", tun.Logins),
		admin.CounterBy("edge_tunnel_logins_refused_total", "Connections refused before or at login, by reason.", "reason", tun.Refused),
		admin.Counter("edge_tunnel_evictions_total", "Tunnels that another instance of the same node put an end to.", tun.Evictions),
		admin.Counter("edge_tunnel_duplicate_identities_total", "Evictions that were too many in a minute: two agents use one certificate.", tun.Duplicates),
		admin.Counter("edge_tunnel_streams_opened_total", "Streams opened in tunnels.", tun.StreamsOpened),
		admin.Counter("edge_tunnel_streams_closed_total", "Streams that have ended; opened less closed are open.", tun.StreamsClosed),
		admin.CounterBy("edge_tunnel_tunnel_bytes_total", "Payload in tunnels, by direction as seen from the server.", "direction",
			map[string]uint64{"received": tun.BytesIn, "sent": tun.BytesOut}),

		admin.Gauge("edge_tunnel_connections", "Intercepted connections that are open.", conns.Open),
		admin.Counter("edge_tunnel_connections_begun_total", "Connections accepted on the redirect listeners.", conns.Begun),
		admin.CounterBy("edge_tunnel_connections_ended_total", "Connections that have ended, by reason.", "reason", conns.Ended),
		admin.CounterBy("edge_tunnel_connection_bytes_total", "Bytes of connections, by direction as seen from the client.", "direction",
			map[string]int64{"sent": conns.Sent, "received": conns.Received}),
		s.opened.Metric("edge_tunnel_connection_open_seconds", "Time from accept until the agent's word that it has connected, which may wait 5 ms for the service's first bytes."),
		admin.Counter("edge_tunnel_connections_overflowed_total", "Connections reset because too many were open.", conns.Overflowed),
		admin.Counter("edge_tunnel_connections_retried_total", "Connections that needed a second stream.", conns.Retried),
		admin.Counter("edge_tunnel_accept_errors_total", "Failed accepts on the redirect listeners.", conns.AcceptErrors),
		admin.Gauge("edge_tunnel_redirect_listeners", "Redirect listeners that are open.", conns.Listeners),

		admin.GaugeBy("edge_tunnel_targets", "Claimed edge addresses, by state.", "state", targetStates(s.targets.counts())),
		admin.GaugeBy("edge_tunnel_targets_refused", "Claimed addresses that cannot be targets, by reason.", "reason", s.targets.refused()),
		admin.Gauge("edge_tunnel_known_nodes", "Edge nodes that are remembered.", known.Nodes),
		admin.Gauge("edge_tunnel_state_unsaved", "1 while the stored state is older than the memory.", oneIf(known.Unsaved)),
		admin.Counter("edge_tunnel_state_save_failures_total", "Writes of the stored state that failed.", known.SaveFailures),

		admin.GaugeBy("edge_tunnel_ready", "1 for each condition of readiness that holds.", "condition", s.readiness()),
		admin.Counter("edge_tunnel_programs_reattached_total", "Times that the programs were attached again, because they were gone or not last.", g.reattached),
		admin.Gauge("edge_tunnel_certificate_expiry_timestamp_seconds", "When the server's certificate ends, in Unix time.", daemon.CertificateExpiry(id)),
		admin.Counter("edge_tunnel_certificate_load_failures_total", "Certificates, CA bundles and deny files that could not be loaded again.", daemon.LoadFailures(id)),
	}
	list = append(list, byNode(conns.Nodes)...)
	list = append(list, s.certificate.Metrics("edge_tunnel_")...)
	if s.hop != nil {
		elsewhere, rounds := s.hop.owners.elsewhere()
		forwarded := s.hop.book.Stats()
		list = append(list,
			admin.Gauge("edge_tunnel_peers", "Other servers that this one can forward to.", len(s.hop.peers.Live())),
			admin.Gauge("edge_tunnel_peer_nodes", "Nodes without a tunnel here that another server has one of.", elsewhere),
			admin.Counter("edge_tunnel_peer_rounds_total", "Times that other servers were asked for nodes without a tunnel here.", rounds),
			admin.Counter("edge_tunnel_peer_questions_total", "Lists of nodes that other servers have asked about.", tun.Questions),
			admin.Counter("edge_tunnel_peer_streams_total", "Streams of other servers for connections to nodes with a tunnel here.", forwarded.Begun),
			admin.Gauge("edge_tunnel_peer_streams", "Of these, those that are open.", forwarded.Open),
			admin.CounterBy("edge_tunnel_peer_streams_ended_total", "Of these, those that have ended, by reason.", "reason", forwarded.Ended),
			admin.Counter("edge_tunnel_peer_streams_overflowed_total", "Streams of other servers refused because too many were open.", forwarded.Overflowed),
		)
	}
	if s.cluster != nil {
		v := s.cluster.view()
		stale := 0.0
		if !v.Since.IsZero() {
			stale = time.Since(v.Since).Seconds()
		}
		list = append(list,
			admin.Gauge("edge_tunnel_cluster_complete", "1 once the cluster's Nodes have been listed, whole.", oneIf(v.Complete)),
			admin.Gauge("edge_tunnel_cluster_nodes", "Nodes in the cluster.", v.Nodes),
			admin.Gauge("edge_tunnel_cluster_tunneled_nodes", "Edge nodes in the cluster that are tunneled.", v.Tunneled),
			admin.Gauge("edge_tunnel_cluster_stale_seconds", "Time since when the Nodes cannot be followed; 0 while they can.", stale),
		)
	}
	list = append(list, s.ports.metrics()...)
	if s.hop != nil && s.hop.registry != nil {
		r := s.hop.registry.Stats()
		list = append(list,
			admin.Gauge("edge_tunnel_registry_servers", "Other servers that are there by their Leases.", r.Servers),
			admin.Gauge("edge_tunnel_registry_nodes", "Nodes that other servers have tunnels of, by their Leases.", r.Nodes),
			admin.Counter("edge_tunnel_registry_writes_total", "Times that this server's Leases were written, or should have been.", r.Writes),
			admin.Counter("edge_tunnel_registry_write_failures_total", "Of these, those that failed.", r.Failures),
		)
	}
	if counters, err := s.kernel.Stats(); err == nil {
		list = append(list, admin.CounterBy("edge_tunnel_bpf_total", "Verdicts of the programs in the kernel.", "verdict", verdicts(counters)))
	}
	return list
}

func oneIf(yes bool) int {
	if yes {
		return 1
	}
	return 0
}

func (s *server) readiness() map[string]int {
	held := make(map[string]int)
	for _, c := range s.conditions() {
		held[c.Name] = oneIf(c.OK)
	}
	return held
}

func targetStates(c admin.TargetCounts) map[string]int {
	return map[string]int{
		admin.TargetOnline: c.Online, admin.TargetOffline: c.Offline, admin.TargetAmbiguous: c.Ambiguous, admin.TargetRefused: c.Refused,
	}
}

// byNode are the metrics with a label for the node. There are as many as there are known nodes that were ever connected to.
func byNode(nodes map[string]intercept.NodeStats) []admin.Metric {
	open := admin.Metric{Name: "edge_tunnel_node_connections", Kind: admin.KindGauge, Labels: []string{"node"},
		Help: "Open connections to each node."}
	ended := admin.Metric{Name: "edge_tunnel_node_connections_ended_total", Labels: []string{"node"},
		Help: "Connections to each node that have ended."}
	bytes := admin.Metric{Name: "edge_tunnel_node_bytes_total", Labels: []string{"node", "direction"},
		Help: "Bytes of connections to each node that have ended, by direction as seen from the client."}
	for name, n := range nodes {
		open.Samples = append(open.Samples, admin.Sample{Labels: []string{name}, Value: float64(n.Open)})
		ended.Samples = append(ended.Samples, admin.Sample{Labels: []string{name}, Value: float64(n.Ended)})
		bytes.Samples = append(bytes.Samples,
			admin.Sample{Labels: []string{name, "sent"}, Value: float64(n.Sent)},
			admin.Sample{Labels: []string{name, "received"}, Value: float64(n.Received)})
	}
	return []admin.Metric{open, ended, bytes}
}

// verdicts gives the kernel's counters the names that they have in the kernel.
func verdicts(c redirect.Counters) map[string]uint64 {
	return map[string]uint64{
		"missed":           c.Missed,
		"redirected_host4": c.RedirectedHost4,
		"redirected_host6": c.RedirectedHost6,
		"redirected_pod4":  c.RedirectedPod4,
		"redirected_pod6":  c.RedirectedPod6,
		"offline":          c.Offline,
		"ambiguous":        c.Ambiguous,
		"no_family":        c.NoFamily,
		"storage_failed":   c.StorageFailed,
		"bypassed":         c.Bypassed,
		"opted_out":        c.OptedOut,
		"device_bound":     c.DeviceBound,
		"pod_skipped":      c.PodSkipped,
		"inactive":         c.Inactive,
		"handed_over_host": c.HandedOverHost,
		"handed_over_pod":  c.HandedOverPod,
		"hand_over_failed": c.HandOverFailed,
		"accepted_host":    c.AcceptedHost,
		"accepted_pod":     c.AcceptedPod,
		"accepted_unknown": c.AcceptedUnknown,
		"accept_failed":    c.AcceptFailed,
		"peer_names":       c.PeerNames,
		"bind_refused":     c.BindRefused,
	}
}
