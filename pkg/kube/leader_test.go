// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	coordinationv1 "k8s.io/api/coordination/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
)

// candidates are processes of which one leads.
type candidates struct {
	t       *testing.T
	client  *fake.Clientset
	leading atomic.Int64 // how many at once
}

func (c *candidates) start(identity string) (l *Leader, stop func()) {
	c.t.Helper()
	l, err := NewLeader(LeaderConfig{Client: c.client, Namespace: ns, Name: "lease", Identity: identity, Lease: 1500 * time.Millisecond})
	if err != nil {
		c.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := l.Run(ctx, c.lead); err != nil {
			c.t.Error(err)
		}
	})
	stop = func() {
		cancel()
		wg.Wait()
	}
	c.t.Cleanup(stop)
	return l, stop
}

func (c *candidates) lead(ctx context.Context) error {
	if n := c.leading.Add(1); n != 1 {
		c.t.Errorf("%d lead", n)
	}
	defer c.leading.Add(-1)
	<-ctx.Done()
	return errors.New("says something")
}

func TestLeader(t *testing.T) {
	c := &candidates{t: t, client: fake.NewClientset()}
	a, stopA := c.start("a")
	eventually(t, "a leads", func() bool { return a.Stats().Leading })
	b, _ := c.start("b")
	eventually(t, "b knows", func() bool { return b.Stats().Leader == "a" })
	begin := time.Now()
	stopA()
	if c.leading.Load() != 0 {
		t.Error("still leads")
	}
	eventually(t, "b leads", func() bool { return b.Stats().Leading })
	if d := time.Since(begin); d > 1300*time.Millisecond {
		t.Logf("taken over after %v: the lease was not given back", d)
	}
	if st := a.Stats(); st.Leading || st.Terms != 1 {
		t.Errorf("%+v", st)
	}
}

// TestLeaderWithoutAPIServer: the leadership is lost and won again; neither ends the process.
func TestLeaderWithoutAPIServer(t *testing.T) {
	c := &candidates{t: t, client: fake.NewClientset()}
	var down atomic.Bool
	c.client.PrependReactor("*", "leases", func(clienttesting.Action) (bool, runtime.Object, error) {
		if down.Load() {
			return true, nil, apierrors.NewServiceUnavailable("down")
		}
		return false, nil, nil
	})
	down.Store(true) // from the start
	a, _ := c.start("a")
	time.Sleep(300 * time.Millisecond)
	if st := a.Stats(); st.Leading || !strings.Contains(st.Error, "down") {
		t.Errorf("%+v", st)
	}
	for term := uint64(1); term <= 2; term++ {
		down.Store(false)
		eventually(t, "leads", func() bool { return a.Stats().Leading && a.Stats().Terms == term && a.Stats().Error == "" })
		down.Store(true)
		eventually(t, "lost", func() bool { return !a.Stats().Leading })
	}
}

// TestLeaderWhoseLeaseIsTaken: somebody else writes themselves into it.
func TestLeaderWhoseLeaseIsTaken(t *testing.T) {
	c := &candidates{t: t, client: fake.NewClientset()}
	// Fakes take every update. The API server does not take one of what has changed since, here because "b" was faster.
	other, seconds, now := "b", int32(2), metav1.NowMicro()
	stolen := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "lease"}, Spec: coordinationv1.LeaseSpec{
		HolderIdentity: &other, LeaseDurationSeconds: &seconds, AcquireTime: &now, RenewTime: &now}}
	var taken atomic.Bool
	c.client.PrependReactor("update", "leases", func(a clienttesting.Action) (bool, runtime.Object, error) {
		if !taken.Load() {
			return false, nil, nil
		}
		if err := c.client.Tracker().Update(coordinationv1.SchemeGroupVersion.WithResource("leases"), stolen, ns); err != nil {
			t.Error(err)
		}
		return true, nil, apierrors.NewConflict(a.GetResource().GroupResource(), "lease", errors.New("changed"))
	})
	a, _ := c.start("a")
	eventually(t, "leads", func() bool { return a.Stats().Leading })
	taken.Store(true)
	eventually(t, "lost", func() bool { return !a.Stats().Leading && a.Stats().Leader == "b" })
	taken.Store(false)
	eventually(t, "won again", func() bool { return a.Stats().Leading && a.Stats().Terms == 2 })
}

func TestLeaderWithoutIdentity(t *testing.T) {
	if _, err := NewLeader(LeaderConfig{Client: fake.NewClientset(), Namespace: ns, Name: "lease"}); err == nil {
		t.Error("taken")
	}
}

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }
