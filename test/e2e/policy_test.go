// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// exchangeGreeting reads greet's greeting, and then uses its echo.
func exchangeGreeting(conn net.Conn) error {
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	hello := make([]byte, len(greeting))
	if _, err := io.ReadFull(conn, hello); err != nil || string(hello) != greeting {
		return fmt.Errorf("greeted with %q (%w)", hello, err)
	}
	return exchange(conn, "hello")
}

// The agent alone decides what is dialed, whatever is in its certificate. What it does not allow is a reset for the client, and counted as such.
func TestAgentPolicy(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	cloud := w.cloud("cloud-1")
	home := w.site("home")
	edge, printer, camera := home.edge("edge-1"), home.edge("printer"), home.edge("camera")
	w.issueAgent("edge-1", edge.V4, edge.V6, printer.V4, printer.V6, camera.V4)
	server := cloud.startServer("--tunneled-ports", "9100,9101,10266")
	agent := edge.startAgent([]*host{cloud},
		"--localhost-proxy-ports", "10250,10255",
		"--allow", printer.V4.String()+":9000-9100", "--allow", fmt.Sprintf("[%s]:*", printer.V6), "--allow", "0.0.0.0/0:9101")
	server.waitTarget(camera.V4, "online")

	edge.serveAt(netip.MustParseAddrPort("127.0.0.1:10250"), greet) // loopback comes first
	edge.serveAt(edge.at(10250), hold)
	edge.serveAt(edge.at(10255), greet) // loopback has nothing
	edge.serveAt(netip.MustParseAddrPort("127.0.0.1:9101"), hold)
	edge.serve(9100, greet)
	for _, port := range []uint16{9100, 9101, 10250} {
		for _, device := range []*host{printer, camera} {
			device.serveAt(device.at(port), greet)
			device.serveAt(device.at6(port), greet)
		}
	}

	denied := 0
	for _, c := range []struct {
		to     netip.AddrPort
		dialed string // empty: not allowed
	}{
		{edge.at(9100), edge.at(9100).String()},
		{edge.at(10250), "127.0.0.1:10250"},
		{edge.at(10255), edge.at(10255).String()},
		{edge.at(10266), ""}, // its own admin port
		{edge.at6(10266), ""},
		{printer.at(9100), printer.at(9100).String()},
		{printer.at(9101), printer.at(9101).String()}, // by the rule for everything
		{printer.at6(9101), printer.at6(9101).String()},
		{printer.at(10250), "127.0.0.1:10250"}, // whatever the address: the node may be known by its router's
		{camera.at(9100), ""},
		{camera.at(9101), camera.at(9101).String()},
	} {
		if c.dialed == "" {
			cloud.wantReset(c.to, dialOptions{}, patience)
			denied++
			server.waitEnded("not_allowed", float64(denied))
			agent.waitEnded("not_allowed", float64(denied))
			if r := server.recordTo(c.to); r.Reason != "not_allowed" || r.Node != "edge-1" || r.Detail == "" {
				t.Errorf("%s: record %+v", c.to, r)
			}
			continue
		}
		conn := cloud.mustDial(c.to)
		if err := exchangeGreeting(conn); err != nil {
			t.Errorf("%s: %v", c.to, err)
		}
		conn.Close()
		if r := agent.record(conn.LocalAddr()); r.Dialed != c.dialed {
			t.Errorf("%s: record %+v, want %s dialed", c.to, r, c.dialed)
		}
	}
	if out, err := edge.ctl("status", "--control", agent.control); err != nil || !strings.Contains(out, printer.V4.String()) {
		t.Errorf("tunnelctl status does not show what is allowed: %v\n%s", err, out)
	}

	// A rule for everything does not open loopback.
	cloud.wantReset(edge.at(9101), dialOptions{}, patience)
	if r := agent.recordTo(edge.at(9101)); r.Reason != "refused" || r.Dialed == "127.0.0.1:9101" {
		t.Errorf("record %+v", r)
	}
	server.waitIdle()
	agent.waitIdle()
}
