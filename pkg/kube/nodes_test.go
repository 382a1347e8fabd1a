// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/edge-tunnel/edge-tunnel/pkg/route"
)

// labelsOf reads KEY=VALUE pairs.
func labelsOf(pairs ...string) map[string]string {
	labels := make(map[string]string)
	for _, p := range pairs {
		l, err := ParseLabel(p)
		if err != nil {
			panic(p)
		}
		labels[l.Key] = l.Value
	}
	return labels
}

func TestWhichNodesAreTunneled(t *testing.T) {
	for _, c := range []struct {
		labels         []string
		edge, tunneled bool
	}{
		{nil, false, false},
		{[]string{"alibabacloud.com/is-edge-worker=true"}, true, true},
		{[]string{"alibabacloud.com/is-edge-worker=false"}, false, false},
		{[]string{"openyurt.io/is-edge-worker=true"}, true, true},
		{[]string{"alibabacloud.com/edge-enable-reverseTunnel-client=true"}, true, true},
		{[]string{"alibabacloud.com/is-edge-worker=true", "alibabacloud.com/interconnection-mode=normal"}, true, true},
		{[]string{"alibabacloud.com/is-edge-worker=true", "alibabacloud.com/interconnection-mode=private"}, true, false},
		{[]string{"alibabacloud.com/is-edge-worker=true", "alibabacloud.com/interconnection-mode=improved"}, true, false},
		{[]string{"alibabacloud.com/is-edge-worker=true", "alibabacloud.com/interconnection-mode=yet-another"}, true, false},
		{[]string{"alibabacloud.com/is-edge-worker=true", "openyurt.io/interconnection-mode=private"}, true, false},
		{[]string{"alibabacloud.com/interconnection-mode=normal"}, false, false},
	} {
		if edge, tunneled := DefaultEdgeNodes().Mode(labelsOf(c.labels...)); edge != c.edge || tunneled != c.tunneled {
			t.Errorf("%v: edge %v, tunneled %v; want %v, %v", c.labels, edge, tunneled, c.edge, c.tunneled)
		}
	}
}

func TestParseLabel(t *testing.T) {
	for _, bad := range []string{"", "=", "a", "a=", "=b"} {
		if l, err := ParseLabel(bad); err == nil {
			t.Errorf("%q: %v", bad, l)
		}
	}
	if l, err := ParseLabel("a/b=c=d"); err != nil || l != (Label{"a/b", "c=d"}) {
		t.Errorf("%v, %v", l, err)
	}
}

func addrs(texts ...string) []netip.Addr {
	list := make([]netip.Addr, len(texts))
	for i, text := range texts {
		list[i] = netip.MustParseAddr(text)
	}
	return list
}

// endpoints is where the API servers are.
func endpoints(addrs ...string) *discoveryv1.EndpointSlice {
	s := &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "kubernetes", Labels: map[string]string{"kubernetes.io/service-name": "kubernetes"}}}
	for _, a := range addrs {
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{a}})
	}
	return s
}

func node(name string, labels map[string]string, addrs ...string) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels, Annotations: map[string]string{"a": "long story"}}}
	n.Status.Images = []corev1.ContainerImage{{Names: []string{"one"}}}
	n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeHostName, Address: name}}
	for _, a := range addrs {
		n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a})
	}
	return n
}

var (
	edge    = labelsOf("alibabacloud.com/is-edge-worker=true")
	private = labelsOf("alibabacloud.com/is-edge-worker=true", "alibabacloud.com/interconnection-mode=private")
)

// following is a Nodes that runs, and what it told.
type following struct {
	*Nodes
	t      *testing.T
	client *fake.Clientset
	states chan NodesState
	told   atomic.Int64
}

func follow(t *testing.T, client *fake.Clientset) *following {
	f := &following{t: t, client: client, states: make(chan NodesState, 1)}
	f.Nodes = NewNodes(NodesConfig{Client: client, Edge: DefaultEdgeNodes(), Self: "cloud-1", Changed: f.changed})
	f.run()
	return f
}

func (f *following) changed(_ context.Context, s NodesState) {
	f.told.Add(1)
	select { // the latest only
	case <-f.states:
	default:
	}
	f.states <- s
}

// run runs until the test ends.
func (f *following) run() {
	ctx, cancel := context.WithCancel(f.t.Context())
	done := make(chan error, 1)
	go func() { done <- f.Run(ctx) }()
	f.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			f.t.Error(err)
		}
	})
}

// want waits for a state with these claims, NAME or NAME@ADDR,ADDR each.
func (f *following) want(claims ...string) NodesState {
	f.t.Helper()
	var last []string
	for deadline := time.After(30 * time.Second); ; { // after an outage the API server is asked every five to seven seconds
		select {
		case s := <-f.states:
			last = nil
			for _, c := range s.Tunneled {
				last = append(last, strings.TrimSuffix(c.Node+"@"+strings.Trim(strings.ReplaceAll(fmt.Sprint(c.Addrs), " ", ","), "[]"), "@"))
			}
			if slices.Equal(last, claims) {
				return s
			}
		case <-deadline:
			f.t.Fatalf("%v, want %v; %+v", last, claims, f.Status())
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (f *following) put(n *corev1.Node) {
	f.t.Helper()
	_, err := f.client.CoreV1().Nodes().Update(f.t.Context(), n, metav1.UpdateOptions{})
	if apierrors.IsNotFound(err) {
		_, err = f.client.CoreV1().Nodes().Create(f.t.Context(), n, metav1.CreateOptions{})
	}
	must(f.t, err)
}

func TestNodesAreFollowed(t *testing.T) {
	f := follow(t, fake.NewClientset(node("cloud-1", nil, "10.0.0.1", "2001:db8::1"), node("edge-1", edge, "10.1.0.1", "2001:db8:1::1"),
		node("edge-2", private, "10.1.0.2"), node("edge-3", edge), endpoints("10.0.0.100", "2001:db8::100"),
		&networkingv1.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: "kubernetes"}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{"10.96.0.0/16"}}}))
	s := f.want("edge-1@10.1.0.1,2001:db8:1::1", "edge-3")
	want := route.Rules{
		Servers: addrs("10.0.0.1", "2001:db8::1"), Direct: addrs("10.1.0.2"),
		APIServers: addrs("10.0.0.100", "2001:db8::100"), Services: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16")},
	}
	if !reflect.DeepEqual(s.Rules, want) {
		t.Errorf("rules %+v, want %+v", s.Rules, want)
	}
	if st := f.Status(); !st.Complete || st.Nodes != 4 || st.Err != nil || !st.Since.IsZero() {
		t.Errorf("%+v", st)
	}

	f.put(node("edge-2", edge, "10.1.0.2")) // its mode changed
	f.want("edge-1@10.1.0.1,2001:db8:1::1", "edge-2@10.1.0.2", "edge-3")
	f.put(node("edge-1", private, "10.1.0.1", "2001:db8:1::1"))
	f.want("edge-2@10.1.0.2", "edge-3")
	f.put(node("edge-3", edge, "10.1.0.3", "no address", "10.1.0.33")) // it got addresses
	f.want("edge-2@10.1.0.2", "edge-3@10.1.0.3,10.1.0.33")
	must(t, f.client.CoreV1().Nodes().Delete(t.Context(), "edge-2", metav1.DeleteOptions{}))
	f.want("edge-3@10.1.0.3,10.1.0.33")

	for _, n := range f.nodes.all() {
		if len(n.Annotations)+len(n.Status.Images) > 0 || len(n.Status.Addresses) > 3 {
			t.Errorf("%s is kept with all it has: %+v", n.Name, n)
		}
	}
}

// What changes nothing for us, such as a heartbeat, is not told at all; what comes in a rush is told at once.
func TestStormOfUpdates(t *testing.T) {
	f := follow(t, fake.NewClientset(node("cloud-1", nil, "10.0.0.1"), node("edge-1", edge, "10.1.0.1")))
	f.want("edge-1@10.1.0.1")
	before, began := f.told.Load(), time.Now()
	const updates = 500
	for i := range updates {
		n := node("edge-1", edge, fmt.Sprintf("10.1.%d.%d", i/250, i%250))
		if i%2 == 0 {
			n = node("cloud-1", nil, "10.0.0.1")
			n.Annotations["beat"] = fmt.Sprint(i)
		}
		f.put(n)
	}
	last := updates - 1
	f.want(fmt.Sprintf("edge-1@10.1.%d.%d", last/250, last%250))
	if told, most := f.told.Load()-before, 2+int64(time.Since(began)/settleTime); told > most {
		t.Errorf("told %d times of %d updates, want %d at most", told, updates, most)
	}
	before = f.told.Load()
	n := node("cloud-1", nil, "10.0.0.1")
	n.Annotations["beat"] = "once more"
	f.put(n)
	f.put(node("edge-9", edge, "10.1.0.9")) // comes after it
	f.want(fmt.Sprintf("edge-1@10.1.%d.%d", last/250, last%250), "edge-9@10.1.0.9")
	if told := f.told.Load() - before; told != 1 {
		t.Errorf("told %d times, want once", told)
	}
}

// An API server that is away, that allows nothing, or that is being restored takes nothing away.
func TestListIsNotBelievedUntilItIsWhole(t *testing.T) {
	client := fake.NewClientset()
	var failure atomic.Pointer[error]
	fail := func(err error) { failure.Store(&err) }
	fail(apierrors.NewForbidden(schema.GroupResource{Resource: "nodes"}, "", errors.New(`User "u" cannot list resource "nodes"`)))
	client.PrependReactor("list", "nodes", func(clienttesting.Action) (bool, runtime.Object, error) {
		if err := *failure.Load(); err != nil {
			return true, nil, err
		}
		return false, nil, nil
	})
	f := follow(t, client)
	eventually(t, "the missing right is named", func() bool {
		s := f.Status()
		return s.Err != nil && strings.Contains(s.Err.Error(), "follow nodes: the ServiceAccount needs a role that allows it to list and watch") && strings.Contains(s.Err.Error(), `cannot list resource "nodes"`) && !s.Since.IsZero()
	})
	fail(errors.New("connection refused"))
	eventually(t, "the outage is named", func() bool { return strings.Contains(fmt.Sprint(f.Status().Err), "connection refused") })
	if f.told.Load() != 0 || f.Status().Complete {
		t.Error("a state was made up")
	}

	fail(nil) // an empty list
	eventually(t, "an empty list is not believed", func() bool {
		return strings.Contains(fmt.Sprint(f.Status().Err), `lists 0 nodes, and not this one, "cloud-1"`)
	})
	f.put(node("edge-1", edge, "10.1.0.1")) // half of it
	eventually(t, "half a list is not believed", func() bool { return strings.Contains(fmt.Sprint(f.Status().Err), "lists 1 nodes") })
	if f.told.Load() != 0 {
		t.Error("half a list was believed")
	}
	f.put(node("cloud-1", nil, "10.0.0.1"))
	f.want("edge-1@10.1.0.1")
	eventually(t, "all is well", func() bool { s := f.Status(); return s.Complete && s.Err == nil && s.Since.IsZero() })
}

// While the only API server restarts, none is listed. Its address stays what it is.
func TestAPIServersAreNotForgotten(t *testing.T) {
	f := follow(t, fake.NewClientset(node("cloud-1", nil, "10.0.0.1"), endpoints("10.0.0.100")))
	f.want()
	replace := func(slice *discoveryv1.EndpointSlice) {
		t.Helper()
		_, err := f.client.DiscoveryV1().EndpointSlices("default").Update(t.Context(), slice, metav1.UpdateOptions{})
		must(t, err)
	}
	replace(endpoints())
	if s := <-f.states; !slices.Equal(s.Rules.APIServers, addrs("10.0.0.100")) {
		t.Errorf("API servers %v", s.Rules.APIServers)
	}
	replace(endpoints("10.0.0.101"))
	if s := <-f.states; !slices.Equal(s.Rules.APIServers, addrs("10.0.0.101")) {
		t.Errorf("API servers %v", s.Rules.APIServers)
	}
}

// An API server before Kubernetes 1.33 does not know ranges of Services; then the flag says them. One that does not answer is waited for.
func TestServiceRanges(t *testing.T) {
	client := fake.NewClientset(node("cloud-1", nil, "10.0.0.1"))
	var failure atomic.Pointer[error]
	fail := func(err error) { failure.Store(&err) }
	fail(errors.New("connection refused"))
	client.PrependReactor("list", "servicecidrs", func(clienttesting.Action) (bool, runtime.Object, error) { return true, nil, *failure.Load() })
	f := &following{t: t, client: client, states: make(chan NodesState, 1)}
	given := []netip.Prefix{netip.MustParsePrefix("10.97.0.0/16")}
	f.Nodes = NewNodes(NodesConfig{Client: client, Edge: DefaultEdgeNodes(), Self: "cloud-1", Services: given, Changed: f.changed})
	f.run()
	eventually(t, "the outage is named", func() bool {
		s := f.Status()
		return strings.Contains(fmt.Sprint(s.Err), "servicecidrs: connection refused") && !s.Since.IsZero() && !s.Complete
	})
	if f.told.Load() != 0 {
		t.Error("told before all was known")
	}
	fail(apierrors.NewNotFound(schema.GroupResource{Group: "networking.k8s.io", Resource: "servicecidrs"}, ""))
	if s := f.want(); !slices.Equal(s.Rules.Services, given) {
		t.Errorf("services %v", s.Rules.Services)
	}
	if s := f.Status(); !s.Complete || s.Err != nil {
		t.Errorf("%+v", s)
	}
}
