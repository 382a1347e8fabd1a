// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// pki is a throw-away certificate authority.
type pki struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
	mu   sync.Mutex
	next int64
}

func newPKI(t testing.TB) *pki {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	p := &pki{cert: cert, key: key, pool: x509.NewCertPool(), next: 1}
	p.pool.AddCert(cert)
	return p
}

func (p *pki) issue(t testing.TB, name string, life time.Duration) tls.Certificate {
	t.Helper()
	p.mu.Lock()
	p.next++
	serial := p.next
	p.mu.Unlock()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(life),
		DNSNames: []string{"server"}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, p.cert, &key.PublicKey, p.key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

func (p *pki) server(t testing.TB, name string) *tls.Config {
	return &tls.Config{
		Certificates: []tls.Certificate{p.issue(t, name, time.Hour)}, ClientCAs: p.pool,
		ClientAuth: tls.RequireAndVerifyClientCert, MinVersion: tls.VersionTLS13, NextProtos: []string{wire.ALPNAgent},
	}
}

func (p *pki) client(t testing.TB, name string, life time.Duration) *tls.Config {
	return &tls.Config{
		Certificates: []tls.Certificate{p.issue(t, name, life)}, RootCAs: p.pool, ServerName: "server",
		MinVersion: tls.VersionTLS13, NextProtos: []string{wire.ALPNAgent},
	}
}

// tcpPair is a connected pair over loopback.
func tcpPair(t testing.TB) (a, b net.Conn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	a, err = net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, err = ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

func testSettings() settings {
	return settings{keepAlive: 10 * time.Second, maxStreams: 4096, maxWindow: 8 << 20, budget: 32 << 20, allWindows: 512 << 20}
}

// pair is a session with both of its ends in this process.
type pair struct {
	server, agent           *session
	serverTotal, agentTotal counters
	accepted                chan *Stream
	agentRaw, serverRaw     net.Conn
	wg                      sync.WaitGroup
}

func newPair(t testing.TB, set settings) *pair {
	t.Helper()
	a, b := tcpPair(t)
	return newPairOver(t, set, a, b)
}

// newPairSeen has what the server hands to TLS pass through see, which writes it on.
func newPairSeen(t testing.TB, set settings, see func(b []byte, to io.Writer) (int, error)) *pair {
	t.Helper()
	a, b := tcpPair(t)
	return newPairWith(t, set, a, b, func(c io.ReadWriter) io.ReadWriter {
		return readWriter{c, writerFunc(func(b []byte) (int, error) { return see(b, c) })}
	})
}

func newPairOver(t testing.TB, set settings, agentConn, serverConn net.Conn) *pair {
	t.Helper()
	return newPairWith(t, set, agentConn, serverConn, func(c io.ReadWriter) io.ReadWriter { return c })
}

func newPairWith(t testing.TB, set settings, agentConn, serverConn net.Conn, server func(io.ReadWriter) io.ReadWriter) *pair {
	t.Helper()
	ca := newPKI(t)
	p := &pair{accepted: make(chan *Stream, 4096), agentRaw: agentConn, serverRaw: serverConn}
	ar, sr := newRaw(agentConn), newRaw(serverConn)
	at, st := tls.Client(ar, ca.client(t, "edge", time.Hour)), tls.Server(sr, ca.server(t, "cloud"))
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	errc := make(chan error, 1)
	go func() { errc <- st.HandshakeContext(ctx) }()
	if err := at.HandshakeContext(ctx); err != nil {
		t.Fatal(err)
	}
	if err := <-errc; err != nil {
		t.Fatal(err)
	}
	p.server = newSession(server(st), sr, true, set, &p.serverTotal, discardLog)
	p.agent = newSession(at, ar, false, set, &p.agentTotal, discardLog)
	p.wg.Go(func() { p.server.run(nil) })
	p.wg.Go(func() {
		p.agent.run(func() {
			for {
				s, err := p.agent.accept()
				if err != nil {
					return
				}
				p.accepted <- s
			}
		})
	})
	t.Cleanup(p.close)
	return p
}

var discardLog = slog.New(slog.DiscardHandler)

func (p *pair) close() {
	p.server.kill(errClosed)
	p.agent.kill(errClosed)
	p.wg.Wait()
}

// open makes one stream and returns both of its ends.
func (p *pair) open(t testing.TB) (server, agent *Stream) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	s, err := p.server.open(ctx)
	if err != nil {
		t.Fatal(err)
	}
	select {
	case a := <-p.accepted:
		return s, a
	case <-ctx.Done():
		t.Fatalf("stream did not arrive; server: %v, agent: %v", p.server.link.cause(), p.agent.link.cause())
	}
	return nil, nil
}

// eventually waits for something that other goroutines bring about.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	end := time.Now().Add(10 * time.Second)
	for !ok() {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func mustAddrPort(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

func contains(s, part string) bool { return strings.Contains(s, part) }
