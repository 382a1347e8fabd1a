// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/edge-tunnel/edge-tunnel/test/foreign"
)

// Prometheus in a pod scrapes the node exporter of the edge at both of its addresses, sees it go with the agent and come back.
func TestPrometheusScrapes(t *testing.T) {
	t.Parallel()
	const port = 9090
	s := newSite(t)
	pod := s.cloud.pod("pod-1")
	s.edge.startForeign(s.edge.at(servicePort), foreign.NodeExporter(servicePort), nil)
	args, err := foreign.Prometheus(s.lab.Dir(), port, 500*time.Millisecond, s.edge.at(servicePort), s.edge.at6(servicePort))
	pod.startForeign(netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port), args, err)

	// values are the results of a query, by the address that was scraped.
	values := func(query string) (map[string]string, error) {
		out, err := pod.output("curl", "-sS", "--get", "--data-urlencode", "query="+query, fmt.Sprintf("http://127.0.0.1:%d/api/v1/query", port))
		if err != nil {
			return nil, err
		}
		var answer struct {
			Data struct {
				Result []struct {
					Metric struct{ Instance string }
					Value  [2]any
				}
			}
		}
		if err := json.Unmarshal([]byte(out), &answer); err != nil {
			return nil, fmt.Errorf("%w: %s", err, out)
		}
		list := make(map[string]string)
		for _, r := range answer.Data.Result {
			list[r.Metric.Instance] = fmt.Sprint(r.Value[1])
		}
		return list, nil
	}
	waitUp := func(want string) {
		t.Helper()
		eventually(t, patience, func() error {
			up, err := values("up")
			if err == nil && (up[s.edge.at(servicePort).String()] != want || up[s.edge.at6(servicePort).String()] != want) {
				err = fmt.Errorf("up is %v, want %s for %s and %s", up, want, s.edge.at(servicePort), s.edge.at6(servicePort))
			}
			return err
		})
	}
	waitUp("1")
	names, err := values("node_uname_info")
	if err != nil || len(names) != 2 {
		t.Errorf("node_uname_info of both addresses: %v, %v", names, err)
	}
	m := s.server.metrics()
	if m.bpf("redirected_pod4") == 0 || m.bpf("redirected_pod6") == 0 {
		t.Errorf("the scrapes were not redirected from the pod in both families: %v", m)
	}

	s.agent.Kill()
	waitUp("0")
	s.agent = s.edge.startAgent([]*host{s.cloud})
	waitUp("1")
}
