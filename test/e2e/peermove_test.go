// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

// peering is some servers that are peers of each other, and an edge node that all of them know. Its agent is not started yet; it has one
// address for all servers, as behind a load balancer.
type peering struct {
	*world
	clouds  []*host
	servers []*daemon
	home    *site
	edge    *host
	echo    netip.AddrPort
}

// balanced is the servers' common address; the router of the edge site is the load balancer.
var balanced = netip.MustParseAddrPort("198.18.0.1:10262")

func newPeering(t *testing.T, n int, flags ...string) *peering {
	t.Helper()
	p := &peering{world: newWorld(t)}
	var addrs []string
	for i := range n {
		h := p.cloud(fmt.Sprint("cloud-", i+1))
		p.issueServer(h.Name, append(h.addrs(), balanced.Addr())...)
		p.clouds, addrs = append(p.clouds, h), append(addrs, h.V4.String())
	}
	p.home = p.site("home")
	p.edge = p.home.edge("edge-1")
	p.echo = p.edge.serve(10250, echo)
	for _, h := range p.clouds {
		h.flags = append([]string{"--peer", strings.Join(addrs, ",")}, flags...)
		p.servers = append(p.servers, h.startServer())
	}
	p.balance(p.clouds...)
	agent := p.edge.startAgent(p.clouds) // all get to know the node
	p.all("online")
	agent.stop()
	p.all("offline")
	for _, d := range p.servers {
		d.waitMetric("edge_tunnel_peers", float64(n-1))
	}
	return p
}

func (p *peering) all(state string) {
	p.t.Helper()
	for _, d := range p.servers {
		d.waitTarget(p.edge.V4, state)
	}
}

// balance says to which servers the common address leads, in turns. Connections that are open stay where they are.
func (p *peering) balance(to ...*host) {
	p.t.Helper()
	targets := make([]string, len(to))
	for i, h := range to {
		targets[i] = fmt.Sprintf("%d : %s", i, h.V4)
	}
	nft(p.t, p.home.Router, fmt.Sprintf(`table ip balance
		delete table ip balance
		table ip balance { chain to { type nat hook prerouting priority dstnat; ip daddr %s dnat to numgen inc mod %d map { %s }; }; }`,
		balanced.Addr(), len(to), strings.Join(targets, ", ")))
}

// searchTime is for an agent that looks for a further server behind a balancer: half a minute before the first look, minutes between others.
const searchTime = 5 * time.Minute

// startBalanced starts the agent with the common address.
func (p *peering) startBalanced(tunnels int) *daemon {
	p.t.Helper()
	d := p.edge.launchAgent(nil, "--server", balanced.String(), "--tunnels", fmt.Sprint(tunnels))
	d.waitMetricFor(searchTime, `edge_tunnel_agent_tunnels{state="up"}`, float64(tunnels))
	return d
}

// owners are the indexes of the servers that have a tunnel.
func (p *peering) owners() (list []int) {
	p.t.Helper()
	for i, d := range p.servers {
		if d.metrics()[`edge_tunnel_tunnels{state="up"}`] == 1 {
			list = append(list, i)
		}
	}
	return list
}

// knocking connects from some nodes every 100 ms, and uses the connections.
type knocking struct {
	over  chan struct{}
	wg    sync.WaitGroup
	mu    sync.Mutex
	done  int
	fails []knockFailure
}

type knockFailure struct {
	from string
	at   time.Time
	err  error
}

func (p *peering) knock(from ...*host) *knocking {
	k := &knocking{over: make(chan struct{})}
	for _, h := range from {
		k.wg.Go(func() {
			for tick := time.NewTicker(100 * time.Millisecond); ; {
				select {
				case <-k.over:
					tick.Stop()
					return
				case <-tick.C:
				}
				k.wg.Go(func() {
					at := time.Now()
					conn, err := h.dial(p.echo)
					if err == nil {
						err = exchange(conn, "knock, knock")
						conn.Close()
					}
					k.mu.Lock()
					defer k.mu.Unlock()
					k.done++
					if err != nil {
						k.fails = append(k.fails, knockFailure{h.Name, at, err})
					}
				})
			}
		})
	}
	return k
}

// stop returns what has failed, in order.
func (k *knocking) stop(t *testing.T, what string) []knockFailure {
	t.Helper()
	close(k.over)
	k.wg.Wait()
	slices.SortFunc(k.fails, func(a, b knockFailure) int { return a.at.Compare(b.at) })
	t.Logf("%s: %d connections, %d failed", what, k.done, len(k.fails))
	if k.done == 0 {
		t.Error("nobody has knocked")
	}
	return k.fails
}

// An agent with one tunnel goes from server to server: to renew its certificate, because its server stops, and because its server is killed.
// The first two are not seen from anywhere. After the last one the node is refused until the agent is back, and a second more at most.
func TestAgentMovesBetweenPeers(t *testing.T) {
	t.Parallel()
	p := newPeering(t, 3)
	p.balance(p.clouds[0])
	agent := p.startBalanced(1)
	p.all("online")

	k := p.knock(p.clouds...)
	time.Sleep(time.Second)
	p.balance(p.clouds[1])
	p.issueAgent("edge-1", p.edge.addrs()...)
	if err := agent.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	p.servers[1].waitMetric(`edge_tunnel_tunnels{state="up"}`, 1)
	p.servers[0].waitMetric(`edge_tunnel_tunnels{state="retired"}`, 0)
	time.Sleep(time.Second)
	for _, f := range k.stop(t, "a new certificate") {
		t.Errorf("from %s: %v", f.from, f.err)
	}
	if got := p.owners(); !slices.Equal(got, []int{1}) {
		t.Fatalf("servers %d have tunnels", got)
	}

	k = p.knock(p.clouds[0], p.clouds[2])
	p.balance(p.clouds[2])
	p.servers[1].stop()
	time.Sleep(time.Second)
	for _, f := range k.stop(t, "a server stops") {
		t.Errorf("from %s: %v", f.from, f.err)
	}
	if strings.Contains(p.servers[1].Log(), "have not moved") {
		t.Error("the agent had another server and did not move in time")
	}

	k = p.knock(p.clouds[0])
	p.balance(p.clouds[0])
	time.Sleep(500 * time.Millisecond)
	killed := time.Now()
	p.servers[2].Kill()
	p.servers[0].waitMetric(`edge_tunnel_tunnels{state="up"}`, 1)
	back := time.Now()
	p.servers[0].waitTarget(p.edge.V4, "online")
	time.Sleep(time.Second)
	fails := k.stop(t, "a server is killed")
	t.Logf("the agent was back after %v", back.Sub(killed))
	for _, f := range fails {
		if f.at.Before(killed.Add(-time.Second)) || f.at.After(back.Add(time.Second)) {
			t.Errorf("from %s, %v after the end: %v", f.from, f.at.Sub(killed), f.err)
		}
	}
	p.servers[0].waitIdle()
	agent.waitIdle()
}

// With two tunnels to three servers, the one that has none goes by the others: when one of these stops, nothing is seen but by those who use
// that very server, and when it is killed, its streams are all that is lost.
func TestTwoTunnelsThreeServers(t *testing.T) {
	t.Parallel()
	p := newPeering(t, 3)
	agent := p.startBalanced(2)
	p.all("online")
	owners := p.owners()
	if len(owners) != 2 {
		t.Fatalf("servers %d have tunnels", owners)
	}
	third := 3 - owners[0] - owners[1]
	p.servers[third].waitMetric("edge_tunnel_peer_nodes", 1)

	// One that is killed: the balancer still leads there, too, but the agent has its other tunnel.
	conn := p.clouds[third].mustDial(p.echo)
	if err := exchange(conn, "one"); err != nil {
		t.Fatal(err)
	}
	gone, left := owners[0], owners[1]
	if p.servers[gone].metrics()["edge_tunnel_peer_streams"] == 0 {
		gone, left = left, gone
	}
	k := p.knock(p.clouds[third], p.clouds[left])
	time.Sleep(500 * time.Millisecond)
	killed := time.Now()
	p.servers[gone].Kill()
	waitReset(t, conn, patience)
	if r := p.servers[third].record(conn.LocalAddr()); r.Reason != "tunnel_lost" {
		t.Errorf("record %+v", r)
	}
	time.Sleep(2 * time.Second)
	fails := k.stop(t, "an owner is killed")
	for _, f := range fails {
		if f.from == p.clouds[left].Name || f.at.Sub(killed).Abs() > time.Second {
			t.Errorf("from %s, %v after the end: %v", f.from, f.at.Sub(killed), f.err)
		}
	}
	p.servers[third].waitEnded("tunnel_lost", float64(1+len(fails)))

	// One that stops. Until then the agent has found the third one.
	p.balance(p.clouds[third], p.clouds[left])
	agent.waitMetricFor(searchTime, `edge_tunnel_agent_tunnels{state="up"}`, 2)
	p.servers[gone] = p.clouds[gone].startServer()
	p.servers[gone].waitTarget(p.edge.V4, "online")
	conn = p.clouds[gone].mustDial(p.echo)
	if err := exchange(conn, "two"); err != nil {
		t.Fatal(err)
	}
	k = p.knock(p.clouds[gone], p.clouds[third])
	time.Sleep(500 * time.Millisecond)
	p.servers[left].stop()
	time.Sleep(time.Second)
	for _, f := range k.stop(t, "an owner stops") {
		t.Errorf("from %s: %v", f.from, f.err)
	}
	conn.Close()
	for _, d := range []*daemon{p.servers[gone], p.servers[third], agent} {
		d.waitIdle()
	}
}

// An owner that stops lets streams of its peers go on as its own connections, and resets what is left after --drain-timeout.
func TestOwnerDrains(t *testing.T) {
	t.Parallel()
	p := newPeering(t, 2, "--drain-timeout", "5s")
	agent := p.edge.startAgent(p.clouds[:1])
	p.all("online")
	ends, stays := p.clouds[1].mustDial(p.echo), p.clouds[1].mustDial(p.echo)
	if err := errors.Join(exchange(ends, "one"), exchange(stays, "one")); err != nil {
		t.Fatal(err)
	}
	p.servers[0].waitMetric("edge_tunnel_peer_streams", 2)
	if err := p.servers[0].Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	agent.waitLog("server is about to stop")
	p.clouds[1].mustEcho(p.echo) // the agent knows, and the two seconds have just begun
	p.servers[0].waitLog("open connections may finish")
	p.servers[1].waitTarget(p.edge.V4, "offline")
	_, err := p.clouds[1].dial(p.echo)
	wantErrno(t, err, syscall.EHOSTUNREACH)
	if err := exchange(ends, "two"); err != nil {
		t.Errorf("an open connection: %v", err)
	}
	if err := ends.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if rest, err := io.ReadAll(ends); len(rest) != 0 || err != nil {
		t.Errorf("the end of an open connection: %q, %v", rest, err)
	}
	waitReset(t, stays, patience)
	wantStopped(t, p.servers[0], 1)
	if r := p.servers[1].record(ends.LocalAddr()); r.Reason != "closed" {
		t.Errorf("record %+v", r)
	}
	if r := p.servers[1].record(stays.LocalAddr()); r.Reason != "remote_reset" && r.Reason != "tunnel_lost" {
		t.Errorf("record %+v", r)
	}
	p.servers[1].waitIdle()
	agent.waitIdle()
}

// A peer's address may be a target, and the port that it is dialed at a tunneled one: what the server dials itself is not redirected.
func TestPeerIsATarget(t *testing.T) {
	t.Parallel()
	p := newPeering(t, 2, "--tunneled-ports", fmt.Sprint(wire.Port))
	peer := p.clouds[0]
	p.issueAgent("edge-1", append(p.edge.addrs(), peer.addrs()...)...)
	agent := p.edge.startAgent(p.clouds)
	p.servers[1].waitTarget(peer.V4, "online")

	// Others are redirected: the agent answers, which does not dial it.
	p.clouds[1].wantReset(peer.at(wire.Port), dialOptions{}, patience)
	if r := p.servers[1].recordTo(peer.at(wire.Port)); r.Node != "edge-1" || r.Reason != "not_allowed" {
		t.Errorf("record %+v", r)
	}
	agent.stop()
	p.servers[1].waitTarget(peer.V4, "offline")

	// The server gets there, also when the target is offline from before its start.
	p.servers[1].stop()
	p.servers[1] = p.clouds[1].startServer()
	p.servers[1].waitMetric("edge_tunnel_peers", 1)
	if n := p.servers[1].metrics().bpf("bypassed"); n == 0 {
		t.Error("nothing has passed by the programs")
	}
	p.edge.startAgent(p.clouds[:1])
	p.servers[1].waitTarget(p.edge.V4, "online")
	p.clouds[1].mustEcho(p.echo)
}
