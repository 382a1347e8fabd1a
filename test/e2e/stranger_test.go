// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/identity"
	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

// refused is how many connections where tunnels come in were refused for the reason.
func (m metrics) refused(reason string) float64 {
	return m[fmt.Sprintf("edge_tunnel_logins_refused_total{reason=%q}", reason)]
}

// waitRefused waits until so many were refused for the reason.
func (d *daemon) waitRefused(reason string, want float64) {
	d.t.Helper()
	eventually(d.t, patience, func() error {
		m, err := d.tryMetrics()
		if err == nil && m.refused(reason) != want {
			err = fmt.Errorf("%v refused as %s, want %v", m.refused(reason), reason, want)
		}
		return err
	})
}

// waitHungUp fails unless the other end ends the connection, in whatever way, within the limit.
func waitHungUp(t *testing.T, conn net.Conn, limit time.Duration) {
	t.Helper()
	_ = conn.SetDeadline(time.Now().Add(limit))
	if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("still connected after %v", limit)
	}
}

// Whoever is not a good agent is refused where tunnels come in, for a reason that is counted; agents come and go meanwhile.
func TestStrangers(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	cloud := w.cloud("cloud-1")
	home := w.site("home")
	edge, stranger := home.edge("edge-1"), home.edge("stranger")
	deny := filepath.Join(w.pki, "deny")
	w.issueAgent("edge-named")
	w.issueAgent("edge-numbered")
	replaceFile(t, deny, fmt.Sprintf("edge-named\nserial:%x # stolen\n", w.pair("edge-numbered").Leaf.SerialNumber))
	w.issueServer("cloud-2", cloud.V4)
	w.forge(forged{name: "edge-old", notAfter: time.Now().Add(-time.Minute)})
	w.forge(forged{name: "edge-useless", usages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	w.forge(forged{name: "edge-roleless", role: "somebody"})
	w.forge(forged{name: "Edge_1"})
	other := &world{t: t, bin: w.bin, pki: filepath.Join(w.lab.Dir(), "other")}
	other.ctl("pki", "init", "--dir", other.pki)
	other.issueAgent("edge-1", edge.addrs()...)

	server := cloud.startServer("--tunneled-ports", fmt.Sprint(servicePort), "--deny-file", deny)
	dial := func() net.Conn { return stranger.mustDial(cloud.at(wire.Port)) }
	handshake := func(cfg *tls.Config) func(net.Conn) net.Conn {
		return func(conn net.Conn) net.Conn {
			c := tls.Client(conn, cfg)
			_ = c.SetDeadline(time.Now().Add(patience))
			_ = c.Handshake() // in TLS 1.3 the client's end of it succeeds before the server has judged
			return c
		}
	}
	with := func(change func(*tls.Config)) *tls.Config {
		cfg := w.agentTLS("stranger")
		change(cfg)
		return cfg
	}
	say := func(text string) func(net.Conn) net.Conn {
		return func(conn net.Conn) net.Conn {
			_, _ = io.WriteString(conn, text)
			return conn
		}
	}

	// These take their time: until the server has had enough of them.
	var slow sync.WaitGroup
	began := time.Now()
	for _, speak := range []func(net.Conn) net.Conn{
		func(conn net.Conn) net.Conn { return conn }, // says nothing
		say("\x16"),                       // begins
		handshake(w.agentTLS("stranger")), // does not log in
		func(conn net.Conn) net.Conn { // never quite stops
			slow.Go(func() {
				for _, b := range append([]byte{0x16, 0x03, 0x01, 0x02, 0x00, 0x01}, make([]byte, 500)...) {
					if _, err := conn.Write([]byte{b}); err != nil {
						return
					}
					time.Sleep(100 * time.Millisecond)
				}
			})
			return conn
		},
	} {
		conn := speak(dial())
		slow.Go(func() { waitHungUp(t, conn, patience) })
	}

	for _, c := range []struct {
		name, reason string
		speak        func(net.Conn) net.Conn
	}{
		{"another CA", "unknown_ca", handshake(other.agentTLS("edge-1"))},
		{"no certificate", "no_certificate", handshake(w.agentTLS(""))},
		{"an expired certificate", "expired", handshake(w.agentTLS("edge-old"))},
		{"a denied name", "denied", handshake(w.agentTLS("edge-named"))},
		{"a denied serial number", "denied", handshake(w.agentTLS("edge-numbered"))},
		{"a server's certificate", "wrong_role", handshake(w.agentTLS("cloud-2"))},
		{"no role", "wrong_role", handshake(w.agentTLS("edge-roleless"))},
		{"another usage", "bad_usage", handshake(w.agentTLS("edge-useless"))},
		{"a bad name", "bad_name", handshake(w.agentTLS("Edge_1"))},
		{"TLS 1.2", "handshake_failed", handshake(with(func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 }))},
		{"another protocol", "no_protocol", handshake(with(func(c *tls.Config) { c.NextProtos = []string{"h2"} }))},
		{"the protocol between servers", "peer_protocol", handshake(with(func(c *tls.Config) { c.NextProtos = []string{wire.ALPNPeer} }))},
		{"no protocol", "bad_protocol", handshake(with(func(c *tls.Config) { c.NextProtos = nil }))},
		{"a web client", "not_tls", say("GET / HTTP/1.1\r\nHost: cloud-1\r\n\r\n")},
		{"a shell", "not_tls", say("SSH-2.0-OpenSSH_9.2p1\r\n")},
		{"zeros", "not_tls", say(strings.Repeat("\x00", 4096))},
		{"half a hello", "aborted", func(conn net.Conn) net.Conn {
			conn = say("\x16\x03\x01\x02\x00\x01")(conn)
			_ = conn.(*net.TCPConn).CloseWrite()
			return conn
		}},
		{"a bad login", "bad_request", func(conn net.Conn) net.Conn {
			return say("GET / HTTP/1.1\r\nHost: cloud-1\r\n\r\n")(handshake(w.agentTLS("stranger"))(conn))
		}},
		{"a later version", "version_unsupported", func(conn net.Conn) net.Conn {
			conn = handshake(w.agentTLS("stranger"))(conn)
			_ = wire.WriteLogin(conn, wire.Login{MinVersion: wire.Version + 1, MaxVersion: wire.Version + 9})
			return conn
		}},
	} {
		before := server.metrics().refused(c.reason)
		conn := dial()
		waitHungUp(t, c.speak(conn), patience/2)
		conn.Close()
		server.waitRefused(c.reason, before+1)
		if t.Failed() {
			t.Fatalf("%s: not refused as %s", c.name, c.reason)
		}
	}

	// A connection without a byte is somebody's health check.
	before := server.metrics()
	dial().Close()
	server.waitMetric("edge_tunnel_tunnel_probes_total", before["edge_tunnel_tunnel_probes_total"]+1)

	// An agent was not kept waiting by those who still are at it.
	edge.startAgent([]*host{cloud})
	server.waitTarget(edge.V4, "online")
	cloud.mustEcho(edge.serve(servicePort, echo))
	slow.Wait()
	if took := time.Since(began); took < 9*time.Second {
		t.Errorf("slow strangers were refused after %v, an agent far away would be, too", took)
	}
	server.waitRefused("timeout", 4)
	m := server.metrics()
	if m["edge_tunnel_logins_total"] != 1 || m["edge_tunnel_known_nodes"] != 1 || m[`edge_tunnel_tunnels{state="pending"}`] != 0 {
		t.Errorf("%v logins, %v nodes known, %v connections pending", m["edge_tunnel_logins_total"], m["edge_tunnel_known_nodes"], m[`edge_tunnel_tunnels{state="pending"}`])
	}
}

// An agent believes nobody but servers, each for a reason that it shows, and has its tunnel to the one that is real.
func TestFalseServers(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	genuine, impostor := w.cloud("cloud-1"), w.cloud("cloud-2")
	edge := w.site("home").edge("edge-1")
	server := genuine.startServer()

	w.issueAgent("edge-false", impostor.V4)
	w.forge(forged{name: "cloud-useless", role: identity.RoleServer, addrs: impostor.addrs(), usages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	w.forge(forged{
		name: "cloud-old", role: identity.RoleServer, addrs: impostor.addrs(), notAfter: time.Now().Add(-time.Minute),
		usages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	})
	w.issueServer("cloud-denied", impostor.V4)
	w.issueServer("cloud-elsewhere", genuine.V4)
	deny := filepath.Join(w.pki, "deny")
	replaceFile(t, deny, "cloud-denied\n")
	other := &world{t: t, bin: w.bin, pki: filepath.Join(w.lab.Dir(), "other")}
	other.ctl("pki", "init", "--dir", other.pki)
	other.issueServer("cloud-2", impostor.V4)

	with := func(pair tls.Certificate, change func(*tls.Config)) func(*net.TCPConn) {
		cfg := &tls.Config{Certificates: []tls.Certificate{pair}, NextProtos: []string{wire.ALPNAgent}, ClientAuth: tls.RequestClientCert}
		if change != nil {
			change(cfg)
		}
		return func(conn *net.TCPConn) {
			c := tls.Server(conn, cfg)
			if _, err := wire.ReadLogin(c); err == nil {
				_, _ = io.WriteString(c, "welcome, I shall be your server today\n")
			}
		}
	}
	impostors := []struct {
		want  string // in what the agent says about it
		serve func(*net.TCPConn)
	}{
		{"wrong_role", with(w.pair("edge-false"), nil)},
		{"bad_usage", with(w.pair("cloud-useless"), nil)},
		{"expired", with(w.pair("cloud-old"), nil)},
		{"denied", with(w.pair("cloud-denied"), nil)},
		{"wrong_host", with(w.pair("cloud-elsewhere"), nil)},
		{"unknown_ca", with(other.pair("cloud-2"), nil)},
		{"protocol version", with(w.pair("cloud-2"), func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 })},
		{"bad_protocol", with(w.pair("cloud-2"), func(c *tls.Config) { c.NextProtos = nil })},
		{"first record does not look like a TLS handshake", greet},
		{"login reply", with(w.pair("cloud-2"), nil)}, // has a good certificate, and then says something else
	}
	flags := []string{"--deny-file", deny}
	want := make(map[string]string)
	for i, im := range impostors {
		addr := impostor.serveAt(netip.AddrPortFrom(impostor.V4, 20000+uint16(i)), im.serve)
		flags = append(flags, "--server", addr.String())
		want[addr.String()] = im.want
	}
	agent := edge.startAgent([]*host{genuine}, flags...)
	server.waitTarget(edge.V4, "online")
	genuine.mustEcho(edge.serve(10250, echo))

	eventually(t, patience, func() error {
		list, err := agent.client().Tunnels(t.Context())
		if err != nil {
			return err
		}
		told := 0
		for _, tunnel := range list.Tunnels {
			if text, ok := want[tunnel.Server]; ok {
				told++
				if !strings.Contains(tunnel.Error, text) {
					return fmt.Errorf("about %s: %s %q, want %q", tunnel.Server, tunnel.State, tunnel.Error, text)
				}
			}
		}
		if told != len(impostors) {
			return fmt.Errorf("%d of %d impostors are listed: %+v", told, len(impostors), list.Tunnels)
		}
		return nil
	})
	m := agent.metrics()
	if m[`edge_tunnel_agent_tunnels{state="up"}`] != 1 || m["edge_tunnel_agent_dial_failures_total"] < float64(len(impostors)) {
		t.Errorf("%v tunnels are up, %v dials have failed", m[`edge_tunnel_agent_tunnels{state="up"}`], m["edge_tunnel_agent_dial_failures_total"])
	}
	// They show up in what the operator sees, too.
	if out, err := edge.ctl("tunnels", "--control", agent.control); err != nil || !strings.Contains(out, "wrong_role") {
		t.Errorf("tunnelctl tunnels: %v:\n%s", err, out)
	}
}
