// SPDX-License-Identifier: Apache-2.0

package intercept_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/intercept"
	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

func TestConnectionsWithoutAStream(t *testing.T) {
	type opened = func(context.Context, string, wire.Header, intercept.Stream) (intercept.Stream, error)
	fail := func(err error) opened {
		return func(context.Context, string, wire.Header, intercept.Stream) (intercept.Stream, error) {
			return nil, err
		}
	}
	for _, c := range []struct {
		reason  string
		records int
		change  func(*intercept.Config)
	}{
		{"not_intercepted", 0, func(c *intercept.Config) {
			c.Origin = func(*net.TCPConn) (intercept.Origin, error) {
				return intercept.Origin{}, fmt.Errorf("look up: %w", intercept.ErrNotIntercepted)
			}
		}},
		{"origin_failed", 0, func(c *intercept.Config) {
			c.Origin = func(*net.TCPConn) (intercept.Origin, error) { return intercept.Origin{}, syscall.EPERM }
		}},
		{"no_route", 1, func(c *intercept.Config) { c.Lookup = func(netip.Addr) (string, bool) { return "", false } }},
		{"no_tunnel", 1, func(c *intercept.Config) { c.Open = fail(fmt.Errorf("open: %w", reasoned("no_tunnel"))) }},
		{"draining", 1, func(c *intercept.Config) { c.Open = fail(reasoned("draining")) }},
		{"open_failed", 1, func(c *intercept.Config) { c.Open = fail(reasoned("something else")) }},
		{"open_failed", 1, func(c *intercept.Config) { c.Open = fail(errors.New("broken")) }},
		{"open_timed_out", 1, func(c *intercept.Config) {
			c.OpenTimeout = 20 * time.Millisecond
			c.Open = func(ctx context.Context, _ string, _ wire.Header, _ intercept.Stream) (intercept.Stream, error) {
				<-ctx.Done()
				return nil, ctx.Err()
			}
		}},
	} {
		t.Run(c.reason, func(t *testing.T) {
			l := newLab(t, c.change)
			l.dialReset()
			l.ended(c.reason)
			eventually(t, "record", func() bool { return len(l.log.records(t)) == c.records })
		})
	}
}

type reasoned string

func (r reasoned) Error() string  { return "because of " + string(r) }
func (r reasoned) Reason() string { return string(r) }

func TestCanary(t *testing.T) {
	seen := make(chan intercept.Origin, 1)
	l := newLab(t, func(c *intercept.Config) {
		c.Canary = func(conn net.Conn, o intercept.Origin) bool {
			seen <- o
			conn.Write([]byte("chirp"))
			return true
		}
	})
	client := l.dial()
	expect(t, client, "chirp")
	expectEOF(t, client)
	if o := <-seen; o.Dst != dst {
		t.Errorf("canary saw %v", o.Dst)
	}
	l.ended("canary")
	if r := l.log.records(t); len(r) != 0 {
		t.Errorf("a canary was recorded: %v", r)
	}
}

func TestAccessRecord(t *testing.T) {
	opened := make(chan time.Duration, 2)
	l := newLab(t, func(c *intercept.Config) { c.Opened = func(d time.Duration) { opened <- d } })
	client := l.dial()
	agent := l.next()
	send(t, client, "12345")
	expect(t, agent, "12345")
	if len(opened) != 0 {
		t.Error("opened before the agent said so")
	}
	agent.reply(wire.StatusOK)
	if d := <-opened; d <= 0 {
		t.Errorf("it took %v to open", d)
	}
	send(t, agent, "123")
	expect(t, client, "123")

	open := l.server.Connections()
	if len(open) != 1 || open[0].State != "open" || open[0].Comm != "curl" || open[0].Dst != dst || open[0].Node != "edge-1" {
		t.Errorf("open connections: %+v", open)
	}
	eventually(t, "bytes so far", func() bool { o := l.server.Connections()[0]; return o.Sent == 5 && o.Received == 3 })

	send(t, client, "678")
	expect(t, agent, "678")
	client.Close()
	agent.Close()
	l.ended("closed")
	got := l.record()
	if d, _ := got["duration"].(float64); d <= 0 {
		t.Errorf("duration is %v", got["duration"])
	}
	delete(got, "time")
	delete(got, "duration")
	want := map[string]any{
		"level": "INFO", "msg": "connection", "trace": fmt.Sprintf("%016x", agent.header.Trace),
		"pid": 42.0, "comm": "curl", "uid": 1000.0, "cgroup": 77.0, "netns": 5.0,
		"src": client.LocalAddr().String(), "dst": "10.99.0.5:10250", "node": "edge-1",
		"sent": 8.0, "received": 3.0, "reason": "closed",
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("record\n%v, want\n%v", got, want)
	}
	if n := l.server.Stats().Nodes["edge-1"]; n != (intercept.NodeStats{Ended: 1, Sent: 8, Received: 3}) {
		t.Errorf("totals of the node: %+v", n)
	}
	l.server.Forget("edge-1")
	if nodes := l.server.Stats().Nodes; len(nodes) != 0 {
		t.Errorf("totals after Forget: %v", nodes)
	}
}

func TestForgetWaitsForOpenConnections(t *testing.T) {
	l := newLab(t, nil)
	client := l.dial()
	agent := l.next()
	agent.reply(wire.StatusOK)
	l.server.Forget("edge-1")
	if n := l.server.Stats().Nodes["edge-1"].Open; n != 1 {
		t.Errorf("%d open connections, want 1", n)
	}
	client.Close()
	agent.Close()
	l.ended("closed")
	eventually(t, "totals dropped", func() bool { return len(l.server.Stats().Nodes) == 0 })
}

func TestLimits(t *testing.T) {
	t.Run("altogether", func(t *testing.T) {
		l := newLab(t, func(c *intercept.Config) { c.MaxConns = 1 })
		l.dial()
		l.next()
		l.dialReset()
		if s := l.server.Stats(); s.Overflowed != 1 || s.Begun != 1 {
			t.Errorf("stats %+v", s)
		}
	})
	t.Run("of one node", func(t *testing.T) {
		var asked atomic.Int32
		l := newLab(t, func(c *intercept.Config) {
			c.MaxConnsPerNode = 1
			c.Lookup = func(netip.Addr) (string, bool) { return fmt.Sprintf("edge-%d", (asked.Add(1)+1)/2), true }
		})
		l.dial() // edge-1
		l.next()
		l.dialReset() // edge-1
		l.dial()      // edge-2
		l.next()
		if s := l.server.Stats(); s.Ended["node_full"] != 1 || s.Nodes["edge-1"].Open != 1 || s.Nodes["edge-2"].Open != 1 {
			t.Errorf("stats %+v", s)
		}
	})
	t.Run("of one pod", func(t *testing.T) {
		for _, c := range []struct {
			name            string
			perPod, perNode int
			lookup          string // of all but the first connection, which is to edge-1
		}{
			{"altogether", 1, 4096, "edge-2"},
			{"to one node", 100, 3, "edge-1"},
		} {
			t.Run(c.name, func(t *testing.T) {
				var netns atomic.Uint64
				var cgroup, node atomic.Value
				cgroup.Store(uint64(1))
				node.Store("edge-1")
				l := newLab(t, func(cfg *intercept.Config) {
					cfg.MaxConnsPerPod, cfg.MaxConnsPerNode = c.perPod, c.perNode
					cfg.Lookup = func(netip.Addr) (string, bool) { return node.Load().(string), true }
					cfg.Origin = func(*net.TCPConn) (intercept.Origin, error) {
						group := cgroup.Load().(uint64)
						return intercept.Origin{Dst: dst, Cgroup: group, Netns: netns.Add(1), Host: group == 0}, nil // a namespace for each
					}
				})
				client := l.dial()
				agent := l.next()
				agent.reply(wire.StatusOK)
				node.Store(c.lookup)
				l.dialReset()
				eventually(t, "a refusal", func() bool { return l.server.Stats().Ended["pod_full"] == 1 })
				if s := l.server.Stats().Nodes["edge-1"]; s.Open != 1 || s.Ended != 0 {
					t.Errorf("stats %+v", s)
				}
				for _, group := range []uint64{2, 0} { // another pod; the host, which has no limit of its own
					cgroup.Store(group)
					l.dial()
					l.next()
				}
				client.Close()
				agent.Close()
				eventually(t, "a free place", func() bool { return l.server.Stats().Ended["closed"] == 1 })
				cgroup.Store(uint64(1))
				l.dial()
				l.next()
			})
		}
	})
}

func TestSlowNodeDelaysNobody(t *testing.T) {
	var asked atomic.Int32
	l := newLab(t, func(c *intercept.Config) {
		open := c.Open
		c.Lookup = func(netip.Addr) (string, bool) { return fmt.Sprintf("edge-%d", asked.Add(1)), true }
		c.Open = func(ctx context.Context, node string, h wire.Header, failed intercept.Stream) (intercept.Stream, error) {
			if node == "edge-1" {
				<-ctx.Done()
				return nil, ctx.Err()
			}
			return open(ctx, node, h, failed)
		}
	})
	l.dial()
	eventually(t, "first connection", func() bool { return asked.Load() == 1 })
	client := l.dial()
	agent := l.next()
	agent.reply(wire.StatusOK)
	send(t, agent, "quick")
	expect(t, client, "quick")
	if open := l.server.Connections(); len(open) != 2 || open[0].State != "opening" || open[0].Node != "edge-1" {
		t.Errorf("connections %+v", open)
	}
}

func TestDrain(t *testing.T) {
	t.Run("open connections finish", func(t *testing.T) {
		l := newLab(t, nil)
		client := l.dial()
		agent := l.next()
		agent.reply(wire.StatusOK)
		done := make(chan int, 1)
		go func() { done <- l.server.Drain(context.Background()) }()
		eventually(t, "listeners closed", func() bool { return l.server.Stats().Listeners == 0 })
		if _, err := net.Dial("tcp", l.addr); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("connect while draining: %v", err)
		}
		if err := l.server.Add(listen(t)); !errors.Is(err, intercept.ErrClosed) {
			t.Errorf("Add while draining: %v", err)
		}
		send(t, client, "goes on")
		expect(t, agent, "goes on")
		client.Close()
		agent.Close()
		if n := <-done; n != 0 {
			t.Errorf("%d connections were reset", n)
		}
	})
	t.Run("the others are reset, in every phase", func(t *testing.T) {
		l := newLab(t, nil)
		relaying := l.dial()
		agent := l.next()
		agent.reply(wire.StatusOK)
		send(t, agent, "x")
		expect(t, relaying, "x")
		waiting := l.dial()
		l.next()
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
		defer cancel()
		if n := l.server.Drain(ctx); n != 2 {
			t.Errorf("%d connections were reset, want 2", n)
		}
		expectReset(t, relaying)
		expectReset(t, waiting)
		if s := l.server.Stats(); s.Ended["canceled"] != 2 {
			t.Errorf("ended %v", s.Ended)
		}
	})
}

func TestRemoveKeepsConnections(t *testing.T) {
	l := newLab(t, nil)
	second := listen(t)
	if err := l.server.Add(second); err != nil {
		t.Fatal(err)
	}
	client := dial(t, second.Addr().String())
	agent := l.next()
	agent.reply(wire.StatusOK)
	l.server.Remove(second)
	l.server.Remove(second) // harmless
	if _, err := net.Dial("tcp", second.Addr().String()); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("connect to a removed listener: %v", err)
	}
	send(t, client, "goes on")
	expect(t, agent, "goes on")
	l.dial() // the other listener
	l.next()
	if n := l.server.Stats().Listeners; n != 1 {
		t.Errorf("%d listeners, want 1", n)
	}
}

// flaky fails some accepts, as a process out of descriptors does.
type flaky struct {
	net.Listener
	left atomic.Int32
}

func (f *flaky) Accept() (net.Conn, error) {
	if f.left.Add(-1) >= 0 {
		return nil, &net.OpError{Op: "accept", Err: syscall.EMFILE}
	}
	return f.Listener.Accept()
}

func TestAcceptErrorsPass(t *testing.T) {
	l := newLab(t, nil)
	ln := &flaky{Listener: listen(t)}
	ln.left.Store(3)
	if err := l.server.Add(ln); err != nil {
		t.Fatal(err)
	}
	dial(t, ln.Addr().String())
	l.next()
	if n := l.server.Stats().AcceptErrors; n != 3 {
		t.Errorf("%d accept errors, want 3", n)
	}
	// And one that never gets better does not keep Close waiting.
	hopeless := &flaky{Listener: listen(t)}
	hopeless.left.Store(1 << 30)
	if err := l.server.Add(hopeless); err != nil {
		t.Fatal(err)
	}
	eventually(t, "more accept errors", func() bool { return l.server.Stats().AcceptErrors > 5 })
}

func TestManyAtOnce(t *testing.T) {
	l := newLab(t, nil)
	var agents sync.WaitGroup
	stop := make(chan struct{})
	go func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			case a := <-l.opens:
				agents.Go(func() {
					switch i % 5 {
					case 0:
						wire.WriteReply(a, wire.Reply{Status: wire.StatusRefused})
					case 1:
						reset(a.TCPConn)
						return
					default:
						wire.WriteReply(a, wire.Reply{Status: wire.StatusOK})
						buf := make([]byte, 3)
						if _, err := a.Read(buf); err == nil {
							a.Write(buf)
						}
					}
					a.SetReadDeadline(time.Now().Add(10 * time.Second))
					a.Read(make([]byte, 1))
					a.Close()
				})
			}
		}
	}()
	var clients sync.WaitGroup
	for i := range 200 {
		clients.Go(func() {
			c, err := net.Dial("tcp", l.addr)
			if errors.Is(err, syscall.ECONNRESET) {
				return // reset before connect has returned
			} else if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(10 * time.Second))
			c.Write([]byte("abc"))
			if i%7 == 0 {
				reset(c.(*net.TCPConn))
				return
			}
			c.Read(make([]byte, 3))
		})
	}
	clients.Wait()
	eventually(t, "all ended", func() bool { s := l.server.Stats(); return s.Begun == 200 && s.Open == 0 })
	close(stop)
	agents.Wait()
}

func TestConfigErrorsAreJoined(t *testing.T) {
	_, err := intercept.New(intercept.Config{MaxConns: -1, OpenTimeout: -1})
	for _, part := range []string{"needs Origin", "negative connection limit", "negative timeout"} {
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("New = %v, want %q in it", err, part)
		}
	}
}
