// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/relay"
)

// ends is a site and one service, whose connections the test gets, to act at both ends.
type ends struct {
	*oneSite
	pod      *host
	accepted chan *net.TCPConn
	done     chan struct{}
}

func newEnds(t *testing.T) *ends {
	t.Helper()
	s := newSite(t)
	e := &ends{oneSite: s, pod: s.cloud.pod("pod-1"), accepted: make(chan *net.TCPConn), done: make(chan struct{})}
	// The service closes a connection when its handler returns: not before the test is over.
	serve := func(conn *net.TCPConn) {
		select {
		case e.accepted <- conn:
			<-e.done
		case <-e.done:
		}
	}
	s.edge.serve(servicePort, serve)
	s.edge.serveAt(s.edge.at6(servicePort), serve)
	t.Cleanup(func() { close(e.done) }) // before the service's own, which waits for the handlers
	return e
}

// each runs a test for the host and the pod, over both families, with both ends of a connection: the client's and the service's. At the end
// nothing is open any more.
func (e *ends) each(t *testing.T, test func(t *testing.T, client, service *net.TCPConn)) {
	for _, h := range []*host{e.cloud, e.pod} {
		for _, to := range []netip.AddrPort{e.edge.at(servicePort), e.edge.at6(servicePort)} {
			t.Run(fmt.Sprintf("%s to %s", h.Name, to), func(t *testing.T) {
				client, err := h.dial(to)
				if err != nil {
					t.Fatal(err)
				}
				var service *net.TCPConn
				select {
				case service = <-e.accepted:
				case <-time.After(patience):
					t.Fatal("the connection does not arrive at the service")
				}
				for _, conn := range []*net.TCPConn{client, service} {
					if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
						t.Fatal(err)
					}
				}
				test(t, client, service)
				client.Close()
				service.Close()
			})
		}
	}
	e.server.waitIdle()
	e.agent.waitIdle()
}

// pass sends a message in one direction and checks that it arrives.
func pass(t *testing.T, from, to net.Conn, message string) {
	t.Helper()
	if _, err := io.WriteString(from, message); err != nil {
		t.Fatalf("send %q: %v", message, err)
	}
	got := make([]byte, len(message))
	if _, err := io.ReadFull(to, got); err != nil || string(got) != message {
		t.Fatalf("of %q arrived %q, %v", message, got, err)
	}
}

// passEnd ends one direction and checks that its end arrives.
func passEnd(t *testing.T, from, to *net.TCPConn) {
	t.Helper()
	if err := from.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if n, err := to.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Fatalf("after a half-close: %d bytes, %v", n, err)
	}
}

// passBulk sends some MiB and their end in one direction, and checks that all of it arrives.
func passBulk(t *testing.T, from, to *net.TCPConn) {
	t.Helper()
	content := make([]byte, 4<<20)
	_, _ = rand.NewChaCha8([32]byte{}).Read(content)
	sent := make(chan error, 1)
	go func() {
		_, err := from.Write(content)
		sent <- errors.Join(err, from.CloseWrite())
	}()
	got, err := io.ReadAll(to)
	if err := errors.Join(err, <-sent); err != nil || !bytes.Equal(got, content) {
		t.Fatalf("of %d bytes arrived %d, or others: %v", len(content), len(got), err)
	}
}

// Each direction ends on its own, and the other one stays as good as it was, also after some silence.
func TestHalfClose(t *testing.T) {
	t.Parallel()
	e := newEnds(t)
	for _, c := range []struct {
		name         string
		serviceFirst bool
	}{{"the client ends first", false}, {"the service ends first", true}} {
		t.Run(c.name, func(t *testing.T) {
			e.each(t, func(t *testing.T, client, service *net.TCPConn) {
				first, second := client, service
				if c.serviceFirst {
					first, second = second, first
				}
				pass(t, first, second, "all that there is to say")
				passEnd(t, first, second)
				pass(t, second, first, "an answer")
				time.Sleep(time.Second)
				pass(t, second, first, "more of it")
				passBulk(t, second, first)
			})
		})
	}
	e.server.waitEnded("closed", 8)
	e.agent.waitEnded("closed", 8)
}

// A service that speaks first is heard by a client that says nothing; an end that comes before anything was said arrives, too.
func TestServiceSpeaksFirst(t *testing.T) {
	t.Parallel()
	e := newEnds(t)
	e.each(t, func(t *testing.T, client, service *net.TCPConn) {
		pass(t, service, client, greeting)
		pass(t, client, service, "EHLO\r\n")
		pass(t, service, client, "250 welcome\r\n")
		passEnd(t, service, client)
		passEnd(t, client, service)
	})
	e.each(t, func(t *testing.T, client, service *net.TCPConn) {
		passEnd(t, service, client)
		passEnd(t, client, service)
	})
}

// A reset arrives as a reset, whichever end makes it: from silence, while data is on its way, and after the other direction has ended.
func TestResetArrives(t *testing.T) {
	t.Parallel()
	e := newEnds(t)
	const (
		silence = "in silence"
		bulk    = "while data comes"
		half    = "half-closed"
	)
	for _, when := range []string{silence, bulk, half} {
		for _, by := range []string{"client", "service"} {
			t.Run("by the "+by+" "+when, func(t *testing.T) {
				e.each(t, func(t *testing.T, client, service *net.TCPConn) {
					one, other := client, service
					if by == "service" {
						one, other = other, one
					}
					pass(t, one, other, "hello")
					var sender sync.WaitGroup
					switch when {
					case bulk:
						// Nobody reads it, so that it fills everything on the way.
						sender.Go(func() {
							for piece := make([]byte, 64<<10); ; {
								if _, err := other.Write(piece); err != nil {
									if !relay.IsReset(err) {
										t.Errorf("writing ended with %v, want a reset", err)
									}
									return
								}
							}
						})
						time.Sleep(200 * time.Millisecond)
					case half:
						passEnd(t, other, one)
					}
					if err := one.SetLinger(0); err != nil {
						t.Fatal(err)
					}
					one.Close()
					sender.Wait()
					if when != bulk { // else the writer has been told
						waitReset(t, other, patience)
					}
				})
			})
		}
	}
	e.server.waitEnded("client_reset", 12)
	e.server.waitEnded("remote_reset", 12)
}
