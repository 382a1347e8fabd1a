// SPDX-License-Identifier: Apache-2.0

package ledger_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/edge-tunnel/edge-tunnel/pkg/relay"
	"github.com/edge-tunnel/edge-tunnel/pkg/relay/ledger"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestBegunIsOpenPlusEnded(t *testing.T) {
	book := ledger.New[int](100, "closed", "refused")
	var wg sync.WaitGroup
	for i := range 100 {
		wg.Go(func() {
			e, ok := book.Begin(time.Now())
			if !ok {
				t.Error("no place")
				return
			}
			e.Describe(i)
			switch i % 4 {
			case 0:
				e.End("closed")
			case 1:
				e.End("refused")
			case 2:
				e.End("something new")
			}
		})
	}
	wg.Wait()
	s := book.Stats()
	if s.Begun != 100 || s.Open != 25 || s.Ended["closed"] != 25 || s.Ended["refused"] != 25 || s.Ended[ledger.Other] != 25 || len(s.Ended) != 3 {
		t.Errorf("stats = %+v", s)
	}
	if got := len(book.Open()); got != 25 {
		t.Errorf("%d connections listed, want 25", got)
	}
}

func TestLimitAndClose(t *testing.T) {
	book := ledger.New[string](1)
	e, ok := book.Begin(time.Now())
	if !ok {
		t.Fatal("no place in an empty book")
	}
	if _, ok := book.Begin(time.Now()); ok {
		t.Error("a place beyond the limit")
	}
	if len(book.Open()) != 0 {
		t.Error("a connection is listed before anything is known about it")
	}
	book.Close()
	expired, cancel := context.WithCancel(context.Background())
	cancel()
	if err := book.Wait(expired); !errors.Is(err, context.Canceled) {
		t.Errorf("Wait with a connection open = %v", err)
	}
	e.End(ledger.Other)
	if _, ok := book.Begin(time.Now()); ok {
		t.Error("a place in a closed book")
	}
	if n := book.Stats().Overflowed; n != 2 {
		t.Errorf("%d overflowed, want 2", n)
	}
	book.Close()
	if err := book.Wait(context.Background()); err != nil {
		t.Error(err)
	}
}

func TestCount(t *testing.T) {
	a, b := net.Pipe()
	defer b.Close()
	book := ledger.New[string](1)
	e, _ := book.Begin(time.Now())
	e.Describe("x")
	c := e.Client(pipe{a})
	defer c.Close()
	go b.Write([]byte("hello"))
	buf := make([]byte, 16)
	if n, err := c.Read(buf); n != 5 || err != nil {
		t.Fatal(n, err)
	}
	go b.Read(buf)
	if n, err := c.Write([]byte("abc")); n != 3 || err != nil {
		t.Fatal(n, err)
	}
	r := e.Remote(pipe{a})
	go b.Read(buf)
	r.Write([]byte("ab"))
	go b.Write([]byte("c"))
	r.Read(make([]byte, 1))
	if open := book.Open(); len(open) != 1 || open[0].Sent != 7 || open[0].Received != 4 {
		t.Errorf("open = %+v", open)
	}
	if s := book.Stats(); s.Sent != 7 || s.Received != 4 {
		t.Errorf("totals with the connection open: %+v", s)
	}
	defer func() {
		if s := book.Stats(); s.Sent != 7 || s.Received != 4 || s.Open != 0 {
			t.Errorf("totals after its end: %+v", s)
		}
	}()
	if r := e.End("x"); r.Facts != "x" || r.Sent != 7 || r.Received != 4 {
		t.Errorf("result = %+v", r)
	}
}

func TestEndedTellsALostTunnelFromAReset(t *testing.T) {
	for _, c := range []struct {
		result         relay.Result
		reason, detail string
	}{
		{relay.Result{Reason: relay.Closed}, "closed", ""},
		{relay.Result{Reason: relay.RemoteReset, Err: errors.New("x")}, "remote_reset", ""},
		{relay.Result{Reason: relay.RemoteError, Err: errors.New("x")}, "remote_error", "x"},
		{relay.Result{Reason: relay.RemoteReset, Err: fmt.Errorf("read: %w", lost{})}, "tunnel_lost", "read: gone"},
		{relay.Result{Reason: relay.Canceled, Err: lost{}}, "canceled", ""},
	} {
		if reason, detail := ledger.Ended(c.result); reason != c.reason || detail != c.detail {
			t.Errorf("%+v is %q, %q", c.result, reason, detail)
		}
		if !slices.Contains(ledger.RelayReasons(), c.reason) {
			t.Errorf("%q is not announced", c.reason)
		}
	}
}

type lost struct{}

func (lost) Error() string  { return "gone" }
func (lost) Reason() string { return "tunnel_lost" }

type pipe struct{ net.Conn }

func (pipe) CloseWrite() error { return nil }
func (pipe) Reset() error      { return nil }

var _ relay.Conn = pipe{}
