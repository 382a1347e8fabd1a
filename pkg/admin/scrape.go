// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"strings"
	"time"
)

// Scrape is the third door: GET /metrics and nothing else, over TLS, for who shows a bearer token that Review accepts. So it may be reached from other
// machines. Its listener is closed by Serve.
type Scrape struct {
	Metrics http.Handler // see [Server.Metrics]

	// Review says whether who has a token may have the metrics: nil, or an error that is shown, with a method Status() int that is the status of
	// HTTP. Without such a method it is 503.
	Review func(ctx context.Context, token string) error

	// Certificate is presented to clients; nil or an error: one that is made for this process, which nobody can verify.
	Certificate func() (*tls.Certificate, error)

	Log *slog.Logger
}

// Serve answers on ln until ctx ends.
func (s Scrape) Serve(ctx context.Context, ln net.Listener) error {
	own, err := selfMade()
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", s.answer)
	config := &tls.Config{
		MinVersion: tls.VersionTLS12,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			if s.Certificate != nil {
				if c, err := s.Certificate(); err == nil && c != nil {
					return c, nil
				}
			}
			return own, nil
		},
	}
	if err := serve(ctx, ln, config, mux, 30*time.Second, orDiscard(s.Log)); err != nil {
		return fmt.Errorf("serve metrics: %w", err)
	}
	return nil
}

func (s Scrape) answer(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("Cache-Control", "no-store")
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if token = strings.TrimSpace(token); !strings.EqualFold(scheme, "Bearer") || token == "" {
		w.Header().Set("WWW-Authenticate", "Bearer")
		http.Error(w, "show a token of a ServiceAccount: Authorization: Bearer TOKEN", http.StatusUnauthorized)
		return
	}
	if err := s.Review(r.Context(), token); err != nil {
		status := http.StatusServiceUnavailable
		var known interface{ Status() int }
		if errors.As(err, &known) {
			status = known.Status()
		}
		if status == http.StatusUnauthorized {
			w.Header().Set("WWW-Authenticate", "Bearer")
		}
		http.Error(w, err.Error(), status)
		return
	}
	s.Metrics.ServeHTTP(w, r)
}

// selfMade is a certificate that encrypts and proves nothing.
func selfMade() (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make certificate for metrics: %w", err)
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(now.UnixNano()), Subject: pkix.Name{CommonName: "edge-tunnel metrics, made by itself"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.AddDate(10, 0, 0),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("make certificate for metrics: %w", err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}
