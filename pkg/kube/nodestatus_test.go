// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/edge-tunnel/edge-tunnel/test/kubebed"
)

func TestJudgeNode(t *testing.T) {
	one, two := netip.MustParseAddr("10.1.0.1"), netip.MustParseAddr("2001:db8::1")
	both := []netip.Addr{one, two}
	for _, c := range []struct {
		name   string
		facts  facts
		want   string // status and reason; empty: nothing yet
		within string // its message
	}{
		{"a tunnel", facts{addrs: both, owners: []liveness{silent, alive}, servers: alive}, "True Connected", "has its tunnel"},
		{"none", facts{addrs: both, servers: alive}, "False NotConnected", "no tunnel-server"},
		{"its server is silent", facts{addrs: both, owners: []liveness{silent}, servers: alive}, "Unknown ServerSilent", ""},
		{"no server at all", facts{addrs: both}, "Unknown ServerSilent", ""},
		{"servers not heard yet", facts{addrs: both, servers: unheard}, "", ""},
		{"its server not heard yet", facts{addrs: both, owners: []liveness{unheard, silent}, servers: alive}, "", ""},
		{"one heard, one not", facts{addrs: both, owners: []liveness{unheard, alive}, servers: alive}, "True Connected", ""},
		{"no address", facts{owners: []liveness{alive}, servers: alive}, "False NoAddress", "no InternalIP"},
		{"login refused", facts{addrs: both, servers: alive, refusals: []Refusal{{Reason: "denied"}}}, "False LoginRefused", "denied"},
		{"login refused here, taken there", facts{addrs: both, owners: []liveness{alive}, servers: alive, refusals: []Refusal{{Reason: "denied"}}}, "True Connected", ""},
		{"an address refused", facts{addrs: both, owners: []liveness{alive}, servers: alive, refusals: []Refusal{{Addr: two, Reason: "outside_target_cidr"}}},
			"True Connected", "2001:db8::1 is refused: outside_target_cidr"},
		{"all addresses refused", facts{addrs: both, owners: []liveness{alive}, servers: alive, refusals: []Refusal{{Addr: two, Reason: "loopback"}, {Addr: one, Reason: "loopback"}}},
			"False AddressRefused", "10.1.0.1 is refused: loopback, 2001:db8::1"},
		{"ambiguous", facts{addrs: both[:1], owners: []liveness{alive}, servers: alive, refusals: []Refusal{{Addr: one, Reason: "ambiguous"}, {Addr: one, Reason: "server_address"}}},
			"False AddressAmbiguous", "10.1.0.1 is refused: ambiguous"},
	} {
		v, ok := c.facts.judge()
		if got := strings.TrimSpace(string(v.status) + " " + v.reason); got != c.want || ok != (c.want != "") || !strings.Contains(v.message, c.within) {
			t.Errorf("%s: %q, %q, %v; want %q", c.name, got, v.message, ok, c.want)
		}
	}
}

// judged is a nodeStatus with a clock of its own; its Events are in the queue.
type judged struct {
	*nodeStatus
	t      *testing.T
	clock  time.Time
	nodes  []*corev1.Node
	leases []*coordinationv1.Lease
	live   map[string]liveness
}

func judgeNodes(t *testing.T, nodes ...*corev1.Node) *judged {
	client := fake.NewClientset()
	log := slog.New(slog.DiscardHandler)
	c := PublisherConfig{Client: client, Edge: DefaultEdgeNodes(), Leases: ns, Log: log}
	j := &judged{nodeStatus: newNodeStatus(c, newEvents(client, "test", log)), t: t, clock: time.Now(), nodes: nodes, live: map[string]liveness{"cloud-1": alive}}
	j.now = func() time.Time { return j.clock }
	for _, n := range nodes {
		if _, err := client.CoreV1().Nodes().Create(t.Context(), n, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	return j
}

// pass lets time go by, then judges and writes; it returns the Events as REASON NAME.
func (j *judged) pass(d time.Duration) string {
	j.t.Helper()
	for end := j.clock.Add(d); j.clock.Before(end); j.clock = j.clock.Add(statusEvery) {
		j.write(j.t.Context(), j.judge(j.nodes, j.live, j.leases))
		for i := range j.nodes {
			n, err := j.client.CoreV1().Nodes().Get(context.Background(), j.nodes[i].Name, metav1.GetOptions{})
			must(j.t, err)
			j.nodes[i] = n
		}
	}
	var said []string
	for len(j.events.queue) > 0 {
		e := <-j.events.queue
		said = append(said, e.Reason+" "+e.InvolvedObject.Name)
	}
	return strings.Join(said, ", ")
}

func (j *judged) is(node string) string {
	j.t.Helper()
	n, err := j.client.CoreV1().Nodes().Get(context.Background(), node, metav1.GetOptions{})
	must(j.t, err)
	if c := conditionOf(n); c != nil {
		return string(c.Status) + " " + c.Reason
	}
	return ""
}

func refusedLease(server string, list ...Refusal) *coordinationv1.Lease {
	l := shard(server, "")
	l.Name, l.Labels, l.Annotations = "z-"+server, map[string]string{LabelRegistry: registryRefused}, map[string]string{annotationRefused: refusedText(list)}
	return l
}

// What is said of a node is said once, after it has stood for some time.
func TestNodeStatus(t *testing.T) {
	j := judgeNodes(t, node("cloud-1", nil, "10.0.0.1"), node("edge-1", edge, "10.1.0.1"), node("edge-2", private, "10.1.0.2"))
	step := func(what string, d time.Duration, said, is string) {
		t.Helper()
		if got := j.pass(d); got != said {
			t.Errorf("%s: said %q, want %q", what, got, said)
		}
		if got := j.is("edge-1"); got != is {
			t.Errorf("%s: %q, want %q", what, got, is)
		}
	}
	step("new", 10*time.Second, "", "")
	step("never connected", 20*time.Second, "", "False NotConnected")
	j.leases = []*coordinationv1.Lease{shard("cloud-1", "edge-1,edge-9")}
	step("connected", 10*time.Second, "TunnelConnected edge-1", "True Connected")
	j.leases = nil
	step("away for a moment", 10*time.Second, "", "True Connected")
	j.leases = []*coordinationv1.Lease{shard("cloud-2", "edge-1")}
	j.live["cloud-2"] = alive
	step("moved", time.Minute, "", "True Connected")
	j.live["cloud-2"] = silent
	step("its server is silent", time.Minute, "TunnelLost edge-1", "Unknown ServerSilent")
	j.leases = nil
	step("gone for good", time.Minute, "TunnelLost edge-1", "False NotConnected")
	address := Refusal{Node: "edge-1", Addr: netip.MustParseAddr("10.1.0.1"), Reason: "ambiguous"}
	j.live["cloud-2"] = alive
	j.leases = []*coordinationv1.Lease{shard("cloud-1", "edge-1"), refusedLease("cloud-1", address), refusedLease("cloud-2", address, Refusal{Node: "edge-2", Reason: "not_tunneled"})}
	step("ambiguous", time.Minute, "TunnelAddressAmbiguous edge-1, TunnelLoginRefused edge-2", "False AddressAmbiguous")
	step("still", time.Minute, "", "False AddressAmbiguous")
	j.leases = j.leases[:1]
	step("withdrawn", time.Minute, "TunnelConnected edge-1", "True Connected")
	if got := j.is("edge-2") + j.is("cloud-1"); got != "" {
		t.Errorf("said of nodes without a tunnel: %q", got)
	}

	// Another takes the lead: what stands is not said again.
	clear(j.settled)
	clear(j.pending)
	j.client.(*fake.Clientset).ClearActions()
	step("another leads", time.Minute, "", "True Connected")
	for _, a := range j.client.(*fake.Clientset).Actions() {
		if a.GetVerb() == "patch" {
			t.Errorf("%v", a)
		}
	}
	j.nodes[1].Labels = private
	_, err := j.client.CoreV1().Nodes().Update(t.Context(), j.nodes[1], metav1.UpdateOptions{})
	must(t, err)
	step("reached directly", 10*time.Second, "", "")

	if bad := refusedLease("cloud-1"); bad.Annotations[annotationRefused] != "[]" {
		t.Errorf("%q", bad.Annotations)
	}
	garbage := refusedLease("cloud-1")
	garbage.Annotations[annotationRefused] = `[{"node":"edge-1","addr":"x","reason":1}`
	j.leases = append(j.leases, garbage)
	step("garbage", 10*time.Second, "", "")
}

// When many nodes change at once there is one Event for each way, and conditions are written at their rate; what has changed back is not written.
func TestNodeStatusInAStorm(t *testing.T) {
	const number = 200
	nodes := []*corev1.Node{node("cloud-1", nil, "10.0.0.1")}
	var names []string
	for i := range number {
		names = append(names, fmt.Sprintf("edge-%04d", i))
		n := node(names[i], edge, fmt.Sprintf("10.1.%d.%d", i/250, i%250))
		n.Status.Conditions = []corev1.NodeCondition{{Type: ConditionReady, Status: corev1.ConditionTrue, Reason: reasonConnected, Message: "a tunnel-server has its tunnel"}}
		nodes = append(nodes, n)
	}
	j := judgeNodes(t, nodes...)
	all := []*coordinationv1.Lease{shard("cloud-1", strings.Join(names, ","))}
	j.leases = all
	if said := j.pass(10 * time.Second); said != "" || j.snapshot().Writes != 0 {
		t.Errorf("said %q, %d writes", said, j.snapshot().Writes)
	}
	j.leases = nil
	began := time.Now()
	for range (settleNotReady + 6*time.Second) / statusEvery {
		wrong := j.judge(j.nodes, j.live, j.leases)
		j.write(t.Context(), wrong) // by our clock, which stands still: for as long as the limit lets it
		j.clock = j.clock.Add(statusEvery)
		if len(wrong) > 0 {
			break
		}
	}
	said := <-j.events.queue
	if said.Reason != "TunnelLost" || said.InvolvedObject.Kind != "Namespace" || !strings.HasPrefix(said.Message, "200 nodes, edge-0000 first") || len(j.events.queue) != 0 {
		t.Errorf("%+v, and %d more", said, len(j.events.queue))
	}
	if w, most := j.snapshot().Writes, uint64(statusBurst+statusRate*(time.Since(began).Seconds()+1)); w < statusBurst || w > most {
		t.Errorf("%d writes, want %d to %d", w, statusBurst, most)
	}
}

func TestRefusedText(t *testing.T) {
	var list []Refusal
	for i := range 5000 {
		list = append(list, Refusal{Node: fmt.Sprintf("edge-%d", i), Addr: netip.MustParseAddr("10.1.0.1"), Reason: "ambiguous"})
	}
	text := refusedText(list)
	var back []Refusal
	if err := json.Unmarshal([]byte(text), &back); err != nil || len(text) > maxRefusedText+1 || len(back) < 500 || back[100] != list[100] {
		t.Errorf("%d bytes, %d refusals, %v", len(text), len(back), err)
	}
}

// On a real API server, with the rights in deploy/, beside the conditions of a kubelet; over an outage.
func TestNodeStatusInKubernetes(t *testing.T) {
	api := kubebed.APIServer(t)
	api.Install()
	account, err := NewClient(ClientOptions{Kubeconfig: api.ServiceAccount("kube-system", "tunnel-controller")})
	must(t, err)
	admin, err := NewClient(ClientOptions{Kubeconfig: api.Admin(), QPS: 1000})
	must(t, err)
	for _, n := range []*corev1.Node{node("cloud-1", nil, "10.0.0.1"), node("edge-1", edge, "10.1.0.1")} {
		n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "KubeletReady"}}
		status := n.Status
		n, err := admin.CoreV1().Nodes().Create(t.Context(), n, metav1.CreateOptions{})
		must(t, err)
		n.Status = status
		_, err = admin.CoreV1().Nodes().UpdateStatus(t.Context(), n, metav1.UpdateOptions{})
		must(t, err)
	}
	refused := make(chan []Refusal, 1)
	refused <- nil
	server, err := NewRegistry(RegistryConfig{
		Client: admin, Namespace: "edge-tunnel-leases", Server: "cloud-1", Addr: func() string { return "192.0.2.1:10262" }, Peers: func([]string) {},
		Refused: func() []Refusal {
			now := <-refused
			refused <- now
			return now
		},
	})
	must(t, err)
	server.every = 200 * time.Millisecond
	p, err := NewPublisher(PublisherConfig{
		Client: account, Component: "tunnel-controller", Self: "cloud-1", Leases: "edge-tunnel-leases", Status: true, Edge: DefaultEdgeNodes(),
	})
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	for _, run := range []func(context.Context) error{server.Run, p.Run} {
		wg.Go(func() {
			if err := run(ctx); err != nil {
				t.Error(err)
			}
		})
	}
	want := func(status corev1.ConditionStatus, reason string) {
		t.Helper()
		eventually(t, reason, func() bool {
			n, err := admin.CoreV1().Nodes().Get(t.Context(), "edge-1", metav1.GetOptions{})
			must(t, err)
			c := conditionOf(n)
			return c != nil && c.Status == status && c.Reason == reason && len(n.Status.Conditions) == 2 && !c.LastTransitionTime.IsZero()
		})
	}
	said := func(reason string) {
		t.Helper()
		eventually(t, reason, func() bool {
			list, err := admin.CoreV1().Events("default").List(t.Context(), metav1.ListOptions{FieldSelector: "involvedObject.name=edge-1,reason=" + reason})
			must(t, err)
			return len(list.Items) == 1
		})
	}
	server.Own("edge-1", true)
	want(corev1.ConditionTrue, reasonConnected)
	said("TunnelConnected")
	<-refused
	refused <- []Refusal{{Node: "edge-1", Addr: netip.MustParseAddr("10.1.0.1"), Reason: "ambiguous"}}
	want(corev1.ConditionFalse, reasonAmbiguous)
	said("TunnelAddressAmbiguous")
	<-refused
	refused <- nil
	api.Kill()
	time.Sleep(3 * time.Second)
	api.Start()
	want(corev1.ConditionTrue, reasonConnected)
	server.Own("edge-1", false)
	want(corev1.ConditionFalse, reasonNotConnected)
	said("TunnelLost")
	n, err := admin.CoreV1().Nodes().Get(t.Context(), "edge-1", metav1.GetOptions{})
	must(t, err)
	n.Labels = private
	_, err = admin.CoreV1().Nodes().Update(t.Context(), n, metav1.UpdateOptions{})
	if !apierrors.IsConflict(err) {
		must(t, err)
	}
	eventually(t, "nothing is said of a node without a tunnel", func() bool {
		n, err := admin.CoreV1().Nodes().Get(t.Context(), "edge-1", metav1.GetOptions{})
		must(t, err)
		return conditionOf(n) == nil && len(n.Status.Conditions) == 1
	})
	if s := p.Stats(); s.Status.Error != "" || s.Status.Writes < 5 || s.Status.Writes > 12 || s.Events.Err != nil {
		t.Errorf("%+v, %+v", s.Status, s.Events)
	}
}
