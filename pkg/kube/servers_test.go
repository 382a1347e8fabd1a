// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/edge-tunnel/edge-tunnel/test/kubebed"
)

func shard(server, nodes string) *coordinationv1.Lease {
	return &coordinationv1.Lease{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "y-" + server, Labels: map[string]string{LabelRegistry: registryNodes},
			Annotations: map[string]string{annotationTunnel: nodes}},
		Spec: coordinationv1.LeaseSpec{HolderIdentity: &server},
	}
}

// heard is a servers with a clock of its own, that is told what Leases say.
type heard struct {
	*servers
	t     *testing.T
	clock time.Time
}

func hear(t *testing.T, client kubernetes.Interface, namespace string) *heard {
	h := &heard{t: t, clock: time.Now(), servers: newServers(client, namespace, slog.New(slog.DiscardHandler))}
	h.now = func() time.Time { return h.clock }
	return h
}

func (h *heard) beat(server string, age time.Duration) { h.seen(nil, heartbeat(server, "", age)) }

func (h *heard) are(want string) {
	h.t.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	var got []string
	for server := range h.beats {
		got = append(got, fmt.Sprintf("%s:%d:%v", server, h.of(server), h.dead(server)))
	}
	if slices.Sort(got); strings.Join(got, " ") != want {
		h.t.Errorf("%s, want %s", got, want)
	}
}

// Which servers are there is told by what is seen to change, not by clocks.
func TestLiveness(t *testing.T) {
	h := hear(t, fake.NewClientset(), ns)
	h.beat("a", 0)
	h.beat("b", 30*time.Minute)
	h.beat("c", 2*time.Hour)
	h.are("a:1:false b:0:false c:0:false")
	h.clock = h.clock.Add(30 * time.Second)
	h.beat("a", 0)
	h.beat("c", 2*time.Hour-time.Second) // its clock is wrong
	h.are("a:2:false b:0:false c:2:false")
	h.clock = h.clock.Add(serverSilent)
	h.are("a:0:false b:0:false c:0:false")
	h.clock = h.clock.Add(deadStill)
	h.are("a:0:false b:0:false c:0:false") // nobody is alive
	h.beat("a", -2*time.Hour)              // a day later, say
	h.are("a:2:false b:0:true c:0:true")
	h.beat("c", time.Minute)
	h.are("a:2:false b:0:true c:2:false")
	h.seen(heartbeat("b", "", 0), nil)
	h.are("a:2:false c:2:false")
}

// Leases of servers that are gone for good are deleted, and no others, on a real API server with the rights in deploy/.
func TestSweep(t *testing.T) {
	api := kubebed.APIServer(t)
	api.Install()
	account, err := NewClient(ClientOptions{Kubeconfig: api.ServiceAccount("kube-system", "tunnel-controller")})
	must(t, err)
	admin, err := NewClient(ClientOptions{Kubeconfig: api.Admin(), QPS: 1000})
	must(t, err)
	const namespace = "edge-tunnel-leases"
	leases := admin.CoordinationV1().Leases(namespace)
	put := func(l *coordinationv1.Lease) {
		t.Helper()
		l.Namespace = namespace
		_, err := leases.Create(t.Context(), l, metav1.CreateOptions{})
		must(t, err)
	}
	put(heartbeat("gone", "192.0.2.9:10262", 2*time.Hour))
	put(shard("gone", "edge-1"))
	put(heartbeat("back", "192.0.2.8:10262", 2*time.Hour))
	put(heartbeat("late", "192.0.2.7:10262", 30*time.Minute))
	put(shard("orphan", "edge-2"))
	other := heartbeat("other", "", 3*time.Hour)
	delete(other.Labels, LabelRegistry)
	put(other)

	one, err := NewRegistry(RegistryConfig{Client: admin, Namespace: namespace, Server: "one", Addr: func() string { return "192.0.2.1:10262" }, Peers: func([]string) {}})
	must(t, err)
	one.every = 50 * time.Millisecond
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { _ = one.Run(ctx) })
	one.Own("edge-3", true)

	var ahead atomic.Int64
	s := newServers(account, namespace, slog.New(slog.DiscardHandler))
	s.now = func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
	wg.Go(func() { s.leases.run(ctx) })
	known := func(server string, want liveness) func() bool {
		return func() bool {
			all, whole := s.look()
			return whole && all[server] == want
		}
	}
	eventually(t, "one is alive", known("one", alive))
	s.sweep(ctx)
	ahead.Store(int64(deadStill))
	eventually(t, "one is alive", known("one", alive))
	// A server that is back between our look and our word is left alone.
	old, _ := s.leases.get("x-back")
	touch := func(text string) {
		t.Helper()
		_, err = leases.Patch(t.Context(), "x-back", "application/merge-patch+json", []byte(`{"metadata":{"annotations":{"test":"`+text+`"}}}`), metav1.PatchOptions{})
		must(t, err)
		eventually(t, "seen", func() bool { l, _ := s.leases.get("x-back"); return l.Annotations["test"] == text })
	}
	touch("1")
	s.leases.mu.Lock()
	s.leases.objects[old.Name] = old
	s.leases.mu.Unlock()
	s.sweep(ctx)
	if _, err := s.sweeps(); err != nil {
		t.Error(err)
	}
	_, err = leases.Get(t.Context(), "x-back", metav1.GetOptions{})
	must(t, err)
	touch("2")
	eventually(t, "what is gone is deleted", func() bool {
		list, err := leases.List(t.Context(), metav1.ListOptions{})
		must(t, err)
		var names []string
		for _, l := range list.Items {
			if !strings.HasPrefix(l.Name, "edge-tunnel-") { // one's
				names = append(names, l.Name)
			}
		}
		s.sweep(ctx)
		return slices.Equal(names, []string{"x-late", "x-other"})
	})
	if swept, err := s.sweeps(); swept != 4 || err != nil {
		t.Errorf("%d swept, %v", swept, err)
	}

	// One that was taken for gone says again what it has.
	must(t, leases.DeleteCollection(t.Context(), metav1.DeleteOptions{}, metav1.ListOptions{LabelSelector: LabelRegistry}))
	eventually(t, "written again", func() bool {
		list, err := leases.List(t.Context(), metav1.ListOptions{LabelSelector: LabelRegistry + "=" + registryNodes})
		must(t, err)
		return len(list.Items) == 1 && list.Items[0].Annotations[annotationTunnel] == "edge-3"
	})

	// Without the right to delete it says so.
	role, err := admin.RbacV1().Roles(namespace).Get(t.Context(), "edge-tunnel-controller", metav1.GetOptions{})
	must(t, err)
	role.Rules[0].Verbs = []string{"list", "watch"}
	_, err = admin.RbacV1().Roles(namespace).Update(t.Context(), role, metav1.UpdateOptions{})
	must(t, err)
	put(heartbeat("gone", "192.0.2.9:10262", 2*time.Hour))
	eventually(t, "seen", func() bool { l, _ := s.leases.get("x-gone"); return l != nil && known("one", alive)() })
	ahead.Add(int64(deadStill))
	eventually(t, "the missing right is named", func() bool {
		s.sweep(ctx)
		_, err := s.sweeps()
		return err != nil && strings.Contains(err.Error(), `cannot delete resource "leases"`)
	})
}
