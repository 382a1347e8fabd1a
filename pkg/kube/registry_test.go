// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
)

// registered is a server with a registry.
type registered struct {
	*Registry
	addr  atomic.Pointer[string]
	peers atomic.Pointer[[]string]
	stop  func()
}

func register(t *testing.T, client kubernetes.Interface, server, addr string) *registered {
	t.Helper()
	s := &registered{}
	s.addr.Store(&addr)
	var err error
	s.Registry, err = NewRegistry(RegistryConfig{
		Client: client, Namespace: ns, Server: server, Addr: func() string { return *s.addr.Load() },
		Peers: func(addrs []string) { s.peers.Store(&addrs) },
	})
	if err != nil {
		t.Fatal(err)
	}
	s.every = 20 * time.Millisecond
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := s.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	s.stop = func() {
		cancel()
		wg.Wait()
	}
	t.Cleanup(s.stop)
	return s
}

func (s *registered) peersAre(want ...string) func() bool {
	return func() bool {
		got := s.peers.Load()
		return got != nil && slices.Equal(*got, want)
	}
}

func (s *registered) ownerIs(node, want string) func() bool {
	return func() bool { return s.Owner(node) == want }
}

// Servers find each other and what they have, follow changes, and let go of what a predecessor has left. At rest nothing but heartbeats is
// written.
func TestRegistry(t *testing.T) {
	client := fake.NewClientset()
	one, two := register(t, client, "cloud-1", "192.0.2.1:10262"), register(t, client, "cloud-2", "[2001:db8::2]:10262")
	eventually(t, "one finds two", one.peersAre("[2001:db8::2]:10262"))
	eventually(t, "two finds one", two.peersAre("192.0.2.1:10262"))
	moved := "192.0.2.9:10262"
	two.addr.Store(&moved)
	eventually(t, "two has moved", one.peersAre(moved))

	for i := range 1000 {
		one.Own(fmt.Sprint("edge-", i), true)
	}
	two.Own("edge-7", true)
	eventually(t, "all are known", func() bool { return two.Stats().Nodes == 1000 && one.Stats().Nodes == 1 })
	if got := two.Owner("edge-7"); got != "cloud-1" {
		t.Errorf("found at %q", got)
	}
	if got := one.Owner("edge-8"); got != "" {
		t.Errorf("its own node is found at %q", got)
	}
	one.Own("edge-8", false)
	eventually(t, "one is known no more", two.ownerIs("edge-8", ""))
	if n := one.Stats().Writes; n > 200 {
		t.Errorf("%d writes for 1,001 changes", n)
	}
	client.ClearActions()
	time.Sleep(20 * one.every)
	for _, a := range client.Actions() {
		if p, ok := a.(clienttesting.PatchAction); ok && !strings.Contains(p.GetName(), "server") {
			t.Errorf("written again: %s", p.GetName())
		}
	}

	one.stop()
	again := register(t, client, "cloud-1", "192.0.2.1:10262")
	again.Own("edge-0", true)
	eventually(t, "what was left is gone", func() bool { return two.Stats().Nodes == 1 && two.Owner("edge-0") == "cloud-1" })
	if st := two.Stats(); st.Servers != 1 || st.Err != nil || st.Failures != 0 {
		t.Errorf("%+v", st)
	}
}

// Without the API server everything stays as it was, and is caught up with afterwards.
func TestRegistryWithoutAPIServer(t *testing.T) {
	client := fake.NewClientset()
	var away atomic.Bool
	client.PrependReactor("*", "leases", func(clienttesting.Action) (bool, runtime.Object, error) {
		return away.Load(), nil, errors.New("connection refused")
	})
	one, two := register(t, client, "cloud-1", "192.0.2.1:10262"), register(t, client, "cloud-2", "192.0.2.2:10262")
	one.Own("edge-1", true)
	eventually(t, "found", func() bool { return two.peersAre("192.0.2.1:10262")() && two.Owner("edge-1") == "cloud-1" })
	away.Store(true)
	eventually(t, "it is seen", func() bool { return one.Stats().Err != nil })
	one.Own("edge-2", true)
	time.Sleep(20 * one.every)
	if !two.peersAre("192.0.2.1:10262")() || two.Owner("edge-1") != "cloud-1" || two.Owner("edge-2") != "" {
		t.Errorf("peers %q, %+v", *two.peers.Load(), two.Stats())
	}
	away.Store(false)
	eventually(t, "caught up", func() bool { return two.Owner("edge-2") == "cloud-1" && one.Stats().Err == nil })
}

func heartbeat(server, addr string, age time.Duration) *coordinationv1.Lease {
	renewed := metav1.NewMicroTime(time.Now().Add(-age))
	return &coordinationv1.Lease{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "x-" + server, Labels: map[string]string{LabelRegistry: registryServer},
			Annotations: map[string]string{annotationPeer: addr}},
		Spec: coordinationv1.LeaseSpec{HolderIdentity: &server, RenewTime: &renewed},
	}
}

// Who has not written for long is gone, if others have written; and what makes no sense is left out.
func TestRegistryLeavesOut(t *testing.T) {
	unnamed, never, other := heartbeat("cloud-6", "192.0.2.6:1", 0), heartbeat("cloud-7", "192.0.2.7:1", 0), heartbeat("cloud-8", "192.0.2.8:1", 0)
	unnamed.Spec.HolderIdentity, never.Spec.RenewTime, other.Labels[LabelRegistry] = nil, nil, "something else"
	client := fake.NewClientset(
		heartbeat("cloud-2", "192.0.2.2:10262", time.Hour), heartbeat("cloud-3", "192.0.2.3:10262", time.Hour-serverGone/2),
		heartbeat("cloud-4", "192.0.2.4", time.Hour), heartbeat("cloud-5", "", time.Hour), unnamed, other)
	// The API server has come back after an hour, and nobody else has written yet.
	var refuse atomic.Bool
	refuse.Store(true)
	client.PrependReactor("patch", "leases", func(clienttesting.Action) (bool, runtime.Object, error) {
		return refuse.Load(), nil, errors.New("not yet")
	})
	one := register(t, client, "cloud-1", "192.0.2.1:10262")
	eventually(t, "all that make sense", one.peersAre("192.0.2.2:10262", "192.0.2.3:10262"))
	if _, err := client.CoordinationV1().Leases(ns).Create(t.Context(), heartbeat("cloud-9", "192.0.2.9:10262", time.Hour-serverGone), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := client.CoordinationV1().Leases(ns).Create(t.Context(), never, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "one is too old now", one.peersAre("192.0.2.3:10262", "192.0.2.9:10262"))
	if err := client.CoordinationV1().Leases(ns).Delete(t.Context(), "x-cloud-9", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "and back", one.peersAre("192.0.2.2:10262", "192.0.2.3:10262"))
}

// Whatever a Lease says, it is forgotten with the Lease, and what is passed on can be dialed. What reads the annotations is fuzzed in package text.
func TestRegistryForgets(t *testing.T) {
	var told []string
	r, err := NewRegistry(RegistryConfig{Client: fake.NewClientset(), Namespace: ns, Server: "cloud-1",
		Addr: func() string { return "" }, Peers: func(addrs []string) { told = addrs }})
	if err != nil {
		t.Fatal(err)
	}
	odd := []string{"", ",", ",,", "edge-1", "edge-1,edge-2,,edge-1", "192.0.2.2:10262", "[::1]:0", "::1:1", ":1", "a:65536", "a:-1", "\x00,\xff", "127.0.0.1:1"}
	now := metav1.NowMicro()
	for _, kind := range []string{registryServer, registryNodes, "", "other"} {
		for _, server := range []string{"", "cloud-2"} {
			for _, text := range odd {
				l := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: "x", Labels: map[string]string{LabelRegistry: kind},
					Annotations: map[string]string{annotationPeer: text, annotationTunnel: text}},
					Spec: coordinationv1.LeaseSpec{HolderIdentity: &server, RenewTime: &now}}
				r.seen(nil, l)
				if len(told) > 0 && !slices.Equal(told, []string{"192.0.2.2:10262"}) {
					t.Errorf("told %q of %q", told, text)
				}
				r.seen(l, l)
				r.seen(l, nil)
				if st := r.Stats(); st.Nodes != 0 || st.Servers != 0 || len(told) != 0 {
					t.Errorf("%s %q left %+v, %q", kind, text, st, told)
				}
			}
		}
	}
}
