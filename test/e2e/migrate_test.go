// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"
)

// Rules as yurt-tunnel 1.2.2 writes them on a node: to cloud nodes directly, to everybody else by its own server.
const yurtRules = `*nat
:OUTPUT ACCEPT [0:0]
:TUNNEL-PORT - [0:0]
:TUNNEL-PORT-10250 - [0:0]
:TUNNEL-PORT-10255 - [0:0]
-A OUTPUT -p tcp -m comment --comment "somebody else's" -m tcp --dport 9 -j ACCEPT
-A OUTPUT -p tcp -m comment --comment "yurttunnel server port" -j TUNNEL-PORT
-A TUNNEL-PORT -p tcp -m tcp --dport 10255 -m comment --comment "jump to port 10255" -j TUNNEL-PORT-10255
-A TUNNEL-PORT -p tcp -m tcp --dport 10250 -m comment --comment "jump to port 10250" -j TUNNEL-PORT-10250
-A TUNNEL-PORT-10250 -d 127.0.0.1/32 -p tcp -m comment --comment "return request to access node directly" -m tcp --dport 10250 -j RETURN
-A TUNNEL-PORT-10250 -d %[1]v/32 -p tcp -m comment --comment "return request to access node directly" -m tcp --dport 10250 -j RETURN
-A TUNNEL-PORT-10250 -p tcp -m comment --comment "dnat to tunnel for access node" -m tcp --dport 10250 -j DNAT --to-destination %[1]v:10263
-A TUNNEL-PORT-10255 -p tcp -m comment --comment "dnat to tunnel for access node" -m tcp --dport 10255 -j DNAT --to-destination %[1]v:10264
COMMIT
`

// says serves connections by saying who it is.
func says(who string) func(*net.TCPConn) {
	return func(c *net.TCPConn) { fmt.Fprintln(c, who) }
}

// steady opens a connection every tenth of a second and notes who answers.
type steady struct {
	mu     sync.Mutex
	latest string
	number int // of answers
	failed []string
	end    chan struct{}
	done   chan struct{}
}

func (h *host) steadily(addr netip.AddrPort) *steady {
	s := &steady{end: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(s.done)
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-s.end:
				return
			case <-tick.C:
			}
			who, err := h.whoAnswers(addr)
			s.mu.Lock()
			if err != nil {
				s.failed = append(s.failed, err.Error())
			} else {
				s.latest = who
				s.number++
			}
			s.mu.Unlock()
		}
	}()
	h.t.Cleanup(s.stop)
	return s
}

func (h *host) whoAnswers(addr netip.AddrPort) (string, error) {
	conn, err := h.dial(addr)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	line, err := bufio.NewReader(conn).ReadString('\n')
	return strings.TrimSpace(line), err
}

func (s *steady) stop() {
	select {
	case <-s.end:
	default:
		close(s.end)
	}
	<-s.done
}

// answeredBy waits until a further connection was answered by this one.
func (s *steady) answeredBy(t *testing.T, who string) {
	t.Helper()
	s.mu.Lock()
	before := s.number
	s.mu.Unlock()
	eventually(t, patience, func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.number < before+2 || s.latest != who {
			return fmt.Errorf("answered by %q, want %q; failed: %q", s.latest, who, s.failed)
		}
		return nil
	})
}

// A node with the rules of yurt-tunnel is migrated and taken back, with a connection every tenth of a second, none of which fails.
func TestMigrateFromYurtTunnel(t *testing.T) {
	for _, tool := range []string{"iptables-nft", "iptables-legacy"} {
		t.Run(tool, func(t *testing.T) {
			w := newWorld(t)
			cloud, home := w.cloud("cloud-1"), w.site("home")
			edge := home.edge("edge-1")
			addr := edge.serve(10250, says("ours"))
			cloud.serve(10263, says("theirs"))
			cloud.mustRun("ip", "route", "add", addr.Addr().String(), "via", home.Router.V4.String()) // without one nobody asks iptables
			cmd := cloud.command(t.Context(), tool+"-restore")
			cmd.Stdin = strings.NewReader(fmt.Sprintf(yurtRules, cloud.V4))
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			rules := func() string {
				var list []string
				for line := range strings.Lines(cloud.mustOutput(tool + "-save")) {
					if !strings.HasPrefix(line, "#") && !strings.HasPrefix(line, ":") { // times and counters
						list = append(list, line)
					}
				}
				return strings.Join(list, "")
			}
			state := t.TempDir()
			migrate := func(flags ...string) string {
				t.Helper()
				out, err := cloud.ctl(append([]string{"migrate", "--state-dir", state}, flags...)...)
				if err != nil {
					t.Fatalf("migrate %v: %v\n%s", flags, err, out)
				}
				return out
			}
			before := rules()
			s := cloud.steadily(addr)
			s.answeredBy(t, "theirs")

			// Not before there is something in its place.
			if out, err := cloud.ctl("migrate", "--apply", "--state-dir", state); err == nil || !strings.Contains(out, "no tunnel-server is ready") {
				t.Errorf("without a server: %v\n%s", err, out)
			}
			server := cloud.startServer()
			s.answeredBy(t, "theirs")
			edge.startAgent([]*host{cloud})
			s.answeredBy(t, "ours") // both are there

			if out := migrate(); strings.Count(out, "would remove") != 7 || !strings.Contains(out, "nothing was changed") || rules() != before {
				t.Errorf("plan\n%s\n%s", out, rules())
			}
			if out := migrate("--apply"); strings.Count(out, "removed") != 7 {
				t.Errorf("apply\n%s", out)
			}
			if got := rules(); strings.Contains(got, "TUNNEL-PORT") || !strings.Contains(got, "--dport 9 -j ACCEPT") {
				t.Errorf("after --apply\n%s", got)
			}
			s.answeredBy(t, "ours")
			if out := migrate("--apply"); !strings.Contains(out, "nothing of yurt-tunnel") {
				t.Errorf("once more\n%s", out)
			}

			migrate("--undo")
			if got := rules(); got != before {
				t.Errorf("after --undo\n%s\nwant\n%s", got, before)
			}
			s.answeredBy(t, "ours")
			if out, err := cloud.ctl("cleanup", "--leave"); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			s.answeredBy(t, "theirs")
			s.stop()
			if len(s.failed) > 0 {
				t.Errorf("%d of %d connections failed: %q", len(s.failed), s.number+len(s.failed), s.failed)
			}
			t.Logf("%d connections", s.number)
			server.stop()
		})
	}
}
