// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/identity"
	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

// forged is a certificate that the small CA would not issue. Zero values are what a good agent's certificate has.
type forged struct {
	name     string        // of the files, and of the holder
	role     identity.Role // RoleAgent
	usages   []x509.ExtKeyUsage
	addrs    []netip.Addr
	notAfter time.Time // in an hour
}

// forge signs a certificate with the world's CA and writes NAME.crt and NAME.key beside the others.
func (w *world) forge(f forged) {
	w.t.Helper()
	ca, err := tls.LoadX509KeyPair(filepath.Join(w.pki, "ca.crt"), filepath.Join(w.pki, "ca.key"))
	if err != nil {
		w.t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		w.t.Fatal(err)
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 100))
	if err != nil {
		w.t.Fatal(err)
	}
	if f.role == "" {
		f.role = identity.RoleAgent
	}
	if f.usages == nil {
		f.usages = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	}
	if f.notAfter.IsZero() {
		f.notAfter = time.Now().Add(time.Hour)
	}
	template := x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: f.name, Organization: []string{string(f.role)}},
		NotBefore:    time.Now().Add(-time.Hour), NotAfter: f.notAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: f.usages, BasicConstraintsValid: true,
	}
	for _, a := range f.addrs {
		template.IPAddresses = append(template.IPAddresses, net.IP(a.AsSlice()))
	}
	crt, err := x509.CreateCertificate(rand.Reader, &template, ca.Leaf, key.Public(), ca.PrivateKey)
	if err != nil {
		w.t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, file := range []struct {
		end   string
		block pem.Block
	}{{".crt", pem.Block{Type: "CERTIFICATE", Bytes: crt}}, {".key", pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}}} {
		if err := os.WriteFile(filepath.Join(w.pki, f.name+file.end), pem.EncodeToMemory(&file.block), 0o600); err != nil {
			w.t.Fatal(err)
		}
	}
}

// pair loads NAME.crt and NAME.key.
func (w *world) pair(name string) tls.Certificate {
	w.t.Helper()
	pair, err := tls.LoadX509KeyPair(filepath.Join(w.pki, name+".crt"), filepath.Join(w.pki, name+".key"))
	if err != nil {
		w.t.Fatal(err)
	}
	return pair
}

// agentTLS is how an agent with that certificate dials, but that it believes any server. No name is no certificate.
func (w *world) agentTLS(name string) *tls.Config {
	w.t.Helper()
	pair := tls.Certificate{}
	if name != "" {
		pair = w.pair(name)
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{wire.ALPNAgent}, InsecureSkipVerify: true,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil },
	}
}

// logIn does what an agent does before its session starts, and hangs up: the server knows the certificate's claims from then on.
func (h *host) logIn(server *host, cert string) {
	h.t.Helper()
	conn := tls.Client(h.mustDial(server.at(wire.Port)), h.w.agentTLS(cert))
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		h.t.Fatal(err)
	}
	login := wire.Login{MinVersion: wire.MinVersion, MaxVersion: wire.Version}
	_, _ = rand.Read(login.Instance[:])
	if err := wire.WriteLogin(conn, login); err != nil {
		h.t.Fatalf("log in as %s: %v", cert, err)
	}
	if reply, err := wire.ReadLoginReply(conn); err != nil || reply.Status != wire.LoginOK {
		h.t.Fatalf("log in as %s: %v, %v", cert, reply.Status, err)
	}
}

// replaceFile puts contents in place as people are told to: with a rename, so that nobody reads half of it.
func replaceFile(t *testing.T, path, content string) {
	t.Helper()
	temp := path + ".new"
	if err := os.WriteFile(temp, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(temp, path); err != nil {
		t.Fatal(err)
	}
}
