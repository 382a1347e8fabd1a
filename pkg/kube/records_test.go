// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
)

func recordNodesOf(texts ...string) []recordNode {
	var nodes []recordNode
	for _, text := range texts {
		name, list, _ := strings.Cut(text, "@")
		n := recordNode{name: name}
		for a := range strings.SplitSeq(list, ",") {
			addr, _ := netip.ParseAddr(a) // garbage is an invalid address
			n.addrs = append(n.addrs, addr)
		}
		nodes = append(nodes, n)
	}
	return nodes
}

func TestRenderRecords(t *testing.T) {
	const all = 1 << 20
	for _, c := range []struct {
		name  string
		nodes []string
		room  int
		want  string
		out   []string
	}{
		{"none", nil, all, "", nil},
		{"sorted", []string{"xa@10.0.0.2", "a@10.0.0.10", "b@10.0.0.1"}, all, "10.0.0.1\tb\n10.0.0.10\ta\n10.0.0.2\txa\n", nil},
		{"both families", []string{"a@2001:db8::1,10.0.0.1"}, all, "10.0.0.1\ta\n2001:db8::1\ta\n", nil},
		{"one way to write it", []string{"a@::ffff:10.0.0.1,10.0.0.1,2001:DB8:0::1"}, all, "10.0.0.1\ta\n2001:db8::1\ta\n", nil},
		{"an address of two", []string{"b@10.0.0.1", "a@10.0.0.1"}, all, "10.0.0.1\ta\n10.0.0.1\tb\n", nil},
		{"no addresses of others", []string{"a@,127.0.0.1,::1,0.0.0.0,::,224.0.0.1,fe80::1,fe80::1%eth0,169.254.1.1", "b@10.0.0.1"}, all, "10.0.0.1\tb\n", nil},
		{"first lines first", []string{"a@10.0.0.1,10.0.0.2", "b@10.0.0.3,10.0.0.4"}, 33, "10.0.0.1\ta\n10.0.0.2\ta\n10.0.0.3\tb\n", []string{"b"}},
		{"exactly full", []string{"a@10.0.0.1", "b@10.0.0.2"}, 22, "10.0.0.1\ta\n10.0.0.2\tb\n", nil},
		{"a byte too many", []string{"a@10.0.0.1", "b@10.0.0.2"}, 21, "10.0.0.1\ta\n", []string{"b"}},
		{"no room", []string{"a@10.0.0.1,10.0.0.2"}, -1, "", []string{"a"}},
	} {
		nodes := recordNodesOf(c.nodes...)
		text, lines, out := renderRecords(nodes, c.room)
		if text != c.want || lines != strings.Count(c.want, "\n") || !slices.Equal(out, c.out) {
			t.Errorf("%s: %q, %d lines, without %q; want %q, without %q", c.name, text, lines, out, c.want, c.out)
		}
		slices.Reverse(nodes)
		if again, _, _ := renderRecords(nodes, c.room); again != text {
			t.Errorf("%s: %q in another order, %q", c.name, again, text)
		}
	}
}

// published is a Publisher that runs.
type published struct {
	*Publisher
	t      *testing.T
	client *fake.Clientset
	stop   func()
}

func publish(t *testing.T, client *fake.Clientset, self string) *published {
	t.Helper()
	p, err := NewPublisher(PublisherConfig{Client: client, Component: "tunnel-controller", Self: self, RecordsNamespace: ns, RecordsName: "names"})
	if err != nil {
		t.Fatal(err)
	}
	f := &published{Publisher: p, t: t, client: client}
	f.start()
	return f
}

func (f *published) start() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f.Run(ctx) }()
	var stopped atomic.Bool
	f.stop = func() {
		if cancel(); !stopped.Swap(true) {
			if err := <-done; err != nil {
				f.t.Error(err)
			}
		}
	}
	f.t.Cleanup(f.stop)
}

func (f *published) text() string {
	f.t.Helper()
	c, err := f.client.CoreV1().ConfigMaps(ns).Get(context.Background(), "names", metav1.GetOptions{})
	if err != nil {
		f.t.Fatal(err)
	}
	return c.Data[KeyRecords]
}

func (f *published) want(text string) {
	f.t.Helper()
	eventually(f.t, fmt.Sprintf("%q", text), func() bool { return f.text() == text })
}

func names(data map[string]string) *corev1.ConfigMap {
	return &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "names"}, Data: data}
}

func TestRecordsAreKept(t *testing.T) {
	f := publish(t, fake.NewClientset(names(nil), node("cloud-1", nil, "10.0.0.1"), node("edge-1", edge, "10.1.0.1", "2001:db8::1"), node("edge-2", private)), "cloud-1")
	f.want("10.0.0.1\tcloud-1\n10.1.0.1\tedge-1\n2001:db8::1\tedge-1\n")
	put := func(n *corev1.Node) {
		t.Helper()
		if _, err := f.client.CoreV1().Nodes().Update(t.Context(), n, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	began := time.Now()
	put(node("edge-2", private, "10.1.0.2"))
	f.want("10.0.0.1\tcloud-1\n10.1.0.1\tedge-1\n10.1.0.2\tedge-2\n2001:db8::1\tedge-1\n")
	if took := time.Since(began); took > 5*time.Second { // on a machine that does much else
		t.Errorf("a change took %v", took)
	}
	eventually(t, "counted", func() bool {
		s := f.Stats().Records
		return s.Records == 4 && s.Bytes == len(f.text()) && s.LeftOut == 0 && s.Error == "" && s.Writes == 2
	})

	// A heartbeat is no change; a node that goes is; what somebody else has written is put right, at the latest with the next change.
	beat := node("edge-2", private, "10.1.0.2")
	beat.Annotations["beat"] = "1"
	put(beat)
	if _, err := f.client.CoreV1().ConfigMaps(ns).Update(t.Context(), names(nil), metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := f.client.CoreV1().Nodes().Delete(t.Context(), "edge-1", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	f.want("10.0.0.1\tcloud-1\n10.1.0.2\tedge-2\n")
	eventually(t, "written once", func() bool { return f.Stats().Records.Writes == 3 })

	// Another leads for a while; what is right already is not written again.
	f.stop()
	put(node("edge-2", private, "10.1.0.9"))
	f.start()
	f.want("10.0.0.1\tcloud-1\n10.1.0.9\tedge-2\n")
	f.stop()
	f.start()
	eventually(t, "looked", func() bool { return f.Stats().Records.Error == "" })
	if w := f.Stats().Records.Writes; w != 4 {
		t.Errorf("%d writes", w)
	}
}

// Hundreds of changes are some writes.
func TestRecordsInAStorm(t *testing.T) {
	f := publish(t, fake.NewClientset(names(nil), node("cloud-1", nil, "10.0.0.1")), "cloud-1")
	f.want("10.0.0.1\tcloud-1\n")
	began := time.Now()
	for i := range 200 {
		if _, err := f.client.CoreV1().Nodes().Update(t.Context(), node("cloud-1", nil, fmt.Sprintf("10.0.0.%d", i+2)), metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	f.want("10.0.0.201\tcloud-1\n")
	if w, most := f.Stats().Records.Writes, uint64(2+recordsBurst+time.Since(began)/recordsEvery); w > most {
		t.Errorf("%d writes, want %d at most", w, most)
	}
}

// A list that is not whole takes no name away, and neither does an API server that is away.
func TestRecordsOfAListThatIsNotWhole(t *testing.T) {
	const before = "10.0.0.1\tcloud-1\n10.1.0.1\tedge-1\n"
	client := fake.NewClientset(names(nil), node("cloud-1", nil, "10.0.0.1"), node("edge-1", edge, "10.1.0.1"))
	var away atomic.Bool
	client.PrependReactor("list", "nodes", func(clienttesting.Action) (bool, runtime.Object, error) {
		return away.Load(), nil, errors.New("connection refused")
	})
	f := publish(t, client, "cloud-1")
	f.want(before)
	f.stop()
	for _, name := range []string{"cloud-1", "edge-1"} {
		if err := client.CoreV1().Nodes().Delete(t.Context(), name, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	away.Store(true)
	f.start()
	eventually(t, "the outage is said", func() bool { s := f.Stats(); return strings.Contains(s.Error, "refused") && s.Records.Error != "" })
	away.Store(false)
	eventually(t, "an empty list is not believed", func() bool {
		return strings.Contains(f.Stats().Records.Error, `lists 0 nodes, and not this one, "cloud-1"`)
	})
	if _, err := client.CoreV1().Nodes().Create(t.Context(), node("edge-2", edge, "10.1.0.2"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "half a list is not believed", func() bool { return strings.Contains(f.Stats().Records.Error, "lists 1 nodes") })
	if text := f.text(); text != before {
		t.Errorf("%q", text)
	}
	if _, err := client.CoreV1().Nodes().Create(t.Context(), node("cloud-1", nil, "10.0.0.1"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	f.want("10.0.0.1\tcloud-1\n10.1.0.2\tedge-2\n")
	eventually(t, "all is well", func() bool { return f.Stats().Records.Error == "" })
	if err := client.CoreV1().ConfigMaps(ns).Delete(t.Context(), "names", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := client.CoreV1().Nodes().Update(t.Context(), node("edge-2", edge, "10.1.0.3"), metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it says what to do", func() bool { return strings.Contains(f.Stats().Records.Error, "create configmap names") })
	if _, err := client.CoreV1().ConfigMaps(ns).Create(t.Context(), names(nil), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	f.want("10.0.0.1\tcloud-1\n10.1.0.3\tedge-2\n")
}
