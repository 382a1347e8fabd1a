// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/edge-tunnel/edge-tunnel/pkg/kube"
)

type configMapFake struct{ status kube.ConfigMapStatus }

func (f *configMapFake) Run(context.Context) error    { return nil }
func (f *configMapFake) Status() kube.ConfigMapStatus { return f.status }

func TestPortsOfConfigMap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var inForce []uint16
		failures := 0
		p := &ports{
			name: "kube-system/edge-tunnel-server-cfg", fixed: []uint16{9100, 10250, 10255}, first: 10270, file: newPortsFile(""), log: slog.New(slog.DiscardHandler),
			source: &configMapFake{kube.ConfigMapStatus{Complete: true, Exists: true}},
			set: func(list []uint16) error {
				if failures > 0 {
					failures--
					return errors.New("no memory")
				}
				inForce = list
				return nil
			},
		}
		want := func(what string, list ...uint16) {
			t.Helper()
			if !slices.Equal(inForce, list) {
				t.Errorf("%s: %v, want %v", what, inForce, list)
			}
		}
		wantView := func(kept bool, problems ...string) {
			t.Helper()
			v := p.view()
			if v.Kept != kept || len(v.Problems) != len(problems) {
				t.Fatalf("%+v, want kept %t and %q", v, kept, problems)
			}
			for i, problem := range problems {
				if !strings.Contains(v.Problems[i], problem) {
					t.Errorf("%q is not about %q", v.Problems[i], problem)
				}
			}
			for _, m := range p.metrics() {
				if err := m.Validate(); err != nil {
					t.Error(err)
				}
				if m.Name == "edge_tunnel_config_bad_entries" && len(m.Samples) != len(problems) {
					t.Errorf("%d samples of bad entries, want %d", len(m.Samples), len(problems))
				}
			}
		}

		p.changed(t.Context(), map[string]string{"http-proxy-ports": "9200, 9100", "https-proxy-ports": "9443"})
		want("good", 9100, 9200, 9443, 10250, 10255)
		wantView(false)
		p.changed(t.Context(), map[string]string{"http-proxy-ports": "9200, 10277, x", "dnat-ports-pair": "9051=10264"})
		want("half bad", 9051, 9100, 9200, 10250, 10255)
		wantView(false, "9051=10264", `"10277" is one of the redirect ports 10270-10277`, `"x" is no port`)
		p.changed(t.Context(), map[string]string{"http-proxy-ports": "garbage"})
		want("unusable", 9051, 9100, 9200, 10250, 10255)
		wantView(true, "garbage")
		failures = 3
		p.changed(t.Context(), nil)
		want("deleted", 9100, 10250, 10255)
		wantView(false)
		if failures != 0 {
			t.Error("it was not tried again")
		}

		// It ends when it should, also while the kernel refuses.
		failures = 1 << 30
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			p.changed(ctx, map[string]string{"http-proxy-ports": "1"})
			close(done)
		}()
		synctest.Wait()
		cancel()
		<-done
	})
}
