// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
	"github.com/edge-tunnel/edge-tunnel/pkg/identity"
	"github.com/edge-tunnel/edge-tunnel/pkg/intercept"
	"github.com/edge-tunnel/edge-tunnel/pkg/redirect"
	"github.com/edge-tunnel/edge-tunnel/pkg/route"
	"github.com/edge-tunnel/edge-tunnel/pkg/tunnel"
)

var _ kernelView = (*redirect.Kernel)(nil)

type viewFake struct {
	counters redirect.Counters
	err      error
}

func (v *viewFake) RedirectPorts() []uint16           { return []uint16{10270} }
func (v *viewFake) TunneledPorts() []uint16           { return alwaysTunneled[:] }
func (v *viewFake) Missing() []string                 { return nil }
func (v *viewFake) Pins() string                      { return "/pins" }
func (v *viewFake) Stats() (redirect.Counters, error) { return v.counters, v.err }

// makeServer is a server in which nothing runs.
func makeServer(t *testing.T) (*server, *viewFake) {
	t.Helper()
	p := newPKI(t)
	ids, err := identity.Open(p.files("cloud-1"), identity.Options{Role: identity.RoleServer})
	must(t, err)
	targets, _ := makeTargets(t, "", route.Rules{})
	conns, err := intercept.New(intercept.Config{
		Origin: func(*net.TCPConn) (intercept.Origin, error) { return intercept.Origin{}, intercept.ErrNotIntercepted },
		Lookup: targets.lookup, Open: openerOf(nil, nil),
	})
	must(t, err)
	t.Cleanup(conns.Close)
	tunnels, err := tunnel.NewServer(tunnel.ServerConfig{ID: "cloud-1", TLS: &tls.Config{MinVersion: tls.VersionTLS13}, Authorize: authorize(ids)})
	must(t, err)
	view := &viewFake{}
	return &server{
		ids: ids, kernel: view, known: targets.known, targets: targets, conns: conns, opened: admin.ConnectTimes(), tunnels: tunnels,
		network: newTestNetwork().network, guard: &guard{kernel: &hooksFake{}, log: silent},
		listen: &net.TCPAddr{IP: net.IPv4zero, Port: 10262}, life: t.Context(), started: time.Now(),
	}, view
}

func TestMetricsAreNamedWell(t *testing.T) {
	s, view := makeServer(t)
	names := map[string]bool{}
	metrics := append(s.metrics(), byNode(map[string]intercept.NodeStats{"edge-1": {Open: 1}, "edge-2": {Ended: 2}})...)
	for _, m := range metrics {
		if err := m.Validate(); err != nil {
			t.Error(err)
		}
		names[m.Name] = true
	}
	if !names["edge_tunnel_bpf_total"] {
		t.Error("the kernel's counters are missing")
	}
	view.err = errors.New("closed")
	for _, m := range s.metrics() {
		if m.Name == "edge_tunnel_bpf_total" {
			t.Error("counters that could not be read")
		}
	}
}

// Whatever the kernel counts is shown, under the name that it has there.
func TestEveryVerdictIsShown(t *testing.T) {
	var c redirect.Counters
	fields := reflect.ValueOf(&c).Elem()
	for i := range fields.NumField() {
		fields.Field(i).SetUint(uint64(i + 1))
	}
	shown := verdicts(c)
	if len(shown) != fields.NumField() {
		t.Errorf("%d of %d counters are shown", len(shown), fields.NumField())
	}
	for i := range fields.NumField() {
		name := fields.Type().Field(i).Name
		snake := strings.Map(func(r rune) rune {
			if r == '_' {
				return -1
			}
			return r
		}, strings.ToLower(name))
		found := false
		for verdict, n := range shown {
			found = found || n == uint64(i+1) && strings.ReplaceAll(verdict, "_", "") == snake
		}
		if !found {
			t.Errorf("%s is not shown under its name", name)
		}
	}
}

func TestConditionsAndHooks(t *testing.T) {
	s, _ := makeServer(t)
	conditions := map[string]admin.Condition{}
	for _, c := range s.conditions() {
		conditions[c.Name] = c
		if c.OK != (c.Reason == "") {
			t.Errorf("%+v", c)
		}
	}
	for _, name := range []string{"programs", "canary", "pods", "listeners", "targets", "certificate", "accepting"} {
		if _, ok := conditions[name]; !ok {
			t.Errorf("condition %s is missing", name)
		}
	}
	if c := conditions["canary"]; c.OK || c.Reason != "not tested yet" {
		t.Errorf("%+v", c)
	}
	s.guard.update(func(g *guardState) {
		g.hooks, g.proven, g.ipv4, g.ipv6 = errors.New("a\nb"), true, errors.New("four"), errors.New("six")
		g.programs = []redirect.HookProgram{{Hook: "connect4", Name: "theirs", ID: 7}, {Hook: "connect4", Ours: true, ID: 8, Link: 9}}
	})
	for _, c := range s.conditions() {
		if strings.Contains(c.Reason, "\n") {
			t.Errorf("%+v has more than a line", c)
		}
	}
	for _, h := range s.hooks() {
		want := admin.Hook{Name: h.Name}
		if h.Name == "connect4" {
			want = admin.Hook{Name: h.Name, Attached: true, Program: 8, Link: 9, Others: []string{"theirs (id 7)"}}
		}
		if !reflect.DeepEqual(h, want) {
			t.Errorf("%+v, want %+v", h, want)
		}
	}
	if n := len(s.hooks()); n != 7 {
		t.Errorf("%d hooks: those without our program are to be seen, too", n)
	}
	if status := s.status(); status.Ready || status.Role != admin.RoleServer || status.Name != "cloud-1" || status.Server.Pins != "/pins" {
		t.Errorf("%+v", status)
	}
}

func TestCanaryIsKnownByItsDestination(t *testing.T) {
	is := canaryOf(baseRules(nil))
	for addr, want := range map[string]bool{"192.0.2.1": true, "2001:db8::1": true, "192.0.2.2": false, "10.99.0.5": false} {
		o := intercept.Origin{Dst: netip.AddrPortFrom(netip.MustParseAddr(addr), 10250)}
		if is(nil, o) != want {
			t.Errorf("%s: %t", addr, !want)
		}
	}
}
