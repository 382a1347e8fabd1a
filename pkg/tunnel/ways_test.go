// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"context"
	"errors"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

// dials are the addresses that an agent dialed. A name in it goes to a server, or nowhere: "hole" does not answer, all others refuse.
type dials struct {
	mu    sync.Mutex
	to    map[string]string
	order []string
}

func (d *dials) set(name, addr string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.to[name] = addr
}

func (d *dials) taken() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	order := d.order
	d.order = nil
	return order
}

func (d *dials) dial(ctx context.Context, network, name string) (net.Conn, error) {
	d.mu.Lock()
	d.order = append(d.order, name)
	to := d.to[name]
	d.mu.Unlock()
	switch {
	case to == "hole":
		<-ctx.Done()
		return nil, ctx.Err()
	case to == "":
		return nil, errors.New("refused")
	}
	return (&net.Dialer{}).DialContext(ctx, network, to)
}

func (d *dials) ways(servers ...string) func(*AgentConfig) {
	return func(c *AgentConfig) { c.Ways, c.Servers, c.Dial = true, servers, d.dial }
}

// Every way is tried before there is a pause, the first ones first; one that does not answer does not hold up the others for long.
func TestEveryWayIsTried(t *testing.T) {
	ca := newPKI(t)
	s := startServer(t, ca, "cloud-1", func(c *ServerConfig) { c.Servers = func() int { return 1 } })
	d := &dials{to: map[string]string{"hole:1": "hole", "good:1": s.addr}}
	a := startAgent(t, ca, "edge-1", nil, func(c *AgentConfig) {
		d.ways("gone:1", "hole:1", "good:1", "never:1")(c)
		c.Tunnels = 1
	})
	begin := time.Now()
	eventually(t, "a tunnel by the third", func() bool { return a.Tunnels()[0].State == "connected" })
	if took := time.Since(begin); took > a.time.dial {
		t.Errorf("took %v", took)
	}
	if got := d.taken(); !slices.Equal(got, []string{"gone:1", "hole:1", "good:1"}) {
		t.Errorf("dialed %v", got)
	}
	if info := a.Tunnels(); len(info) != 1 || info[0].Server != "good:1" || info[0].State != "connected" {
		t.Errorf("%+v", info)
	}

	// It is lost: the first one is the first again. Nothing leads in: all are named.
	d.set("hole:1", "")
	d.set("good:1", "")
	s.stop()
	eventually(t, "a whole round", func() bool {
		return len(a.Tunnels()) == 1 && a.Tunnels()[0].LastError != nil && contains(a.Tunnels()[0].LastError.Error(), "never:1")
	})
	got := d.taken()
	if len(got) < 4 || !slices.Equal(got[:4], []string{"gone:1", "hole:1", "good:1", "never:1"}) {
		t.Errorf("dialed %v", got)
	}
	for _, name := range []string{"gone:1: ", "hole:1: ", "good:1: "} {
		if text := a.Tunnels()[0].LastError.Error(); !contains(text, name) {
			t.Errorf("%s is not in %q", name, text)
		}
	}
}

// A further server is looked for by the next way, not by the one that leads to the same.
func TestFurtherServerByAnotherWay(t *testing.T) {
	ca := newPKI(t)
	two := func(c *ServerConfig) { c.Servers = func() int { return 2 } }
	s1, s2 := startServer(t, ca, "cloud-1", two), startServer(t, ca, "cloud-2", two)
	d := &dials{to: map[string]string{"balancer:1": s1.addr, "node-1:1": s1.addr, "node-2:1": s2.addr}}
	a := startAgent(t, ca, "edge-1", nil, d.ways("balancer:1", "node-1:1", "node-2:1"))
	eventually(t, "a tunnel to each", func() bool { return active(s1) == 1 && active(s2) == 1 })
	if st := a.Stats(); st.Failures != 0 {
		t.Errorf("%+v", st)
	}
	if ev := s1.Stats().Evictions + s2.Stats().Evictions; ev != 0 {
		t.Errorf("%d evictions", ev)
	}
}

// Ways become known while it runs. Who came by one that is none any more comes anew by another, without being away.
func TestWaysChange(t *testing.T) {
	ca := newPKI(t)
	s := startServer(t, ca, "cloud-1", func(c *ServerConfig) { c.Servers = func() int { return 1 } })
	d := &dials{to: map[string]string{"old:1": s.addr, "kept:1": s.addr}}
	a := startAgent(t, ca, "edge-1", nil, func(c *AgentConfig) {
		d.ways()(c)
		c.Tunnels = 1
	})
	eventually(t, "it says that there is no way", func() bool { return a.Tunnels()[0].LastError == errNoWay })
	if got := d.taken(); len(got) > 0 {
		t.Errorf("dialed %v", got)
	}
	for _, bad := range [][]string{nil, {"no-port"}, {"a:1", "a:1"}} {
		if err := a.SetServers(bad); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
	set := func(servers ...string) {
		t.Helper()
		if err := a.SetServers(servers); err != nil {
			t.Fatal(err)
		}
	}
	by := func(server string) func() bool {
		return func() bool {
			infos := a.Tunnels()
			return len(infos) == 1 && infos[0].State == "connected" && infos[0].Server == server && active(s) == 1
		}
	}
	set("old:1")
	eventually(t, "a tunnel by the old way", by("old:1"))

	st, err := s.Open(context.Background(), "edge-1")
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	if err := wire.WriteHeader(st, testHeader); err != nil {
		t.Fatal(err)
	}
	set("new:1", "old:1") // a better one appears, which is no reason to go
	d.taken()
	time.Sleep(300 * time.Millisecond)
	if got := d.taken(); len(got) > 0 {
		t.Errorf("dialed %v", got)
	}
	set("new:1", "kept:1") // "new" does not work yet
	eventually(t, "a tunnel by another way", func() bool {
		infos := a.Tunnels() // the former one still has its stream
		return len(infos) == 2 && infos[0].Server == "kept:1" && infos[0].State == "connected" && infos[1].Server == "old:1" && infos[1].State == "retired"
	})
	for range 3 {
		if err := roundTrip(s.Server, "edge-1", "x"); err != nil {
			t.Error(err)
		}
	}
	if ev := s.Stats().Evictions; ev != 0 {
		t.Errorf("%d evictions", ev)
	}
	_ = st.Reset()
	eventually(t, "the former one is gone", by("kept:1"))

	fixed := startAgent(t, ca, "edge-2", []string{s.addr}, nil)
	if err := fixed.SetServers([]string{"a:1"}); err == nil {
		t.Error("fixed servers were changed")
	}
}
