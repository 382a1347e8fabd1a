// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	alpnAgent = "edge-tunnel/1"
	alpnPeer  = "edge-tunnel-peer/1"
)

var protocols = map[string]Role{alpnAgent: RoleAgent, alpnPeer: RoleServer}

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// clock is one that tests can set; its zero value is the real time.
type clock struct{ ahead atomic.Int64 }

func (c *clock) now() time.Time          { return time.Now().Add(time.Duration(c.ahead.Load())) }
func (c *clock) set(ahead time.Duration) { c.ahead.Store(int64(ahead)) }

func newCA(t testing.TB) *CA {
	t.Helper()
	return must[*CA](t)(InitCA(filepath.Join(t.TempDir(), "pki"), CAOptions{}))
}

func addrs(texts ...string) (out []netip.Addr) {
	for _, s := range texts {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

// files has its own copy of what was issued, so that a test can replace each.
func files(t testing.TB, ca *CA, i Issued) Files {
	t.Helper()
	dir := t.TempDir()
	f := Files{CA: filepath.Join(dir, "ca.crt"), Cert: filepath.Join(dir, "tls.crt"), Key: filepath.Join(dir, "tls.key"), Deny: filepath.Join(dir, "deny")}
	copyFile(t, ca.CertFile(), f.CA)
	copyFile(t, i.CertFile, f.Cert)
	copyFile(t, i.KeyFile, f.Key)
	put(t, f.Deny, "# nobody\n")
	return f
}

func read(t testing.TB, path string) string {
	t.Helper()
	return string(must[[]byte](t)(os.ReadFile(path)))
}

func put(t testing.TB, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func copyFile(t testing.TB, from, to string) {
	t.Helper()
	put(t, to, read(t, from))
}

// pair is a server and an agent of one CA. The server is dialed as localhost or 127.0.0.1.
type pair struct {
	ca             *CA
	clock          clock
	server, agent  *Store
	sFiles, aFiles Files
}

func newPair(t *testing.T) *pair {
	t.Helper()
	p := &pair{ca: newCA(t)}
	p.sFiles = files(t, p.ca, must[Issued](t)(p.ca.IssueServer("cloud-1", []string{"localhost", "127.0.0.1", "::1"})))
	p.aFiles = files(t, p.ca, must[Issued](t)(p.ca.IssueAgent("edge-1", addrs("10.99.0.5", "fd00::5"), false)))
	p.server = must[*Store](t)(Open(p.sFiles, Options{Role: RoleServer, Clock: p.clock.now}))
	p.agent = must[*Store](t)(Open(p.aFiles, Options{Role: RoleAgent, Clock: p.clock.now}))
	return p
}

// outcome is a handshake over a real connection. The connections stay open until the test ends.
type outcome struct {
	server, client       tls.ConnectionState
	serverErr, clientErr error // of the handshake; the client's includes its first read
}

func shake(t *testing.T, server, client *tls.Config) outcome {
	t.Helper()
	ln := must[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	defer ln.Close()
	var o outcome
	done := make(chan struct{})
	go func() {
		defer close(done)
		c, err := ln.Accept()
		if err != nil {
			o.serverErr = err
			return
		}
		t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(20 * time.Second))
		s := tls.Server(c, server)
		if o.serverErr = s.HandshakeContext(t.Context()); o.serverErr != nil {
			c.Close()
			return
		}
		o.server = s.ConnectionState()
		_, o.serverErr = s.Write([]byte("x"))
	}()
	c := must[net.Conn](t)(net.Dial("tcp", ln.Addr().String()))
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(20 * time.Second))
	k := tls.Client(c, client)
	if o.clientErr = k.HandshakeContext(t.Context()); o.clientErr == nil {
		o.client = k.ConnectionState()
		_, o.clientErr = k.Read(make([]byte, 1))
	} else {
		c.Close()
	}
	<-done
	return o
}

func wantReason(t testing.TB, err error, want string) {
	t.Helper()
	var r interface{ Reason() string }
	if !errors.As(err, &r) || r.Reason() != want {
		t.Fatalf("got error %v, want reason %q", err, want)
	}
}

// issuer forges certificates that the small CA would not make.
type issuer struct {
	cert *x509.Certificate
	key  crypto.Signer
	rest [][]byte // intermediates up to the root
}

func (ca *CA) issuer() issuer { return issuer{cert: ca.cert, key: ca.key} }

func ecKey(t testing.TB, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	return must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(curve, rand.Reader))
}

// leaf makes a good agent's certificate, changed by edit.
func (i issuer) leaf(t testing.TB, key crypto.Signer, edit func(*x509.Certificate)) tls.Certificate {
	t.Helper()
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(0xabc), Subject: pkix.Name{CommonName: "edge-1", Organization: []string{string(RoleAgent)}},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	if edit != nil {
		edit(tmpl)
	}
	der := must[[]byte](t)(x509.CreateCertificate(rand.Reader, tmpl, i.cert, key.Public(), i.key))
	return tls.Certificate{Certificate: append([][]byte{der}, i.rest...), PrivateKey: key}
}

// sub makes an intermediate CA.
func (i issuer) sub(t testing.TB, edit func(*x509.Certificate)) issuer {
	t.Helper()
	key := ecKey(t, elliptic.P256())
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "sub of " + i.cert.Subject.CommonName},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), BasicConstraintsValid: true, IsCA: true,
		KeyUsage: x509.KeyUsageCertSign,
	}
	if edit != nil {
		edit(tmpl)
	}
	der := must[[]byte](t)(x509.CreateCertificate(rand.Reader, tmpl, i.cert, key.Public(), i.key))
	return issuer{cert: must[*x509.Certificate](t)(x509.ParseCertificate(der)), key: key, rest: append([][]byte{der}, i.rest...)}
}

// root makes a root that may have intermediates below it.
func root(t testing.TB, edit func(*x509.Certificate)) issuer {
	t.Helper()
	key := ecKey(t, elliptic.P256())
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "root"}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(48 * time.Hour), BasicConstraintsValid: true, IsCA: true, KeyUsage: x509.KeyUsageCertSign,
	}
	if edit != nil {
		edit(tmpl)
	}
	der := must[[]byte](t)(x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key))
	return issuer{cert: must[*x509.Certificate](t)(x509.ParseCertificate(der)), key: key}
}
