// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/edge-tunnel/edge-tunnel/test/foreign"
)

// curl, as the host and as a pod, at the edge's IPv4 address, at its IPv6 address, and at the v4-mapped one.
func TestCurl(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	pod := s.cloud.pod("pod-1")
	s.edge.startForeign(s.edge.at(servicePort), foreign.NodeExporter(servicePort), nil)
	mapped := netip.AddrPortFrom(netip.AddrFrom16(s.edge.V4.As16()), servicePort)
	for _, h := range []*host{s.cloud, pod} {
		for _, to := range []netip.AddrPort{s.edge.at(servicePort), s.edge.at6(servicePort), mapped} {
			out := h.mustOutput("curl", "-sS", "--max-time", "10", "-w", "peer %{remote_ip}:%{remote_port}\n", fmt.Sprintf("http://%s/metrics", to))
			if !strings.Contains(out, "node_uname_info") {
				t.Errorf("%s: http://%s/metrics is %s", h.Name, to, out)
			}
			// The peer as getpeername() has it; curl leaves the brackets away.
			if want := fmt.Sprintf("peer %s:%d\n", to.Addr(), to.Port()); !strings.Contains(out, want) {
				t.Errorf("%s: no %q in %s", h.Name, want, out)
			}
		}
	}
	s.server.waitEnded("closed", 6)
	for _, r := range s.server.records() {
		if r.Comm != "curl" || r.Reason != "closed" {
			t.Errorf("record %+v", r)
		}
	}
}

// TLS goes from curl to the edge's own server: its certificate, in which only the edge's addresses are, arrives, and nobody else's.
func TestCurlTLS(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	pod := s.cloud.pod("pod-1")
	writeCertificate(t, filepath.Join(s.lab.Dir(), "edge-service"), s.edge.addrs()...)
	args, err := foreign.HTTP2(s.lab.Dir(), servicePort, "edge-service.crt", "edge-service.key")
	s.edge.startForeign(s.edge.at(servicePort), args, err)
	page := writePage(t, s.world, 100<<10)

	for _, h := range []*host{s.cloud, pod} {
		for _, to := range []netip.AddrPort{s.edge.at(servicePort), s.edge.at6(servicePort)} {
			url := fmt.Sprintf("https://%s/page", to)
			out, err := h.output("curl", "-sS", "--max-time", "10", "--cacert", "edge-service.crt", url)
			if err != nil || out != page {
				t.Errorf("%s of %d bytes, want %d: %v", url, len(out), len(page), err)
			}
			// curl's status 60: the certificate is not signed by that CA. It is the service's own, not one of the tunnel.
			if out, err := h.output("curl", "-sS", "--max-time", "10", "--cacert", "pki/ca.crt", url); err == nil || !strings.Contains(out, "curl: (60)") {
				t.Errorf("%s with the tunnel's CA: %v, %s", url, err, out)
			}
		}
	}
}

// HTTP/2: a page, an upload that comes back, and thousands of requests in many streams of several connections.
func TestHTTP2(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	pod := s.cloud.pod("pod-1")
	args, err := foreign.HTTP2(s.lab.Dir(), servicePort, "", "")
	s.edge.startForeign(s.edge.at(servicePort), args, err)
	page := writePage(t, s.world, 1<<20)

	for _, h := range []*host{s.cloud, pod} {
		for _, to := range []netip.AddrPort{s.edge.at(servicePort), s.edge.at6(servicePort)} {
			url := fmt.Sprintf("http://%s/page", to)
			curl := []string{"curl", "-sS", "--max-time", "30", "--http2-prior-knowledge", "-w", "|%{http_version} %{http_code}"}
			want := page + "|2 200"
			if out, err := h.output(append(curl, url)...); err != nil || out != want {
				t.Errorf("%s from %s: %d bytes, want %d: %v", url, h.Name, len(out), len(want), err)
			}
			// Both directions at once.
			if out, err := h.output(append(curl, "--data-binary", "@www/page", url)...); err != nil || out != want {
				t.Errorf("upload to %s from %s: %d bytes came back, want %d: %v", url, h.Name, len(out), len(want), err)
			}
		}
		out := h.mustOutput("h2load", "--requests=2000", "--clients=8", "--max-concurrent-streams=64", "--threads=1", "http://"+s.edge.at(servicePort).String()+"/small")
		if !strings.Contains(out, "2000 succeeded, 0 failed, 0 errored, 0 timeout") || !strings.Contains(out, "status codes: 2000 2xx") {
			t.Errorf("h2load from %s: %s", h.Name, out)
		}
	}
	s.server.waitIdle()
	s.agent.waitIdle()
}

// curl sends mail: it waits until the far end has spoken, and in each later step too.
func TestCurlSMTP(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	pod := s.cloud.pod("pod-1")
	got := make(chan string, 1)
	s.edge.serve(servicePort, func(conn *net.TCPConn) { got <- receiveMail(conn) })
	s.edge.serveAt(s.edge.at6(servicePort), func(conn *net.TCPConn) { got <- receiveMail(conn) })
	const letter = "Subject: hello\r\n\r\nfrom the cloud\r\n"
	if err := os.WriteFile(filepath.Join(s.lab.Dir(), "letter"), []byte(letter), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, h := range []*host{s.cloud, pod} {
		for _, to := range []netip.AddrPort{s.edge.at(servicePort), s.edge.at6(servicePort)} {
			out, err := h.output("curl", "-sS", "--max-time", "20", "--mail-from", "a@example.org", "--mail-rcpt", "b@example.org",
				"--upload-file", "letter", "smtp://"+to.String())
			if err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			if mail := <-got; mail != letter {
				t.Errorf("%s by smtp://%s: received %q", h.Name, to, mail)
			}
		}
	}
}

// receiveMail is a small SMTP server, for one letter.
func receiveMail(conn *net.TCPConn) string {
	answer := func(text string) { _, _ = io.WriteString(conn, text+"\r\n") }
	answer("220 edge")
	var letter strings.Builder
	lines := bufio.NewScanner(conn)
	for lines.Scan() {
		switch verb, _, _ := strings.Cut(strings.ToUpper(lines.Text()), " "); verb {
		case "DATA":
			answer("354 go on")
			for lines.Scan() && lines.Text() != "." {
				letter.WriteString(lines.Text() + "\r\n")
			}
			answer("250 taken")
		case "QUIT":
			answer("221 bye")
			return letter.String()
		default:
			answer("250 fine")
		}
	}
	return letter.String() + "(the connection ended)"
}

// writePage puts /page of that size, and a small one, where [foreign.HTTP2] serves them, and returns what /page is.
func writePage(t *testing.T, w *world, size int) string {
	t.Helper()
	page := make([]byte, size)
	_, _ = rand.Read(page)
	for i := range page {
		page[i] = 'a' + page[i]%26
	}
	for name, content := range map[string][]byte{"page": page, "small": page[:64]} {
		if err := os.WriteFile(filepath.Join(w.lab.Dir(), "www", name), content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return string(page)
}

// writeCertificate writes PATH.crt and PATH.key: a certificate that its own key has signed, for the addresses.
func writeCertificate(t *testing.T, path string, addrs ...netip.Addr) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "edge service"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true, IsCA: true,
	}
	for _, a := range addrs {
		template.IPAddresses = append(template.IPAddresses, a.AsSlice())
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{".crt": {Type: "CERTIFICATE", Bytes: cert}, ".key": {Type: "PRIVATE KEY", Bytes: secret}} {
		if err := os.WriteFile(path+name, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}
