// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
)

type refusedToken struct{ status int }

func (refusedToken) Error() string { return "not with that token" }
func (r refusedToken) Status() int { return r.status }

func TestScrapeOverTLS(t *testing.T) {
	server, err := New(Config{
		Name: "test", Version: "1", Ready: func() []Condition { return nil }, State: func() State { return State{} },
		Metrics: func() []Metric { return []Metric{Gauge("edge_tunnel_test", "A test.", 7)} },
	})
	if err != nil {
		t.Fatal(err)
	}
	own, err := selfMade()
	if err != nil {
		t.Fatal(err)
	}
	none := errors.New("there is none yet")
	scrape := Scrape{
		Metrics: server.Metrics(),
		Review: func(_ context.Context, token string) error {
			switch token {
			case "good":
				return nil
			case "unknown":
				return refusedToken{http.StatusUnauthorized}
			case "weak":
				return refusedToken{http.StatusForbidden}
			}
			return errors.New("nobody knows")
		},
		Certificate: func() (*tls.Certificate, error) { return own, none },
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- scrape.Serve(ctx, ln) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	ask := func(method, path, authorization string) (status int, text, challenge, certificate string) {
		t.Helper()
		client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
		req, err := http.NewRequestWithContext(ctx, method, "https://"+ln.Addr().String()+path, http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = "edge-1.example.org" // it is no secret what it is called
		if authorization != "" {
			req.Header.Set("Authorization", authorization)
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(body), resp.Header.Get("WWW-Authenticate"), string(resp.TLS.PeerCertificates[0].Raw)
	}
	for _, c := range []struct {
		method, path, authorization string
		status                      int
		body                        string
	}{
		{"GET", "/metrics", "", 401, "Authorization: Bearer TOKEN"},
		{"GET", "/metrics", "Basic Z29vZA==", 401, "Authorization: Bearer TOKEN"},
		{"GET", "/metrics", "Bearer ", 401, "Authorization: Bearer TOKEN"},
		{"GET", "/metrics", "Bearer unknown", 401, "not with that token"},
		{"GET", "/metrics", "Bearer weak", 403, "not with that token"},
		{"GET", "/metrics", "Bearer other", 503, "nobody knows"},
		{"GET", "/metrics", "bearer good", 200, "edge_tunnel_test 7"},
		{"POST", "/metrics", "Bearer good", 405, ""},
		{"GET", "/state", "Bearer good", 404, ""},
		{"GET", "/", "Bearer good", 404, ""},
	} {
		status, body, challenge, certificate := ask(c.method, c.path, c.authorization)
		if status != c.status || !strings.Contains(body, c.body) || (status == 401) != (challenge == "Bearer") {
			t.Errorf("%s %s %q: %d %q %q", c.method, c.path, c.authorization, status, body, challenge)
		}
		if certificate == string(own.Certificate[0]) {
			t.Error("presents a certificate that there is not")
		}
	}
	none = nil
	if _, _, _, certificate := ask("GET", "/metrics", ""); certificate != string(own.Certificate[0]) {
		t.Error("does not present its certificate")
	}
	// Without TLS there is nothing.
	if resp, err := http.Get("http://" + ln.Addr().String() + "/metrics"); err == nil {
		resp.Body.Close()
		if resp.StatusCode != http.StatusBadRequest {
			t.Errorf("%v", resp.Status)
		}
	}
}
