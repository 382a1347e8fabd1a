// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"html"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"net/netip"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Config is what a [Server] shows. All functions are required.
type Config struct {
	Name    string // of the program
	Version string

	Ready   func() []Condition // ready when all are OK; none is not ready
	Metrics func() []Metric
	State   func() State

	Pprof bool // serve /debug/pprof/
	Log   *slog.Logger
}

// Validate joins everything that is wrong.
func (c Config) Validate() error {
	var bad []error
	for _, field := range []struct {
		name    string
		missing bool
	}{{"Name", c.Name == ""}, {"Ready", c.Ready == nil}, {"Metrics", c.Metrics == nil}, {"State", c.State == nil}} {
		if field.missing {
			bad = append(bad, fmt.Errorf("admin: %s is not set", field.name))
		}
	}
	return errors.Join(bad...)
}

// Server answers GET and HEAD on the admin address:
//
//	/          what there is
//	/healthz   200 as long as the process answers
//	/readyz    200 or 503, one condition a line: "[+]name ok" or "[-]name: reason"; ?format=json for JSON
//	/metrics   for Prometheus
//	/state     everything, as JSON ([State])
//	/debug/pprof/  with Config.Pprof
type Server struct {
	config  Config
	handler http.Handler
	metrics http.Handler
}

// New returns a server for [Server.Serve].
func New(config Config) (*Server, error) {
	if err := config.Validate(); err != nil {
		return nil, err
	}
	config.Log = orDiscard(config.Log)
	s := &Server{config: config}

	registry := prometheus.NewRegistry()
	for _, c := range []prometheus.Collector{
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		pulled(config.Metrics),
		pulled(s.buildInfo),
	} {
		if err := registry.Register(c); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	metrics := promhttp.HandlerFor(registry, promhttp.HandlerOpts{
		// One bad metric must not blind whoever needs the others.
		ErrorHandling:       promhttp.ContinueOnError,
		ErrorLog:            slog.NewLogLogger(config.Log.Handler(), slog.LevelError),
		MaxRequestsInFlight: 4,
	})

	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", s.index)
	mux.HandleFunc("GET /healthz", s.healthz)
	mux.HandleFunc("GET /readyz", s.readyz)
	mux.Handle("GET /metrics", metrics)
	mux.HandleFunc("GET /state", s.state)
	if config.Pprof {
		mux.HandleFunc("GET /debug/pprof/", pprof.Index)
		mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	}
	s.handler, s.metrics = guarded(mux), metrics
	return s, nil
}

// Handler returns what [Server.Serve] serves.
func (s *Server) Handler() http.Handler { return s.handler }

// Metrics is the answer of /metrics alone, for a [Scrape].
func (s *Server) Metrics() http.Handler { return s.metrics }

// Serve answers on ln, which it closes, until ctx ends.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	timeout := 30 * time.Second
	if s.config.Pprof {
		timeout = 5 * time.Minute // a profile takes as long as it was asked to
	}
	if err := serve(ctx, ln, nil, s.handler, timeout, s.config.Log); err != nil {
		return fmt.Errorf("serve admin address: %w", err)
	}
	return nil
}

// guarded keeps web pages away: a page in a browser on this machine can have its own name resolve to a loopback
// address and then read what it finds there. Such a request carries the page's name as its host.
func guarded(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		local, _ := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
		if local != nil && isLoopback(local.String()) && !isLocalName(r.Host) {
			http.Error(w, "this address answers to its own name only", http.StatusForbidden)
			return
		}
		w.Header().Set("X-Content-Type-Options", "nosniff")
		w.Header().Set("Cache-Control", "no-store")
		w.Header().Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")
		next.ServeHTTP(w, r)
	})
}

func isLoopback(hostPort string) bool {
	addr, err := netip.ParseAddrPort(hostPort)
	return err == nil && addr.Addr().Unmap().IsLoopback()
}

func isLocalName(host string) bool {
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	_, err := netip.ParseAddr(strings.Trim(host, "[]"))
	return err == nil || host == "localhost"
}

func (s *Server) buildInfo() []Metric {
	return []Metric{{
		Name: "edge_tunnel_build_info", Help: "Always 1; the label has the version.", Kind: KindGauge,
		Labels: []string{"version"}, Samples: []Sample{{Labels: []string{s.config.Version}, Value: 1}},
	}}
}

func (s *Server) index(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	name := html.EscapeString(s.config.Name)
	fmt.Fprintf(w, "<!DOCTYPE html>\n<title>%s</title>\n<h1>%[1]s %s</h1>\n<ul>\n", name, html.EscapeString(s.config.Version))
	pages := [][2]string{
		{"/healthz", "the process answers"}, {"/readyz", "what it needs to be of use, and what is missing"},
		{"/metrics", "numbers for Prometheus"}, {"/state", "targets, tunnels and connections as JSON"},
	}
	if s.config.Pprof {
		pages = append(pages, [2]string{"/debug/pprof/", "profiles"})
	}
	for _, p := range pages {
		fmt.Fprintf(w, "<li><a href=\"%s\">%[1]s</a> %s</li>\n", p[0], p[1])
	}
	fmt.Fprint(w, "</ul>\n")
}

func (s *Server) healthz(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	fmt.Fprintln(w, "ok")
}

func (s *Server) readyz(w http.ResponseWriter, r *http.Request) {
	conditions := s.config.Ready()
	status := http.StatusOK
	if !AllOK(conditions) {
		status = http.StatusServiceUnavailable
	}
	if r.URL.Query().Get("format") == "json" {
		s.json(w, status, struct {
			Ready      bool        `json:"ready"`
			Conditions []Condition `json:"conditions"`
		}{status == http.StatusOK, conditions})
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(status)
	for _, c := range conditions {
		if c.OK {
			fmt.Fprintf(w, "[+]%s ok\n", c.Name)
		} else {
			fmt.Fprintf(w, "[-]%s: %s\n", c.Name, strings.ReplaceAll(c.Reason, "\n", "; "))
		}
	}
	if status == http.StatusOK {
		fmt.Fprintln(w, "ready")
	} else {
		fmt.Fprintln(w, "not ready")
	}
}

// AllOK says whether conditions make a daemon ready. None at all is not ready: it has not looked yet.
func AllOK(conditions []Condition) bool {
	for _, c := range conditions {
		if !c.OK {
			return false
		}
	}
	return len(conditions) > 0
}

func (s *Server) state(w http.ResponseWriter, _ *http.Request) {
	s.json(w, http.StatusOK, s.config.State())
}

func (s *Server) json(w http.ResponseWriter, status int, v any) {
	writeJSON(w, status, v, s.config.Log)
}

func writeJSON(w http.ResponseWriter, status int, v any, log *slog.Logger) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	if err := json.NewEncoder(w).Encode(v); err != nil {
		log.Debug("answer was not written", "error", err) // mostly a reader that went away
	}
}
