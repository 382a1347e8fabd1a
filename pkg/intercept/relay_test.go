// SPDX-License-Identifier: Apache-2.0

package intercept_test

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/intercept"
	"github.com/edge-tunnel/edge-tunnel/pkg/relay"
	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
)

func TestServerSpeaksFirst(t *testing.T) {
	l := newLab(t, nil)
	client := l.dial()
	agent := l.next()
	if agent.header.Dst != dst || agent.header.Kind != wire.KindConnect || agent.header.Trace == 0 || agent.node != "edge-1" || agent.second {
		t.Errorf("header %+v for %s, second try %v", agent.header, agent.node, agent.second)
	}
	if agent.header.Src.String() != client.LocalAddr().String() {
		t.Errorf("source in the header is %v, want %v", agent.header.Src, client.LocalAddr())
	}
	agent.reply(wire.StatusOK)
	send(t, agent, "SSH-2.0-test\r\n")
	expect(t, client, "SSH-2.0-test\r\n")
	send(t, client, "SSH-2.0-client\r\n")
	expect(t, agent, "SSH-2.0-client\r\n")
	client.Close()
	expectEOF(t, agent)
	agent.Close()
	l.ended("closed")
}

func TestClientBytesDoNotWaitForTheStatus(t *testing.T) {
	l := newLab(t, nil)
	client := l.dial()
	agent := l.next()
	for _, text := range []string{"first", "second"} {
		send(t, client, text)
		expect(t, agent, text)
	}
	agent.reply(wire.StatusOK)
	send(t, client, "third")
	expect(t, agent, "third")
	send(t, agent, "answer")
	expect(t, client, "answer")
}

func TestHalfClose(t *testing.T) {
	t.Run("client, before the status", func(t *testing.T) {
		l := newLab(t, nil)
		client := l.dial()
		send(t, client, "all there is")
		client.CloseWrite()
		agent := l.next()
		expect(t, agent, "all there is")
		expectEOF(t, agent)
		agent.reply(wire.StatusOK)
		send(t, agent, "late answer")
		expect(t, client, "late answer")
		agent.CloseWrite()
		expectEOF(t, client)
		l.ended("closed")
	})
	t.Run("client, after the status", func(t *testing.T) {
		l := newLab(t, nil)
		client := l.dial()
		agent := l.next()
		agent.reply(wire.StatusOK)
		send(t, client, "x")
		expect(t, agent, "x")
		client.CloseWrite()
		expectEOF(t, agent)
		send(t, agent, strings.Repeat("y", 1<<20))
		expect(t, client, strings.Repeat("y", 1<<20))
		agent.CloseWrite()
		expectEOF(t, client)
		l.ended("closed")
	})
	t.Run("service", func(t *testing.T) {
		l := newLab(t, nil)
		client := l.dial()
		agent := l.next()
		agent.reply(wire.StatusOK)
		send(t, agent, "bye")
		agent.CloseWrite()
		expect(t, client, "bye")
		expectEOF(t, client)
		send(t, client, "still here")
		expect(t, agent, "still here")
		client.Close()
		expectEOF(t, agent)
		l.ended("closed")
	})
}

func TestReset(t *testing.T) {
	t.Run("client, before the status", func(t *testing.T) {
		l := newLab(t, nil)
		client := l.dial()
		send(t, client, "x")
		agent := l.next()
		expect(t, agent, "x")
		reset(client)
		expectReset(t, agent)
		l.ended("client_reset")
	})
	t.Run("client that had finished, before the status", func(t *testing.T) {
		l := newLab(t, nil)
		client := l.dial()
		client.CloseWrite()
		agent := l.next()
		expectEOF(t, agent)
		reset(client)
		// After the end of data there is nothing to be read: only a watcher sees it.
		if err := relay.TCP(agent.TCPConn).(relay.Watcher).WaitFailed(); !relay.IsReset(err) {
			t.Errorf("stream ended with %v, want a reset", err)
		}
		l.ended("client_reset")
	})
	t.Run("client, after the status", func(t *testing.T) {
		l := newLab(t, nil)
		client := l.dial()
		agent := l.next()
		agent.reply(wire.StatusOK)
		send(t, agent, "x")
		expect(t, client, "x")
		reset(client)
		expectReset(t, agent)
		l.ended("client_reset")
	})
	t.Run("stream, before the status", func(t *testing.T) {
		l := newLab(t, nil)
		client := l.dial()
		reset(l.next().TCPConn)
		expectReset(t, client)
		l.ended("stream_lost")
	})
	t.Run("stream ends before the status", func(t *testing.T) {
		l := newLab(t, nil)
		client := l.dial()
		l.next().Close()
		expectReset(t, client)
		l.ended("stream_lost")
	})
	t.Run("stream, after the status", func(t *testing.T) {
		l := newLab(t, nil)
		client := l.dial()
		agent := l.next()
		agent.reply(wire.StatusOK)
		send(t, agent, "x")
		expect(t, client, "x")
		reset(agent.TCPConn)
		expectReset(t, client)
		l.ended("remote_reset")
	})
	t.Run("garbage for a status", func(t *testing.T) {
		l := newLab(t, nil)
		client := l.dial()
		send(t, l.next(), "HTTP/1.1 400 Bad Request\r\n\r\n")
		expectReset(t, client)
		l.ended("bad_reply")
	})
}

func TestStatusNotOK(t *testing.T) {
	for _, status := range []wire.Status{wire.StatusRefused, wire.StatusTimedOut, wire.StatusUnreachable, wire.StatusNotAllowed,
		wire.StatusOverloaded, wire.StatusBadRequest, wire.StatusInternal, 99} {
		t.Run(status.String(), func(t *testing.T) {
			l := newLab(t, nil)
			client := l.dial()
			agent := l.next()
			agent.reply(status)
			expectReset(t, client)
			expectReset(t, agent)
			l.ended(status.String())
			if s := l.server.Stats(); s.Retried != 0 || len(l.opens) != 0 {
				t.Error("tried again, though the edge service may have been dialed")
			}
			if r := l.record(); r["detail"] != "because "+status.String() {
				t.Errorf("record %v", r)
			}
		})
	}
}

func TestSecondTry(t *testing.T) {
	for _, status := range []wire.Status{wire.StatusNotOwner, wire.StatusNoTunnel, wire.StatusDraining} {
		t.Run(status.String(), func(t *testing.T) {
			l := newLab(t, nil)
			client := l.dial()
			send(t, client, "hello")
			first := l.next()
			expect(t, first, "hello")
			first.reply(status)
			second := l.next()
			if !second.second || second.header != first.header {
				t.Errorf("second try: %v, header %+v after %+v", second.second, second.header, first.header)
			}
			expectReset(t, first)
			expect(t, second, "hello")
			send(t, client, " again")
			expect(t, second, " again")
			second.reply(wire.StatusOK)
			send(t, second, "there")
			expect(t, client, "there")
			client.Close()
			second.Close()
			l.ended("closed")
			if n := l.server.Stats().Retried; n != 1 {
				t.Errorf("%d retried, want 1", n)
			}
			if r := l.record(); r["retried"] != true || r["sent"] != 11.0 {
				t.Errorf("record %v: want 11 bytes, retried", r)
			}
		})
	}
	t.Run("only one", func(t *testing.T) {
		l := newLab(t, nil)
		client := l.dial()
		l.next().reply(wire.StatusDraining)
		l.next().reply(wire.StatusNoTunnel)
		expectReset(t, client)
		l.ended("no_tunnel")
		if len(l.opens) != 0 {
			t.Error("a third stream was opened")
		}
	})
	t.Run("carries the end of data", func(t *testing.T) {
		l := newLab(t, nil)
		client := l.dial()
		send(t, client, "all")
		client.CloseWrite()
		first := l.next()
		expect(t, first, "all")
		expectEOF(t, first)
		first.reply(wire.StatusNotOwner)
		second := l.next()
		expect(t, second, "all")
		expectEOF(t, second)
		second.reply(wire.StatusOK)
		send(t, second, "done")
		second.CloseWrite()
		expect(t, client, "done")
		expectEOF(t, client)
		l.ended("closed")
	})
	t.Run("client resets during it", func(t *testing.T) {
		l := newLab(t, nil)
		client := l.dial()
		l.next().reply(wire.StatusNotOwner)
		second := l.next()
		reset(client)
		expectReset(t, second)
		l.ended("client_reset")
	})
}

// A client may send any amount before the status; only wire.MaxRetained of it is taken until the status is there.
func TestKeepsNoMoreThanAllowed(t *testing.T) {
	payload := make([]byte, 1<<20)
	rng := rand.NewChaCha8([32]byte{})
	rng.Read(payload)
	for _, retry := range []bool{false, true} {
		l := newLab(t, nil)
		client := l.dial()
		sent := make(chan error, 1)
		go func() {
			_, err := client.Write(payload)
			sent <- errors.Join(err, client.CloseWrite())
		}()
		agent := l.next()
		early := make([]byte, wire.MaxRetained)
		if _, err := io.ReadFull(agent, early); err != nil || !bytes.Equal(early, payload[:len(early)]) {
			t.Fatal("first bytes differ", err)
		}
		agent.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		if n, _ := agent.Read(make([]byte, 1)); n != 0 {
			t.Fatal("more was sent than can be kept")
		}
		agent.SetReadDeadline(time.Time{})
		if retry {
			agent.reply(wire.StatusDraining)
			agent = l.next()
			early = nil
		}
		agent.reply(wire.StatusOK)
		rest, err := io.ReadAll(agent)
		if err != nil || !bytes.Equal(append(early, rest...), payload) {
			t.Fatalf("retry %v: got %d bytes, %v, want the payload of %d", retry, len(early)+len(rest), err, len(payload))
		}
		if err := <-sent; err != nil {
			t.Fatal(err)
		}
		agent.Close()
		l.ended("closed")
	}
}

func TestStatusTimeout(t *testing.T) {
	l := newLab(t, func(c *intercept.Config) { c.StatusTimeout = 50 * time.Millisecond })
	client := l.dial()
	agent := l.next()
	send(t, client, "x")
	expectReset(t, client)
	expectReset(t, agent)
	l.ended("status_timed_out")
}
