// SPDX-License-Identifier: Apache-2.0

package k8s

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/edge-tunnel/edge-tunnel/test/kubebed"
)

// fault is something that goes wrong in a cluster that works, or is changed in it, and is right again when do returns. Who is not hit by it notices
// nothing: every connect succeeds, every open connection stays. Whoever is hit can connect again within the limit of do's end.
type fault struct {
	name string
	do   func(*world) error
	hits func(from, to *kubebed.Node) bool // nil: nobody
	// stays says that the open connections of those who are hit stay; otherwise they are reset, and do not hang.
	stays bool
}

// faultLimit is for a machine that does a lot else: a killed container alone is started again at once, but after its second end after ten seconds.
const faultLimit = 90 * time.Second

func faults(w *world) []fault {
	cloud, edge := w.Cloud[0], w.Edge[0]
	all := func(_, _ *kubebed.Node) bool { return true }
	to := func(_, to *kubebed.Node) bool { return to == edge }
	return []fault{
		{name: "a server is killed", hits: func(from, _ *kubebed.Node) bool { return from == cloud },
			do: func(w *world) error { return kill(cloud, "tunnel-server") }},
		{name: "an agent is killed", hits: to,
			do: func(w *world) error { return kill(edge, "tunnel-agent") }},
		{name: "the controllers are killed",
			do: func(w *world) error {
				killed := 0
				for _, n := range w.Nodes() {
					n, err := n.KillAll(func(comm string) bool { return strings.HasPrefix(comm, "tunnel-con") })
					if killed += n; err != nil {
						return err
					}
				}
				if killed == 0 {
					return errors.New("no controller runs")
				}
				return nil
			}},
		{name: "the API server is away",
			do: func(w *world) error {
				w.Kill()
				time.Sleep(5 * time.Second)
				w.Start()
				return nil
			}},
		{name: "an edge is cut off for a minute", hits: to,
			do: func(w *world) error {
				if err := edge.Site.Router.SetLink("lan0", false); err != nil {
					return err
				}
				time.Sleep(time.Minute)
				return edge.Site.Router.SetLink("lan0", true)
			}},
		{name: "an edge loses its power", hits: to,
			do: func(w *world) error { return edge.PowerCycle() }},
		{name: "an edge gets a network of its own and loses it", hits: to,
			do: func(w *world) error {
				for _, mode := range []string{"private", "normal"} {
					w.patch("/api/v1/nodes/"+edge.Name, kubebed.Object{"metadata": kubebed.Object{"labels": kubebed.Object{"alibabacloud.com/interconnection-mode": mode}}})
					if err := w.targeted(edge, mode == "normal"); err != nil {
						return err
					}
				}
				return nil
			}},
		{name: "a port is taken from the ConfigMap and put back", hits: all, stays: true,
			do: func(w *world) error {
				for _, ports := range []string{kubebed.ExporterPort, nodePort + ", " + kubebed.ExporterPort} {
					w.patch("/api/v1/namespaces/kube-system/configmaps/edge-tunnel-server-cfg", kubebed.Object{"data": kubebed.Object{"http-proxy-ports": ports}})
					if err := w.tunneled(nodePort, strings.Contains(ports, nodePort)); err != nil {
						return err
					}
				}
				return nil
			}},
		{name: "the DaemonSets are rolled", hits: all,
			do: func(w *world) error {
				for _, set := range []string{"daemonset/tunnel-server", "daemonset/tunnel-agent"} {
					if _, err := w.Kubectl("rollout", "restart", "--namespace=kube-system", set); err != nil {
						return err
					}
					if _, err := w.Kubectl("rollout", "status", "--namespace=kube-system", "--timeout=50s", set); err != nil {
						return err
					}
				}
				return nil
			}},
	}
}

// suffer lets one fault after the other happen, and says of each what the clients saw.
func (w *world) suffer() {
	// An agent is reached through one tunnel, by the hop between servers; it takes another for it not to matter which server is lost.
	if err := w.onServers(func(out string) bool { return strings.Count(out, "edge-") == len(w.Edge) }, "tunnels"); err != nil {
		w.t.Fatal(err)
	}
	for _, f := range faults(w) {
		w.t.Run(f.name, func(t *testing.T) {
			var watched []*watch
			for _, from := range w.Cloud {
				for _, to := range w.Edge {
					watched = append(watched, w.watch(from, to))
				}
			}
			began := time.Now()
			err := f.do(w)
			took := time.Since(began)
			if err != nil {
				t.Error(err)
			}
			limit := time.Now().Add(faultLimit)
			for _, c := range watched {
				hit := f.hits != nil && f.hits(c.from, c.to)
				c.settle(limit)
				for hit && !f.stays && !c.hasEnded() && time.Now().Before(limit) {
					time.Sleep(50 * time.Millisecond)
				}
				c.stop()
			}
			for _, c := range watched {
				hit := f.hits != nil && f.hits(c.from, c.to)
				switch {
				case c.err != nil:
					t.Errorf("%s: not back %v after it was over: %v", c, faultLimit, c.err)
				case !hit && c.failed > 0:
					t.Errorf("%s: %d connects failed, the last with %v", c, c.failed, c.last)
				case (!hit || f.stays) && c.ended != nil:
					t.Errorf("%s: an open connection ended: %v", c, c.ended)
				case hit && !f.stays && c.ended == nil:
					t.Errorf("%s: an open connection hangs", c)
				}
				t.Logf("%s: out of reach for %v of %v, %d of %d connects failed", c, c.out.Round(100*time.Millisecond), took.Round(100*time.Millisecond), c.failed, c.asked)
			}
			w.eventually(w.installed)
		})
	}
}

// watch is a client that connects over and over, and one that has a connection open.
type watch struct {
	from, to *kubebed.Node
	cancel   context.CancelFunc
	wait     sync.WaitGroup

	mu            sync.Mutex // guards what follows until stop
	asked, failed int
	inRow         int           // of the latest connects, how many succeeded
	out           time.Duration // between the first failure and the next success, all such times together
	last, ended   error         // of the latest connect that failed, and of the open connection
	err           error         // why it did not settle
}

func (c *watch) String() string { return c.from.Name + " to " + c.to.Name }

func (w *world) watch(from, to *kubebed.Node) *watch {
	ctx, cancel := context.WithCancel(context.Background())
	c := &watch{from: from, to: to, cancel: cancel}
	url := "http://" + to.V4.String() + ":" + nodePort + "/"
	want := fmt.Sprintf("node=%s pod=host-%s ", to.Name, to.Name)
	c.wait.Go(func() {
		var since time.Time
		for ctx.Err() == nil {
			out, err := from.Run("curl", "--silent", "--show-error", "--max-time", "5", url)
			if err == nil && !strings.Contains(out, want) {
				err = fmt.Errorf("answer %q", out)
			}
			c.mu.Lock()
			c.asked++
			if err != nil {
				c.failed++
				c.last, c.inRow = err, 0
				if since.IsZero() {
					since = time.Now()
				}
			} else {
				c.inRow++
				if !since.IsZero() {
					c.out += time.Since(since)
					since = time.Time{}
				}
			}
			c.mu.Unlock()
			select {
			case <-ctx.Done():
			case <-time.After(200 * time.Millisecond):
			}
		}
	})
	open := from.Command(ctx, "curl", "--silent", "--show-error", "--output", "/dev/null", url+"drip")
	c.wait.Go(func() {
		out, err := open.CombinedOutput()
		c.mu.Lock()
		defer c.mu.Unlock()
		if ctx.Err() == nil {
			c.ended = fmt.Errorf("%w: %s", err, out)
		}
	})
	c.settle(time.Now().Add(patience))
	return c
}

// settle waits until connects succeed, five in a row from now on.
func (c *watch) settle(limit time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.inRow = 0; c.inRow < 5; {
		if time.Now().After(limit) {
			c.err = errors.Join(errors.New("connects fail"), c.last)
			return
		}
		c.mu.Unlock()
		time.Sleep(50 * time.Millisecond)
		c.mu.Lock()
	}
}

func (c *watch) hasEnded() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ended != nil
}

func (c *watch) stop() {
	c.cancel()
	c.wait.Wait()
}

// kill kills every process of that name on a node.
func kill(n *kubebed.Node, name string) error {
	killed, err := n.KillAll(func(comm string) bool { return comm == name })
	if err == nil && killed == 0 {
		err = fmt.Errorf("no %s runs on %s", name, n.Name)
	}
	return err
}

// targeted waits until every server has, or has not, the node among its targets, with a tunnel.
func (w *world) targeted(n *kubebed.Node, want bool) error {
	return w.onServers(func(out string) bool {
		return strings.Contains(out, n.V4.String()+" ") == want && (!want || strings.Count(out, "online") == len(w.Edge))
	}, "targets")
}

// tunneled waits until every server has, or has not, the port.
func (w *world) tunneled(port string, want bool) error {
	return w.onServers(func(out string) bool { return strings.Contains(out, port) == want }, "status")
}

// onServers repeats a question of tunnelctl on every cloud node until the answer is right.
func (w *world) onServers(right func(string) bool, question ...string) error {
	for _, n := range w.Cloud {
		for deadline := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
			out, err := n.Run(filepath.Join(w.bin, "tunnelctl"), question...)
			if err == nil && right(out) {
				break
			}
			if time.Now().After(deadline) {
				return errors.Join(err, fmt.Errorf("%s: %s says\n%s", n.Name, strings.Join(question, " "), out))
			}
		}
	}
	return nil
}
