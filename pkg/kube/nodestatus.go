// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// ConditionReady is the condition of tunneled Nodes.
const ConditionReady corev1.NodeConditionType = "EdgeTunnelReady"

// Reasons of the condition.
const (
	reasonConnected    = "Connected"
	reasonNotConnected = "NotConnected"
	reasonSilent       = "ServerSilent"
	reasonAmbiguous    = "AddressAmbiguous"
	reasonRefused      = "AddressRefused"
	reasonLogin        = "LoginRefused"
	reasonNoAddress    = "NoAddress"
)

const (
	statusEvery = 2 * time.Second // all nodes are judged

	// A change has to stand for so long before it is said: agents that move from one server to another, or come back after a restart, are no news.
	settleReady    = 3 * time.Second
	settleNotReady = 20 * time.Second

	// Conditions are written at this rate. What has changed back meanwhile is not written at all.
	statusRate  = 20 // a second
	statusBurst = 50

	// More nodes of which the same has to be said at once get one Event together.
	maxEventsTogether = 20
)

// Refusal is what a server says of a node whose agent's login, or one of whose addresses, it refuses.
type Refusal struct {
	Node   string     `json:"node"`
	Addr   netip.Addr `json:"addr,omitzero"` // none: a login
	Reason string     `json:"reason"`        // snake_case
}

// verdict is what the condition should say.
type verdict struct {
	status          corev1.ConditionStatus
	reason, message string
}

// facts are what is known of a tunneled node.
type facts struct {
	addrs    []netip.Addr
	owners   []liveness // of the servers that have its tunnel
	servers  liveness   // of the best of all servers
	refusals []Refusal
}

// judge returns false where nothing can be said yet.
func (f facts) judge() (verdict, bool) {
	no := func(reason, message string) (verdict, bool) {
		return verdict{corev1.ConditionFalse, reason, message}, true
	}
	var login string
	refused := make(map[netip.Addr]string)
	for _, r := range f.refusals {
		switch {
		case !r.Addr.IsValid():
			login = r.Reason
		case refused[r.Addr] != "ambiguous":
			refused[r.Addr] = r.Reason
		}
	}
	var bad []string
	reason := reasonRefused
	for _, addr := range f.addrs {
		if why := refused[addr.Unmap()]; why != "" {
			bad = append(bad, fmt.Sprintf("%v is refused: %s", addr, why))
			if why == "ambiguous" {
				reason = reasonAmbiguous
			}
		}
	}
	slices.Sort(bad)
	has := func(l liveness) bool { return slices.Contains(f.owners, l) }
	switch {
	case f.servers == unheard && !has(alive), has(unheard) && !has(alive):
		return verdict{}, false
	case len(f.addrs) == 0:
		return no(reasonNoAddress, "the Node has no InternalIP")
	case len(bad) == len(f.addrs):
		return no(reason, strings.Join(bad, ", "))
	case has(alive):
		return verdict{corev1.ConditionTrue, reasonConnected, strings.Join(append([]string{"a tunnel-server has its tunnel"}, bad...), ", ")}, true
	case has(silent), f.servers == silent:
		return verdict{corev1.ConditionUnknown, reasonSilent, "the tunnel-server that had its tunnel is not heard of"}, true
	case login != "":
		return no(reasonLogin, "its agent's login is refused: "+login)
	}
	return no(reasonNotConnected, "no tunnel-server has its tunnel")
}

// StatusStats is a snapshot.
type StatusStats struct {
	Nodes    map[string]int // tunneled ones, by the reason of their condition
	Waiting  int            // conditions to be written
	Writes   uint64
	Failures uint64
	Error    string // why the latest write failed; empty if it did not
}

// nodeStatus keeps the condition of tunneled Nodes, and writes Events about them.
type nodeStatus struct {
	client  kubernetes.Interface
	edge    EdgeNodes
	self    string // see PublisherConfig
	about   corev1.ObjectReference
	events  *events
	log     *slog.Logger
	limit   *rate.Limiter
	now     func() time.Time
	settled map[string]verdict // what was said of a node last
	pending map[string]pending // what may be said next
	refused map[Refusal]struct{}

	mu    sync.Mutex
	stats StatusStats
}

type pending struct {
	verdict
	since time.Time
}

func newNodeStatus(c PublisherConfig, e *events) *nodeStatus {
	return &nodeStatus{
		client: c.Client, edge: c.Edge, self: c.Self, events: e, log: c.Log, now: time.Now, limit: rate.NewLimiter(statusRate, statusBurst),
		about:   corev1.ObjectReference{APIVersion: "v1", Kind: "Namespace", Name: c.Leases},
		settled: map[string]verdict{}, pending: map[string]pending{}, refused: map[Refusal]struct{}{},
	}
}

func (n *nodeStatus) snapshot() StatusStats {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.stats
}

// run judges and writes until ctx ends.
func (n *nodeStatus) run(ctx context.Context, nodes *follower[*corev1.Node], servers *servers) {
	clear(n.settled) // what the conditions say counts: another may have written them
	clear(n.pending)
	clear(n.refused)
	for sleep(ctx, statusEvery) {
		_, complete := nodes.get("")
		known, whole := servers.look()
		list := nodes.all()
		if !complete || !whole || nodes.state().Err != nil || !slices.ContainsFunc(list, func(node *corev1.Node) bool { return n.self == "" || node.Name == n.self }) {
			continue // nothing is known now
		}
		n.write(ctx, n.judge(list, known, servers.leases.all()))
	}
}

// judge says what is news, and returns the Nodes whose condition is not what it should be.
func (n *nodeStatus) judge(nodes []*corev1.Node, servers map[string]liveness, leases []*coordinationv1.Lease) []*corev1.Node {
	best := silent
	for _, l := range servers {
		best = max(best, l)
	}
	owners := make(map[string][]liveness)
	refusals := make(map[string][]Refusal)
	for _, l := range leases {
		live := servers[holder(l)]
		if l.Labels[LabelRegistry] == registryNodes {
			for name := range strings.SplitSeq(l.Annotations[annotationTunnel], ",") {
				owners[name] = append(owners[name], live)
			}
		}
		var list []Refusal
		if l.Labels[LabelRegistry] != registryRefused || live == silent || json.Unmarshal([]byte(l.Annotations[annotationRefused]), &list) != nil {
			continue
		}
		for _, r := range list {
			refusals[r.Node] = append(refusals[r.Node], r)
		}
	}
	told := make(map[news][]string) // names of nodes
	var wrong []*corev1.Node
	refused := make(map[Refusal]struct{})
	counts := make(map[string]int)
	byName := make(map[string]*corev1.Node, len(nodes))
	for _, node := range nodes {
		byName[node.Name] = node
		for _, r := range refusals[node.Name] {
			if _, old := n.refused[r]; !old {
				if _, twice := refused[r]; !twice {
					about := newsOf(r)
					told[about] = append(told[about], node.Name)
				}
			}
			refused[r] = struct{}{}
		}
		is := conditionOf(node)
		if _, tunneled := n.edge.Mode(node.Labels); !tunneled {
			delete(n.settled, node.Name)
			delete(n.pending, node.Name)
			if is != nil {
				wrong = append(wrong, node)
			}
			continue
		}
		if about, changed := n.settle(node.Name, is, facts{nodeAddrs(node), owners[node.Name], best, refusals[node.Name]}); changed && about.reason != "" {
			told[about] = append(told[about], node.Name)
		}
		if said, ok := n.settled[node.Name]; ok {
			counts[said.reason]++
			if is == nil || verdictOf(is) != said {
				wrong = append(wrong, node)
			}
		}
	}
	for name := range n.settled {
		if _, still := byName[name]; !still {
			delete(n.settled, name)
			delete(n.pending, name)
		}
	}
	n.refused = refused
	n.say(told, byName)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.stats.Nodes, n.stats.Waiting = counts, len(wrong)
	return wrong
}

// settle makes of what is known of a node what is said of it, once that stands for long enough.
func (n *nodeStatus) settle(node string, is *corev1.NodeCondition, f facts) (news, bool) {
	said, ever := n.settled[node]
	if !ever && is != nil {
		said, ever = verdictOf(is), true
		n.settled[node] = said
	}
	next, known := f.judge()
	if !known || ever && next == said {
		delete(n.pending, node)
		return news{}, false
	}
	if p, waits := n.pending[node]; !waits || p.verdict != next {
		n.pending[node] = pending{next, n.now()}
		return news{}, false
	}
	after := settleNotReady
	if next.status == corev1.ConditionTrue {
		after = settleReady
	}
	if n.now().Sub(n.pending[node].since) < after {
		return news{}, false
	}
	delete(n.pending, node)
	n.settled[node] = next
	switch {
	case next.reason == reasonConnected && said.reason != reasonConnected:
		return news{corev1.EventTypeNormal, "TunnelConnected", next.message}, true
	case next.reason == reasonNotConnected && ever, next.reason == reasonSilent && ever:
		return news{corev1.EventTypeWarning, "TunnelLost", next.message}, true
	}
	return news{}, true
}

// news is an Event without its node.
type news struct{ kind, reason, message string }

func newsOf(r Refusal) news {
	switch {
	case !r.Addr.IsValid():
		return news{corev1.EventTypeWarning, "TunnelLoginRefused", "a tunnel-server refuses the login of its agent: " + r.Reason}
	case r.Reason == "ambiguous":
		return news{corev1.EventTypeWarning, "TunnelAddressAmbiguous", "another Node has its address too, nobody is connected to it: " + r.Addr.String()}
	}
	return news{corev1.EventTypeWarning, "TunnelAddressRefused", fmt.Sprintf("its address %v is not tunneled to: %s", r.Addr, r.Reason)}
}

// say writes Events: one for each node, or one for many.
func (n *nodeStatus) say(all map[news][]string, nodes map[string]*corev1.Node) {
	many := make(map[news][]string)
	for what, names := range all {
		many[news{kind: what.kind, reason: what.reason}] = append(many[news{kind: what.kind, reason: what.reason}], names...)
	}
	for what, names := range many {
		if len(names) > maxEventsTogether {
			slices.Sort(names)
			n.events.emit(n.about, what.kind, what.reason, fmt.Sprintf("%d nodes, %s first: see their condition %s", len(names), names[0], ConditionReady))
		}
	}
	for what, names := range all {
		if len(many[news{kind: what.kind, reason: what.reason}]) > maxEventsTogether {
			continue
		}
		for _, name := range names {
			n.events.emit(corev1.ObjectReference{APIVersion: "v1", Kind: "Node", Name: name, UID: nodes[name].UID}, what.kind, what.reason, what.message)
		}
	}
}

func conditionOf(node *corev1.Node) *corev1.NodeCondition {
	for i := range node.Status.Conditions {
		if node.Status.Conditions[i].Type == ConditionReady {
			return &node.Status.Conditions[i]
		}
	}
	return nil
}

func verdictOf(c *corev1.NodeCondition) verdict { return verdict{c.Status, c.Reason, c.Message} }

// write puts conditions right, for as long as it is before they are judged again.
func (n *nodeStatus) write(ctx context.Context, wrong []*corev1.Node) {
	until := n.now().Add(statusEvery)
	// The most important first: nodes that lose their tunnel.
	slices.SortFunc(wrong, func(a, b *corev1.Node) int {
		return cmp.Or(strings.Compare(string(n.settled[a.Name].status), string(n.settled[b.Name].status)), strings.Compare(a.Name, b.Name))
	})
	for _, node := range wrong {
		if n.now().After(until) || n.limit.Wait(ctx) != nil {
			return
		}
		err := n.patch(ctx, node)
		if apierrors.IsNotFound(err) || apierrors.IsConflict(err) { // it is gone, or another
			continue
		}
		n.mu.Lock()
		n.stats.Writes++
		n.stats.Waiting--
		was := n.stats.Error
		if n.stats.Error = ""; err != nil {
			n.stats.Failures++
			n.stats.Error = fmt.Sprintf("write the condition of a Node: %v", err)
		}
		is := n.stats.Error
		n.mu.Unlock()
		if err != nil {
			if was == "" {
				n.log.Warn("conditions of Nodes are out of date", "err", is)
			}
			return
		}
	}
}

func (n *nodeStatus) patch(ctx context.Context, node *corev1.Node) error {
	condition := map[string]any{"type": ConditionReady, "$patch": "delete"}
	if said, ok := n.settled[node.Name]; ok {
		now := metav1.Now()
		since := now
		if is := conditionOf(node); is != nil && is.Status == said.status {
			since = is.LastTransitionTime
		}
		condition = map[string]any{
			"type": ConditionReady, "status": said.status, "reason": said.reason, "message": said.message,
			"lastHeartbeatTime": now, "lastTransitionTime": since,
		}
	}
	text, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"uid": node.UID}, // not of another that has its name by now
		"status":   map[string]any{"conditions": []any{condition}},
	})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, requestLimit)
	defer cancel()
	_, err = n.client.CoreV1().Nodes().PatchStatus(ctx, node.Name, text)
	return err
}
