// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// Two machines were made from one disk image: both have the certificate, and each takes the other's place. That ends soon, is told to people, and one of
// them serves.
func TestClones(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	cloud := w.cloud("cloud-1")
	same := netip.MustParsePrefix("10.99.50.0/24") // private addresses are used again and again
	first, second := w.site("one", same).edge("edge-1"), w.site("two", same).edge("edge-2")
	w.issueAgent("edge-1", first.V4)
	second.cert = "edge-1"
	for _, e := range []*host{first, second} {
		e.serve(10250, echo)
	}
	server := cloud.startServer()
	agents := []*daemon{first.startAgent([]*host{cloud}), second.launchAgent([]*host{cloud})}

	server.waitLog("duplicate_identity")
	if m := server.metrics(); m["edge_tunnel_duplicate_identities_total"] == 0 || m["edge_tunnel_evictions_total"] < 3 {
		t.Errorf("%v duplicates, %v evictions", m["edge_tunnel_duplicate_identities_total"], m["edge_tunnel_evictions_total"])
	}
	eventually(t, patience, func() error {
		list, err := server.client().Tunnels(t.Context())
		if err == nil && (len(list.Tunnels) != 1 || !strings.HasPrefix(list.Tunnels[0].Error, "duplicate_identity")) {
			err = fmt.Errorf("tunnels %+v", list.Tunnels)
		}
		return err
	})
	if out, err := cloud.ctl("tunnels"); err != nil || !strings.Contains(out, "duplicate_identity") {
		t.Errorf("tunnelctl tunnels: %v\n%s", err, out)
	}
	eventually(t, patience, func() error { // the one that has to wait knows why
		for _, a := range agents {
			if strings.Contains(a.Log(), "refused the login: duplicate_identity") {
				return nil
			}
		}
		return fmt.Errorf("no agent has said duplicate_identity")
	})

	// From here on there is peace, and service.
	before := server.metrics()
	quiet := time.After(10 * time.Second)
	for peace := true; peace; {
		select {
		case <-quiet:
			peace = false
		default:
			cloud.mustEcho(first.at(10250))
			time.Sleep(100 * time.Millisecond)
		}
	}
	m := server.metrics()
	if logins, evictions := m["edge_tunnel_logins_total"], m["edge_tunnel_evictions_total"]; logins > 8 || evictions > before["edge_tunnel_evictions_total"] {
		t.Errorf("%v logins, %v evictions, before the quiet %v and %v", logins, evictions, before["edge_tunnel_logins_total"], before["edge_tunnel_evictions_total"])
	}
	if refused := m.refused("duplicate_identity") - before.refused("duplicate_identity"); refused > 2 {
		t.Errorf("%v more logins had to be refused", refused)
	}
	dials := 0.0
	for _, a := range agents {
		dials += a.metrics()["edge_tunnel_agent_dials_total"]
	}
	if dials > 20 {
		t.Errorf("the agents have dialed %v times", dials)
	}
}
