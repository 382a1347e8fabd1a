// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"crypto/tls"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

// reload has a daemon read its files again, as systemd does; without it, it looks at them every five seconds.
func (d *daemon) reload() {
	d.t.Helper()
	if err := d.Signal(syscall.SIGHUP); err != nil {
		d.t.Fatal(err)
	}
}

// read is a file of the world's certificates.
func (w *world) read(file string) string {
	w.t.Helper()
	content, err := os.ReadFile(filepath.Join(w.pki, file))
	if err != nil {
		w.t.Fatal(err)
	}
	return string(content)
}

// A deny file is in force as soon as it is read: the session ends, its connections are reset, the agent does not get in again until it is taken out.
func TestDeniedWhileConnected(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	deny := filepath.Join(w.pki, "deny")
	replaceFile(t, deny, "# nobody yet\n")
	s := w.startSite("--deny-file", deny)
	other := s.home.edge("edge-2")
	other.startAgent([]*host{s.cloud})
	addr, otherAddr := s.edge.serve(servicePort, echo), other.serve(servicePort, echo)
	s.server.waitTarget(other.V4, "online")
	conn, otherConn := s.cloud.mustDial(addr), s.cloud.mustDial(otherAddr)
	for _, c := range []net.Conn{conn, otherConn} {
		if err := exchange(c, "before"); err != nil {
			t.Fatal(err)
		}
	}

	replaceFile(t, deny, "edge-1 # stolen\n")
	s.server.reload()
	waitReset(t, conn, patience/4)
	s.server.waitTarget(s.edge.V4, "offline")
	_, err := s.cloud.dial(addr)
	wantErrno(t, err, syscall.EHOSTUNREACH)
	if r := s.server.record(conn.LocalAddr()); r.Reason != "tunnel_lost" {
		t.Errorf("record %+v", r)
	}
	eventually(t, patience, func() error { // the session, and then the agent's next attempts
		if m := s.server.metrics(); m.refused("denied") < 2 {
			return fmt.Errorf("%v denied", m.refused("denied"))
		}
		return nil
	})

	// A file that cannot be understood changes nothing, and is reported.
	replaceFile(t, deny, "edge-1\nthis is no name\n")
	s.server.reload()
	s.server.waitLog("reload failed")
	if m := s.server.metrics(); m["edge_tunnel_certificate_load_failures_total"] == 0 {
		t.Error("the bad file is not counted")
	}
	if target, err := s.server.target(s.edge.V4); err != nil || target.State != "offline" {
		t.Errorf("target %+v, %v", target, err)
	}

	replaceFile(t, deny, "")
	s.server.waitTarget(s.edge.V4, "online") // nobody told the server, it looked
	s.cloud.mustEcho(addr)
	if err := exchange(otherConn, "after"); err != nil {
		t.Errorf("somebody else's connection: %v", err)
	}
}

// A session ends with the certificate that it was made with. An agent that has a new one by then has logged in again before, so that no connect
// fails; one that has not comes back when it has.
func TestCertificateExpires(t *testing.T) {
	t.Parallel()
	const valid = 16 * time.Second
	w := newWorld(t)
	cloud, home := w.cloud("cloud-1"), w.site("home")
	renewed, late := home.edge("edge-1"), home.edge("edge-2")
	server := cloud.startServer("--tunneled-ports", fmt.Sprint(servicePort))
	for _, e := range []*host{renewed, late} {
		w.ctl("pki", "issue-agent", "--dir", w.pki, "--node", e.Name, "--ip", e.V4.String(), "--valid-for", valid.String())
	}
	end := w.pair("edge-1").Leaf.NotAfter
	lateEnd := w.pair("edge-2").Leaf.NotAfter
	agent, lateAgent := renewed.startAgent([]*host{cloud}), late.startAgent([]*host{cloud})
	addr, lateAddr := renewed.serve(servicePort, echo), late.serve(servicePort, echo)
	server.waitTarget(renewed.V4, "online")
	server.waitTarget(late.V4, "online")
	conn, lateConn := cloud.mustDial(addr), cloud.mustDial(lateAddr)
	tunnels, err := server.client().Tunnels(t.Context())
	if err != nil || len(tunnels.Tunnels) != 2 || !tunnels.Tunnels[0].NotAfter.Equal(end) {
		t.Fatalf("tunnels %+v, %v, want the end %v", tunnels.Tunnels, err, end)
	}

	w.issueAgent("edge-1", renewed.V4) // for a year
	agent.reload()
	var connects sync.WaitGroup
	defer connects.Wait()
	connects.Go(func() { // not one connect fails
		for time.Now().Before(end.Add(2 * time.Second)) {
			c, err := cloud.dial(addr)
			if err != nil {
				t.Errorf("%v before the end: %v", time.Until(end), err)
				return
			}
			if err := exchange(c, "ping"); err != nil {
				t.Errorf("%v before the end: %v", time.Until(end), err)
				return
			}
			c.Close()
			time.Sleep(50 * time.Millisecond)
		}
	})
	eventually(t, patience, func() error {
		tunnels, err := server.client().Tunnels(t.Context())
		if err != nil {
			return err
		}
		for _, tunnel := range tunnels.Tunnels {
			if tunnel.Node == "edge-1" && tunnel.NotAfter.After(end) {
				return nil
			}
		}
		return fmt.Errorf("edge-1 has not logged in again: %+v", tunnels.Tunnels)
	})
	if time.Now().After(end) {
		t.Error("the agent did not log in again before the end of its certificate")
	}
	if err := exchange(conn, "in the former session"); err != nil {
		t.Error(err)
	}

	// Both sessions end with the certificates that they were made with.
	for _, c := range []struct {
		conn net.Conn
		end  time.Time
	}{{conn, end}, {lateConn, lateEnd}} {
		waitReset(t, c.conn, time.Until(c.end)+patience/4)
		if early := time.Until(c.end); early > time.Second/2 {
			t.Errorf("ended %v before the certificate", early)
		}
	}
	server.waitTarget(late.V4, "offline")
	_, err = cloud.dial(lateAddr)
	wantErrno(t, err, syscall.EHOSTUNREACH)
	server.waitLog(`"reason":"expired"`)
	eventually(t, patience, func() error {
		if n := server.metrics().refused("expired"); n == 0 {
			return fmt.Errorf("no login was refused as expired")
		}
		return nil
	})
	if status, body, err := lateAgent.get("/readyz"); err == nil && (status == 200 || !strings.Contains(body, "expired")) {
		t.Errorf("the late agent: %d %s", status, body)
	}
	w.issueAgent("edge-2", late.V4)
	lateAgent.reload()
	server.waitTarget(late.V4, "online")
	cloud.mustEcho(lateAddr)
	cloud.mustEcho(addr)
}

// CA bundle and the server's own certificate are replaced without a restart. What a CA has signed ends when the CA leaves the bundle, nothing else.
func TestBundleChanges(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	cloud, home := w.cloud("cloud-1"), w.site("home")
	edge, moved := home.edge("edge-1"), home.edge("edge-2")
	old := &world{t: t, bin: w.bin, pki: filepath.Join(w.lab.Dir(), "old")}
	old.ctl("pki", "init", "--dir", old.pki)
	bundle := filepath.Join(w.pki, "bundle.crt")
	replaceFile(t, bundle, w.read("ca.crt")+old.read("ca.crt"))
	cloud.flags, moved.flags = []string{"--ca-cert", bundle}, []string{"--ca-cert", bundle}
	old.issueAgent("edge-2", moved.V4)
	for _, end := range []string{".crt", ".key"} {
		replaceFile(t, filepath.Join(w.pki, "edge-2"+end), old.read("edge-2"+end))
	}

	server := cloud.startServer()
	edge.startAgent([]*host{cloud})
	agent := moved.startAgent([]*host{cloud})
	addr, movedAddr := edge.serve(10250, echo), moved.serve(10250, echo)
	server.waitTarget(edge.V4, "online")
	server.waitTarget(moved.V4, "online")
	conn, movedConn := cloud.mustDial(addr), cloud.mustDial(movedAddr)
	for _, c := range []net.Conn{conn, movedConn} {
		if err := exchange(c, "before"); err != nil {
			t.Fatal(err)
		}
	}

	replaceFile(t, bundle, w.read("ca.crt"))
	server.reload()
	waitReset(t, movedConn, patience/4)
	server.waitTarget(moved.V4, "offline")
	eventually(t, patience, func() error {
		if n := server.metrics().refused("unknown_ca"); n < 2 {
			return fmt.Errorf("%v refused", n)
		}
		return nil
	})
	if err := exchange(conn, "the other CA's"); err != nil {
		t.Error(err)
	}

	w.issueAgent("edge-2", moved.V4)
	agent.reload()
	server.waitTarget(moved.V4, "online")
	cloud.mustEcho(movedAddr)

	// The server's own: seen by who dials next; nobody is disturbed.
	serial := func() string {
		c := tls.Client(edge.mustDial(cloud.at(wire.Port)), w.agentTLS("edge-1"))
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(patience))
		if err := c.Handshake(); err != nil {
			t.Fatal(err)
		}
		return fmt.Sprintf("%x", c.ConnectionState().PeerCertificates[0].SerialNumber)
	}
	before := serial()
	w.issueServer("cloud-1", cloud.addrs()...)
	server.reload()
	eventually(t, patience, func() error {
		status, err := server.client().Status(t.Context())
		if err == nil && status.Certificate.Serial == before {
			err = fmt.Errorf("the server still has the certificate %s", before)
		}
		return err
	})
	if after, want := serial(), fmt.Sprintf("%x", w.pair("cloud-1").Leaf.SerialNumber); after != want {
		t.Errorf("the server shows %s, its file has %s", after, want)
	}
	if err := exchange(conn, "after"); err != nil {
		t.Error(err)
	}
}
