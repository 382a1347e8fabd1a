// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/tunnel"
)

var _ asker = (*tunnel.Peers)(nil)

// askerFake is some other servers.
type askerFake struct {
	mu      sync.Mutex
	has     map[string][]string // nodes, by server; a server that is not in it is not connected
	hangs   string              // it does not answer
	asked   []string            // "server [node node]"
	largest int                 // number of nodes in a question
}

func (a *askerFake) Live() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	var live []string
	for name := range a.has {
		live = append(live, name)
	}
	slices.Sort(live)
	return live
}

func (a *askerFake) Ask(ctx context.Context, server string, nodes []string) ([]string, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	slices.Sort(nodes)
	a.largest = max(a.largest, len(nodes))
	a.asked = append(a.asked, fmt.Sprint(server, " ", nodes))
	if server == a.hangs {
		a.mu.Unlock()
		<-ctx.Done()
		a.mu.Lock()
		return nil, ctx.Err()
	}
	has, ok := a.has[server]
	if !ok {
		return nil, tunnel.ErrNoPeer
	}
	return append(slices.Clone(has), "edge-unasked"), nil
}

func (a *askerFake) set(server string, nodes ...string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.has[server], a.asked = nodes, nil
}

func (a *askerFake) questions() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	list := a.asked
	a.asked = nil
	return list
}

// ownersTest runs owners in a bubble, and keeps what they tell.
type ownersTest struct {
	*owners
	peers *askerFake
	mu    sync.Mutex // guards what follows
	known []string
	told  []string
	hints string // the server that is said to have everything
}

func (o *ownersTest) setHint(server string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.hints = server
}

func (o *ownersTest) news() []string {
	synctest.Wait()
	o.mu.Lock()
	defer o.mu.Unlock()
	list := o.told
	o.told = nil
	slices.Sort(list)
	return list
}

func testOwners(t *testing.T, known []string, test func(t *testing.T, o *ownersTest)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		o := &ownersTest{peers: &askerFake{has: map[string][]string{"cloud-2": nil, "cloud-3": nil}}, known: known}
		o.owners = newOwners(o.peers, func() []string {
			o.mu.Lock()
			defer o.mu.Unlock()
			return o.known
		}, func(node string, online bool) {
			o.mu.Lock()
			defer o.mu.Unlock()
			o.told = append(o.told, fmt.Sprint(node, " ", online))
		})
		o.hint = func(string) string {
			o.mu.Lock()
			defer o.mu.Unlock()
			return o.hints
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- o.run(ctx) }()
		test(t, o)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func (o *ownersTest) want(t *testing.T, what string, want ...string) {
	t.Helper()
	if got := o.news(); !slices.Equal(got, want) {
		t.Errorf("%s: told %q, want %q", what, got, want)
	}
}

// A node is online as long as any server has a tunnel of it, and its move from one to another is not seen.
func TestOwnersFollowANode(t *testing.T) {
	testOwners(t, []string{"edge-1", "edge-2"}, func(t *testing.T, o *ownersTest) {
		o.want(t, "nobody has a node")
		o.peers.set("cloud-2", "edge-1")
		time.Sleep(askEvery + askPause)
		o.want(t, "a peer has one", "edge-1 true")

		o.peers.set("cloud-2")
		o.peers.set("cloud-3", "edge-1")
		time.Sleep(askEvery + askPause)
		o.want(t, "it moved")
		if peer := o.find(t.Context(), "edge-1"); peer != "cloud-3" {
			t.Errorf("found at %q", peer)
		}
		// Only who has it is asked as long as that is so.
		o.peers.questions()
		time.Sleep(askEvery)
		synctest.Wait()
		got := o.peers.questions()
		slices.Sort(got)
		if want := []string{"cloud-2 [edge-2]", "cloud-3 [edge-1 edge-2]"}; !slices.Equal(got, want) {
			t.Errorf("asked %q, want %q", got, want)
		}

		o.peers.questions()
		o.setHint("cloud-3")
		time.Sleep(askEvery)
		synctest.Wait()
		got = o.peers.questions()
		slices.Sort(got)
		if want := []string{"cloud-2 [edge-2]", "cloud-3 [edge-1 edge-2]"}; !slices.Equal(got, want) {
			t.Errorf("with a hint that is wrong asked %q, want %q", got, want)
		}
		o.peers.set("cloud-3", "edge-1", "edge-2")
		time.Sleep(askEvery)
		o.want(t, "the hint is right", "edge-2 true")
		if want := []string{"cloud-3 [edge-1 edge-2]"}; !slices.Equal(o.peers.questions(), want) {
			t.Error("others were asked, too")
		}
		o.setHint("cloud-9")
		o.peers.set("cloud-3", "edge-1")
		time.Sleep(askEvery)
		o.want(t, "a hint to nobody", "edge-2 false")

		o.changed("edge-1", true)
		o.peers.set("cloud-3")
		time.Sleep(2 * askEvery)
		o.want(t, "it has a tunnel here")
		o.peers.set("cloud-2", "edge-1")
		o.changed("edge-1", false)
		time.Sleep(2 * askPause)
		o.want(t, "it went to a peer")
		o.peers.set("cloud-2")
		time.Sleep(askEvery + askPause)
		o.want(t, "it is gone", "edge-1 false")
		o.changed("edge-1", true)
		o.peers.set("cloud-3", "edge-1")
		o.changed("edge-1", false)
		if peer := o.find(t.Context(), "edge-1"); peer != "cloud-3" {
			t.Errorf("found at %q a moment after nobody had it", peer)
		}
		o.want(t, "it was here for a moment only", "edge-1 true")
		o.peers.set("cloud-3")
		time.Sleep(askEvery + askPause)
		o.want(t, "gone again", "edge-1 false")

		o.changed("edge-2", true)
		o.want(t, "a tunnel came", "edge-2 true")
		o.changed("edge-2", false)
		time.Sleep(2 * askPause)
		o.want(t, "and went", "edge-2 false")

		o.peers.set("cloud-2", "edge-1")
		time.Sleep(askEvery + askPause)
		o.want(t, "back", "edge-1 true")
		o.mu.Lock()
		o.known = []string{"edge-2"}
		o.mu.Unlock()
		time.Sleep(askEvery + askPause)
		o.want(t, "forgotten", "edge-1 false")
	})
}

// Who does not answer is waited for no longer than a second, and is believed to have what it had; who is not connected has nothing.
func TestOwnersOfSilentPeers(t *testing.T) {
	testOwners(t, []string{"edge-1"}, func(t *testing.T, o *ownersTest) {
		o.peers.set("cloud-2", "edge-1")
		time.Sleep(askEvery + askPause)
		o.want(t, "a peer has it", "edge-1 true")
		o.peers.mu.Lock()
		o.peers.hangs = "cloud-2"
		o.peers.mu.Unlock()
		time.Sleep(5 * askEvery)
		o.want(t, "it is silent")
		o.peers.set("cloud-3", "edge-1")
		time.Sleep(3 * askEvery)
		o.want(t, "another one has it")
		if peer := o.find(t.Context(), "edge-1"); peer != "cloud-3" {
			t.Errorf("found at %q", peer)
		}
		o.peers.mu.Lock()
		clear(o.peers.has)
		o.peers.mu.Unlock()
		time.Sleep(3 * askEvery)
		o.want(t, "no peer is connected", "edge-1 false")
	})
}

// Any number of connections that wait for an owner are one question, and its answer serves those of the next second.
func TestOwnersAreAskedOnce(t *testing.T) {
	testOwners(t, nil, func(t *testing.T, o *ownersTest) {
		synctest.Wait()
		o.peers.questions()
		for range 2 {
			var wg sync.WaitGroup
			for range 1000 {
				wg.Go(func() {
					if peer := o.find(t.Context(), "edge-7"); peer != "" {
						t.Errorf("found at %q", peer)
					}
				})
			}
			wg.Wait()
		}
		if got := o.peers.questions(); len(got) > 4 { // two rounds, if some were too late for the first
			t.Errorf("asked %d times", len(got))
		}
		o.peers.set("cloud-2", "edge-7")
		o.disown("edge-7", "") // proven wrong: the cached answer does not count
		if peer := o.find(t.Context(), "edge-7"); peer != "cloud-2" {
			t.Errorf("found at %q", peer)
		}
		canceled, cancel := context.WithCancelCause(t.Context())
		cancel(errors.New("the client is gone"))
		o.disown("edge-7", "cloud-2")
		if peer := o.find(canceled, "edge-7"); peer != "" {
			t.Errorf("found at %q without waiting", peer)
		}
	})
}

// More nodes than fit into a round get their turns.
func TestOwnersOfManyNodes(t *testing.T) {
	var known []string
	for i := range 2 * maxAsk {
		known = append(known, fmt.Sprint("edge-", i))
	}
	testOwners(t, known, func(t *testing.T, o *ownersTest) {
		o.peers.set("cloud-2", known...)
		time.Sleep(30 * askEvery)
		if n, _ := o.elsewhere(); n != len(known) {
			t.Errorf("%d of %d nodes are found", n, len(known))
		}
		if o.peers.largest > maxAsk {
			t.Errorf("asked for %d nodes at once", o.peers.largest)
		}
	})
}
