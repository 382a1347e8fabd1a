// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"math/big"
	"net"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestAgentAndServerBelieveEachOther(t *testing.T) {
	p := newPair(t)
	for _, host := range []string{"localhost", "127.0.0.1", "::1"} {
		o := shake(t, p.server.ServerTLS(protocols), p.agent.ClientTLS(host, alpnAgent))
		if o.serverErr != nil || o.clientErr != nil {
			t.Fatal(o.serverErr, o.clientErr)
		}
		agent := must[Peer](t)(p.server.Peer(o.server))
		if agent.Name != "edge-1" || agent.Role != RoleAgent || !slices.Equal(agent.Addrs, addrs("10.99.0.5", "fd00::5")) {
			t.Fatalf("server sees %+v", agent)
		}
		if self := p.agent.Self(); agent.Serial != self.Serial || agent.Fingerprint != self.Fingerprint || !agent.NotAfter.Equal(self.NotAfter) {
			t.Fatalf("server sees %+v, agent is %+v", agent, self)
		}
		server := must[Peer](t)(p.agent.Peer(o.client))
		if server.Name != "cloud-1" || server.Role != RoleServer {
			t.Fatalf("agent sees %+v", server)
		}
		if o.server.Version != tls.VersionTLS13 {
			t.Fatalf("version %x", o.server.Version)
		}
	}
}

func TestServersBelieveEachOther(t *testing.T) {
	p := newPair(t)
	o := shake(t, p.server.ServerTLS(protocols), p.server.ClientTLS("localhost", alpnPeer))
	if o.serverErr != nil || o.clientErr != nil {
		t.Fatal(o.serverErr, o.clientErr)
	}
	if peer := must[Peer](t)(p.server.Peer(o.server)); peer.Role != RoleServer {
		t.Fatalf("got %+v", peer)
	}
}

// stranger is a client that shows a certificate whatever the server asks for, and checks nothing.
func stranger(cert tls.Certificate, protos ...string) *tls.Config {
	return &tls.Config{InsecureSkipVerify: true, NextProtos: protos, ServerName: "localhost",
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil }}
}

func TestServerRefuses(t *testing.T) {
	p := newPair(t)
	ours := p.ca.issuer()
	// A second root in the bundle, one that allows intermediates.
	deep := root(t, nil)
	oldRoot := root(t, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })
	put(t, p.sFiles.CA, read(t, p.sFiles.CA)+string(certPEM(deep.cert.Raw))+string(certPEM(oldRoot.cert.Raw)))
	put(t, p.sFiles.Deny, "stolen\nserial:0D:EA:D1\n")
	if err := p.server.Reload(); err != nil {
		t.Fatal(err)
	}
	key := ecKey(t, elliptic.P256())
	ladder := deep
	for range maxChain {
		ladder = ladder.sub(t, nil)
	}
	asServer := func(c *x509.Certificate) {
		c.Subject.CommonName, c.Subject.Organization = "cloud-2", []string{string(RoleServer)}
		c.ExtKeyUsage = RoleServer.usages()
	}
	agents := []string{alpnAgent}
	for _, c := range []struct {
		name   string
		cert   tls.Certificate
		protos []string
		want   string
	}{
		{"no certificate", tls.Certificate{}, agents, ReasonNoCertificate},
		{"stranger's CA", newCA(t).issuer().leaf(t, key, nil), agents, ReasonUnknownCA},
		{"stranger's CA, long ended", newCA(t).issuer().leaf(t, key, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }), agents, ReasonUnknownCA},
		{"self-signed", func() tls.Certificate { i := issuer{cert: &x509.Certificate{}, key: key}; return i.leaf(t, key, nil) }(), agents, ReasonUnknownCA},
		{"expired", ours.leaf(t, key, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }), agents, ReasonExpired},
		{"CA expired", oldRoot.leaf(t, key, nil), agents, ReasonExpired},
		{"intermediate expired", deep.sub(t, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }).leaf(t, key, nil), agents, ReasonExpired},
		{"not yet valid", ours.leaf(t, key, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }), agents, ReasonNotYetValid},
		{"denied name", ours.leaf(t, key, func(c *x509.Certificate) { c.Subject.CommonName = "stolen" }), agents, ReasonDenied},
		{"denied serial", ours.leaf(t, key, func(c *x509.Certificate) { c.SerialNumber = big.NewInt(0xdead1) }), agents, ReasonDenied},
		{"server as agent", ours.leaf(t, key, asServer), agents, ReasonWrongRole},
		{"agent as server", ours.leaf(t, key, nil), []string{alpnPeer}, ReasonWrongRole},
		{"no role", ours.leaf(t, key, func(c *x509.Certificate) { c.Subject.Organization = []string{"acme"} }), agents, ReasonWrongRole},
		{"two roles", ours.leaf(t, key, func(c *x509.Certificate) {
			c.Subject.Organization = []string{string(RoleAgent), string(RoleServer)}
			c.ExtKeyUsage = RoleServer.usages()
		}), agents, ReasonWrongRole},
		{"the same role twice", ours.leaf(t, key, func(c *x509.Certificate) { c.Subject.Organization = []string{string(RoleAgent), string(RoleAgent)} }), agents, ReasonWrongRole},
		{"no extended usage", ours.leaf(t, key, func(c *x509.Certificate) { c.ExtKeyUsage = nil }), agents, ReasonBadUsage},
		{"any extended usage", ours.leaf(t, key, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageAny} }), agents, ReasonBadUsage},
		{"serverAuth only", ours.leaf(t, key, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }), agents, ReasonBadUsage},
		{"server without clientAuth", ours.leaf(t, key, func(c *x509.Certificate) {
			asServer(c)
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		}), []string{alpnPeer}, ReasonBadUsage},
		{"intermediate without clientAuth", deep.sub(t, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }).leaf(t, key, nil), agents, ReasonBadUsage},
		{"server below an intermediate without clientAuth", deep.sub(t, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }).leaf(t, key, asServer), []string{alpnPeer}, ReasonBadUsage},
		{"key usage without signature", ours.leaf(t, key, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement }), agents, ReasonBadUsage},
		{"a CA", deep.leaf(t, key, func(c *x509.Certificate) { c.IsCA = true; c.KeyUsage |= x509.KeyUsageCertSign }), agents, ReasonBadUsage},
		{"P-384", ours.leaf(t, ecKey(t, elliptic.P384()), nil), agents, ReasonBadCertificate},
		{"RSA", ours.leaf(t, must[*rsa.PrivateKey](t)(rsa.GenerateKey(rand.Reader, 2048)), nil), agents, ReasonBadCertificate},
		{"upper-case name", ours.leaf(t, key, func(c *x509.Certificate) { c.Subject.CommonName = "Edge-1" }), agents, ReasonBadName},
		{"path as name", ours.leaf(t, key, func(c *x509.Certificate) { c.Subject.CommonName = "../edge" }), agents, ReasonBadName},
		{"no name", ours.leaf(t, key, func(c *x509.Certificate) { c.Subject.CommonName = "" }), agents, ReasonBadName},
		{"long name", ours.leaf(t, key, func(c *x509.Certificate) { c.Subject.CommonName = strings.Repeat("a", 254) }), agents, ReasonBadName},
		{"two names", ours.leaf(t, key, func(c *x509.Certificate) {
			c.Subject.CommonName = ""
			for _, n := range []string{"edge-2", "edge-1"} {
				c.Subject.ExtraNames = append(c.Subject.ExtraNames, atv(n))
			}
		}), agents, ReasonBadName},
		{"65 addresses", ours.leaf(t, key, func(c *x509.Certificate) {
			for i := range maxAddrs + 1 {
				c.IPAddresses = append(c.IPAddresses, net.IPv4(10, 0, 0, byte(i)))
			}
		}), agents, ReasonBadCertificate},
		{"many intermediates", ladder.leaf(t, key, nil), agents, ReasonBadCertificate},
		{"CA below one that forbids it", ours.sub(t, nil).leaf(t, key, nil), agents, ReasonBadCertificate},
		{"no protocol", ours.leaf(t, key, nil), nil, ReasonBadProtocol},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := shake(t, p.server.ServerTLS(protocols), stranger(c.cert, c.protos...))
			wantReason(t, o.serverErr, c.want)
			if _, ok := o.serverErr.(*Refusal); !ok {
				t.Fatalf("%T is wrapped: crypto/tls no longer returns the error of VerifyConnection as it is", o.serverErr)
			}
			if o.clientErr == nil {
				t.Fatal("the client was not told")
			}
		})
	}
}

func TestServerAcceptsUnusual(t *testing.T) {
	p := newPair(t)
	deep := root(t, nil)
	put(t, p.sFiles.CA, read(t, p.sFiles.CA)+string(certPEM(deep.cert.Raw)))
	if err := p.server.Reload(); err != nil {
		t.Fatal(err)
	}
	ladder := deep
	for range maxChain - 1 {
		ladder = ladder.sub(t, nil)
	}
	soon := time.Now().Add(10 * time.Minute).Truncate(time.Second)
	key := ecKey(t, elliptic.P256())
	for _, c := range []struct {
		name string
		cert tls.Certificate
		ok   func(Peer) bool
	}{
		{"as many intermediates as allowed", ladder.leaf(t, key, nil), func(p Peer) bool { return p.Name == "edge-1" }},
		{"session ends with the intermediate", deep.sub(t, func(c *x509.Certificate) { c.NotAfter = soon }).leaf(t, key, nil), func(p Peer) bool { return p.NotAfter.Equal(soon) }},
		{"a foreign organization beside ours", p.ca.issuer().leaf(t, key, func(c *x509.Certificate) {
			c.Subject.Organization = append(c.Subject.Organization, "acme")
		}), func(p Peer) bool { return p.Role == RoleAgent }},
		{"the same address in two forms", p.ca.issuer().leaf(t, key, func(c *x509.Certificate) {
			c.IPAddresses = []net.IP{net.ParseIP("10.0.0.9"), net.ParseIP("10.0.0.2").To4(), net.ParseIP("10.0.0.9").To4()}
		}), func(p Peer) bool { return slices.Equal(p.Addrs, addrs("10.0.0.2", "10.0.0.9")) }},
		{"a huge list of DNS names", p.ca.issuer().leaf(t, key, func(c *x509.Certificate) {
			for range 4000 {
				c.DNSNames = append(c.DNSNames, "some-name-or-other.example.org")
			}
		}), func(p Peer) bool { return p.Name == "edge-1" && p.Addrs == nil }},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := shake(t, p.server.ServerTLS(protocols), stranger(c.cert, alpnAgent))
			if o.serverErr != nil {
				t.Fatal(o.serverErr)
			}
			if peer := must[Peer](t)(p.server.Peer(o.server)); !c.ok(peer) {
				t.Fatalf("got %+v", peer)
			}
		})
	}
}

// One intermediate key with two certificates: x509 finds two chains.
func TestSessionEndWithSeveralChains(t *testing.T) {
	r := root(t, nil)
	key := ecKey(t, elliptic.P256())
	twins := func(edit func(n int, c *x509.Certificate)) []*x509.Certificate {
		var i issuer
		for n := range 2 {
			tmpl := &x509.Certificate{
				SerialNumber: big.NewInt(int64(n + 1)), Subject: pkix.Name{CommonName: "twin"}, BasicConstraintsValid: true, IsCA: true,
				NotBefore: time.Now().Add(-time.Hour), KeyUsage: x509.KeyUsageCertSign,
			}
			edit(n, tmpl)
			der := must[[]byte](t)(x509.CreateCertificate(rand.Reader, tmpl, r.cert, key.Public(), r.key))
			i = issuer{cert: must[*x509.Certificate](t)(x509.ParseCertificate(der)), key: key, rest: append(i.rest, der)}
		}
		var certs []*x509.Certificate
		for _, der := range i.leaf(t, key, func(c *x509.Certificate) {
			c.Subject.Organization, c.ExtKeyUsage = []string{string(RoleServer)}, RoleServer.usages()
		}).Certificate {
			certs = append(certs, must[*x509.Certificate](t)(x509.ParseCertificate(der)))
		}
		return certs
	}
	early, late := time.Now().Add(10*time.Minute).Truncate(time.Second), time.Now().Add(20*time.Minute).Truncate(time.Second)
	st := &state{bundle: bundle{roots: x509.NewCertPool()}}
	st.roots.AddCert(r.cert)
	ends := []time.Time{early, late}
	for _, c := range []struct {
		name   string
		usages [][]x509.ExtKeyUsage
		want   time.Time
	}{
		{"either does", [][]x509.ExtKeyUsage{nil, nil}, late},
		{"both are needed", [][]x509.ExtKeyUsage{{x509.ExtKeyUsageClientAuth}, {x509.ExtKeyUsageServerAuth}}, early},
		{"both are needed, the other way round", [][]x509.ExtKeyUsage{{x509.ExtKeyUsageServerAuth}, {x509.ExtKeyUsageClientAuth}}, early},
	} {
		certs := twins(func(n int, x *x509.Certificate) { x.NotAfter, x.ExtKeyUsage = ends[n], c.usages[n] })
		if p, err := st.verify(certs, time.Now()); err != nil || !p.NotAfter.Equal(c.want) {
			t.Errorf("%s: got %v, %v, want %v", c.name, p.NotAfter, err, c.want)
		}
	}
}

func TestCertificateOfAnotherWithoutItsKey(t *testing.T) {
	p := newPair(t)
	stolen := *p.agent.state.Load().leaf
	stolen.PrivateKey = ecKey(t, elliptic.P256())
	o := shake(t, p.server.ServerTLS(protocols), stranger(stolen, alpnAgent))
	if o.serverErr == nil {
		t.Fatal("believed")
	}
}

func TestOtherProtocolsAndVersions(t *testing.T) {
	p := newPair(t)
	cert := *p.agent.state.Load().leaf
	o := shake(t, p.server.ServerTLS(protocols), stranger(cert, "h2"))
	if o.serverErr == nil || o.clientErr == nil || !strings.Contains(o.clientErr.Error(), "no application protocol") {
		t.Fatalf("got %v, %v", o.serverErr, o.clientErr)
	}
	old := stranger(cert, alpnAgent)
	old.MaxVersion = tls.VersionTLS12
	if o := shake(t, p.server.ServerTLS(protocols), old); o.serverErr == nil || o.clientErr == nil {
		t.Fatal("TLS 1.2 accepted")
	}
	if o := shake(t, &tls.Config{MaxVersion: tls.VersionTLS12, Certificates: []tls.Certificate{*p.server.state.Load().leaf}, NextProtos: []string{alpnAgent}},
		p.agent.ClientTLS("localhost", alpnAgent)); o.clientErr == nil {
		t.Fatal("TLS 1.2 accepted by the client")
	}
}

func TestNoResumption(t *testing.T) {
	p := newPair(t)
	client := stranger(*p.agent.state.Load().leaf, alpnAgent)
	client.ClientSessionCache = tls.NewLRUClientSessionCache(4)
	server := p.server.ServerTLS(protocols)
	for range 3 {
		o := shake(t, server, client)
		if o.serverErr != nil || o.clientErr != nil {
			t.Fatal(o.serverErr, o.clientErr)
		}
		if o.server.DidResume || o.client.DidResume {
			t.Fatal("resumed")
		}
	}
}

func TestClientRefuses(t *testing.T) {
	p := newPair(t)
	ours := p.ca.issuer()
	key := ecKey(t, elliptic.P256())
	put(t, p.aFiles.Deny, "stolen\n")
	if err := p.agent.Reload(); err != nil {
		t.Fatal(err)
	}
	server := func(i issuer, edit func(*x509.Certificate)) tls.Certificate {
		return i.leaf(t, key, func(c *x509.Certificate) {
			c.Subject.CommonName, c.Subject.Organization = "cloud-1", []string{string(RoleServer)}
			c.ExtKeyUsage = RoleServer.usages()
			c.DNSNames, c.IPAddresses = []string{"localhost"}, []net.IP{net.IPv4(127, 0, 0, 1)}
			if edit != nil {
				edit(c)
			}
		})
	}
	for _, c := range []struct {
		name   string
		cert   tls.Certificate
		host   string
		protos []string
		want   string // "" means accepted
	}{
		{"control", server(ours, nil), "localhost", []string{alpnAgent}, ""},
		{"stranger's CA", server(newCA(t).issuer(), nil), "localhost", []string{alpnAgent}, ReasonUnknownCA},
		{"another DNS name", server(ours, nil), "cloud-1", []string{alpnAgent}, ReasonWrongHost},
		{"another address", server(ours, nil), "127.0.0.2", []string{alpnAgent}, ReasonWrongHost},
		{"no host", server(ours, nil), "", []string{alpnAgent}, ReasonWrongHost},
		{"agent as server", server(ours, func(c *x509.Certificate) { c.Subject.Organization = []string{string(RoleAgent)} }), "localhost", []string{alpnAgent}, ReasonWrongRole},
		{"clientAuth only", server(ours, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }), "localhost", []string{alpnAgent}, ReasonBadUsage},
		{"expired", server(ours, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }), "localhost", []string{alpnAgent}, ReasonExpired},
		{"not yet valid", server(ours, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }), "localhost", []string{alpnAgent}, ReasonNotYetValid},
		{"denied", server(ours, func(c *x509.Certificate) { c.Subject.CommonName = "stolen" }), "localhost", []string{alpnAgent}, ReasonDenied},
		{"no protocol", server(ours, nil), "localhost", nil, ReasonBadProtocol},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := shake(t, &tls.Config{Certificates: []tls.Certificate{c.cert}, NextProtos: c.protos}, p.agent.ClientTLS(c.host, alpnAgent))
			if c.want == "" {
				if o.clientErr != nil {
					t.Fatal(o.clientErr)
				}
				return
			}
			wantReason(t, o.clientErr, c.want)
		})
	}
}

func TestTimePasses(t *testing.T) {
	p := newPair(t)
	o := shake(t, p.server.ServerTLS(protocols), p.agent.ClientTLS("localhost", alpnAgent))
	if o.serverErr != nil {
		t.Fatal(o.serverErr)
	}
	end := must[Peer](t)(p.server.Peer(o.server)).NotAfter
	p.clock.set(time.Until(end) - time.Minute)
	must[Peer](t)(p.server.Peer(o.server))
	p.clock.set(time.Until(end) + time.Minute)
	_, err := p.server.Peer(o.server)
	wantReason(t, err, ReasonExpired)
	o = shake(t, p.server.ServerTLS(protocols), p.agent.ClientTLS("localhost", alpnAgent))
	wantReason(t, o.clientErr, ReasonExpired)
	// A clock that is half an hour behind the CA's is within the backdating, a whole day is not.
	p.clock.set(-30 * time.Minute)
	if o = shake(t, p.server.ServerTLS(protocols), p.agent.ClientTLS("localhost", alpnAgent)); o.serverErr != nil {
		t.Fatal(o.serverErr)
	}
	p.clock.set(-24 * time.Hour)
	o = shake(t, p.server.ServerTLS(protocols), p.agent.ClientTLS("localhost", alpnAgent))
	wantReason(t, o.clientErr, ReasonNotYetValid)
}

func TestPeerWithoutCertificate(t *testing.T) {
	_, err := newPair(t).server.Peer(tls.ConnectionState{})
	wantReason(t, err, ReasonNoCertificate)
}

func TestRefusalSaysWho(t *testing.T) {
	p := newPair(t)
	put(t, p.sFiles.Deny, "edge-1\n")
	if err := p.server.Reload(); err != nil {
		t.Fatal(err)
	}
	o := shake(t, p.server.ServerTLS(protocols), p.agent.ClientTLS("localhost", alpnAgent))
	r, ok := errors.AsType[*Refusal](o.serverErr)
	if !ok || r.Name != "edge-1" || r.Serial != p.agent.Self().Serial || !strings.Contains(r.Error(), "denied") {
		t.Fatalf("got %v", o.serverErr)
	}
}

func atv(name string) (a pkix.AttributeTypeAndValue) {
	a.Type, a.Value = asn1.ObjectIdentifier{2, 5, 4, 3}, name
	return a
}
