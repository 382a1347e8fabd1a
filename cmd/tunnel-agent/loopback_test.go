// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/edge-tunnel/edge-tunnel/pkg/kube/servercfg"
)

// mount is a folder as a kubelet makes it of a ConfigMap: what is seen are links through ..data, which is replaced at once.
type mount struct {
	t   *testing.T
	dir string
	n   int
}

func (m *mount) put(data map[string]string) {
	m.t.Helper()
	must := func(err error) {
		m.t.Helper()
		if err != nil {
			m.t.Fatal(err)
		}
	}
	m.n++
	version := fmt.Sprintf("..version-%d", m.n)
	must(os.Mkdir(filepath.Join(m.dir, version), 0o755))
	for key, text := range data {
		writeFile(m.t, filepath.Join(m.dir, version, key), text)
	}
	old, _ := os.Readlink(filepath.Join(m.dir, "..data"))
	must(os.Symlink(version, filepath.Join(m.dir, "..data_tmp")))
	must(os.Rename(filepath.Join(m.dir, "..data_tmp"), filepath.Join(m.dir, "..data")))
	seen, err := os.ReadDir(m.dir)
	must(err)
	for _, entry := range seen {
		if _, still := data[entry.Name()]; !still && !strings.HasPrefix(entry.Name(), "..") {
			must(os.Remove(filepath.Join(m.dir, entry.Name())))
		}
	}
	for key := range data {
		if err := os.Symlink(filepath.Join("..data", key), filepath.Join(m.dir, key)); err != nil && !os.IsExist(err) {
			m.t.Fatal(err)
		}
	}
	if old != "" {
		must(os.RemoveAll(filepath.Join(m.dir, old)))
	}
}

func TestLoopbackFollowsTheConfigMap(t *testing.T) {
	m := &mount{t: t, dir: t.TempDir()}
	l := newLoopback([]uint16{10250}, m.dir, slog.New(slog.DiscardHandler))
	local := func(text string) map[string]string {
		return map[string]string{servercfg.KeyLocalhost: text, servercfg.KeyHTTP: "is not its business"}
	}
	for i, c := range []struct {
		data  map[string]string
		looks int
		want  []uint16
		bad   int
		kept  bool
	}{
		{map[string]string{servercfg.KeyHTTP: "9100"}, 1, []uint16{10250}, 0, false},
		{local("10266, 9100"), 1, []uint16{9100, 10266}, 0, false},
		{local("9100, http, 0, 9100,"), 1, []uint16{9100}, 2, false},
		{local("9100=10264"), 1, []uint16{9100}, 1, true}, // nothing understood
		{local("9200"), 1, []uint16{9200}, 0, false},
		{nil, 1, []uint16{9200}, 0, false}, // gone: to be confirmed
		{nil, 2, []uint16{10250}, 0, false},
		{local(""), 1, []uint16{10250}, 0, false},
		{local("9300"), 1, []uint16{9300}, 0, false},
		{local(strings.Repeat("1,", maxConfigMap)), 1, []uint16{9300}, 0, false},
		{local("9400"), 1, []uint16{9400}, 0, false},
	} {
		m.put(c.data)
		for range c.looks {
			l.look()
		}
		v := l.view()
		if got := l.ports(); !slices.Equal(got, c.want) || len(v.Problems) != c.bad || v.Kept != c.kept {
			t.Errorf("%d: ports %v, %+v; want %v", i, got, v, c.want)
		}
		for _, port := range []uint16{9100, 9200, 10250} {
			if l.has(port) != slices.Contains(c.want, port) {
				t.Errorf("%d: has(%d) is %v", i, port, l.has(port))
			}
		}
		if err := v.Error; (err == "") != (c.data == nil || len(c.data[servercfg.KeyLocalhost]) < 1000) || (err == "") != v.Since.IsZero() {
			t.Errorf("%d: error %q since %v", i, err, v.Since)
		}
	}

	// A folder that is not there says nothing.
	if err := os.Rename(m.dir, m.dir+"-away"); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		l.look()
	}
	if v := l.view(); !slices.Equal(l.ports(), []uint16{9400}) || v.Error == "" {
		t.Errorf("without a folder: %v, %+v", l.ports(), v)
	}
	if m := l.metrics(); m[0].Name != "edge_tunnel_agent_config_stale_seconds" || m[0].Samples[0].Value <= 0 {
		t.Errorf("%+v", m[0])
	}
}

// The ports change while the agent runs, and connections go by them.
func TestConfigDir(t *testing.T) {
	dir := pki(t)
	cloud := startCloud(t, dir)
	service := listen(t)
	m := &mount{t: t, dir: t.TempDir()}
	m.put(map[string]string{servercfg.KeyLocalhost: "1, http"})
	a := startAgent(t, dir, cloud.addr, "--config-dir", m.dir)
	a.waitReady()
	dst := netip.AddrPortFrom(natAddr, port(service))
	cloud.dialReset(t, dst)
	if _, metrics := a.get("/metrics"); !strings.Contains(metrics, `edge_tunnel_agent_config_bad_entries{entry="http",key="localhost-proxy-ports"} 1`+"\n") {
		t.Error(metrics)
	}

	m.put(map[string]string{servercfg.KeyLocalhost: fmt.Sprint(port(service))})
	eventually(t, "new ports", func() bool { return slices.Equal(a.ports(), []uint16{port(service)}) })
	client := cloud.dial(t, dst)
	far := accept(t, service)
	send(t, far, "hello")
	expect(t, client, "hello")
}

func (a *agent) ports() []uint16 {
	a.t.Helper()
	status, err := a.control.Status(context.Background())
	if err != nil {
		a.t.Fatal(err)
	}
	return status.Agent.LocalhostPorts
}
