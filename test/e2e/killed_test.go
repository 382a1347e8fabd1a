// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"net"
	"testing"
)

// A daemon that is killed takes its connections with it, and that must not look like their end: whoever was promised more, a client or a service, is
// reset, and does not take half of a file for the whole.
func TestKilledDaemonIsNoEnd(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		kill func(e *ends)
	}{
		{"server", func(e *ends) { e.server.Kill() }},
		{"agent", func(e *ends) { e.agent.Kill() }},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			e := newEnds(t)
			var clients, services []*net.TCPConn
			for _, h := range []*host{e.cloud, e.pod} {
				client := h.mustDial(e.edge.at(servicePort))
				service := <-e.accepted
				pass(t, client, service, "the first half")
				pass(t, service, client, "of it")
				clients, services = append(clients, client), append(services, service)
			}
			c.kill(e)
			for i := range clients {
				waitReset(t, clients[i], patience)
				waitReset(t, services[i], patience)
			}
		})
	}
}
