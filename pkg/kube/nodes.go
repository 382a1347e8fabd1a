// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes"

	"github.com/edge-tunnel/edge-tunnel/pkg/route"
)

// settleTime is how long a change waits for others: thousands of updates a second are a snapshot or two.
const settleTime = 100 * time.Millisecond

// EdgeNodes says which nodes are edge nodes, and which of these are tunneled.
type EdgeNodes struct {
	Labels []Label  // a node with one of them is an edge node
	Modes  []string // keys; an edge node with another value than "normal" of one of them is reached without a tunnel
}

// Label is a key with the one value that counts.
type Label struct{ Key, Value string }

func (l Label) String() string { return l.Key + "=" + l.Value }

// DefaultEdgeNodes are the labels of Alibaba's edge clusters and of OpenYurt.
func DefaultEdgeNodes() EdgeNodes {
	var e EdgeNodes
	for _, vendor := range []string{"alibabacloud.com", "openyurt.io"} {
		e.Labels = append(e.Labels, Label{vendor + "/is-edge-worker", "true"}, Label{vendor + "/edge-enable-reverseTunnel-client", "true"})
		e.Modes = append(e.Modes, vendor+"/interconnection-mode")
	}
	return e
}

// modeNormal is the mode of nodes that need a tunnel. The others, "private" and "improved", have a network of their own to the cloud; so may
// have whatever is invented next.
const modeNormal = "normal"

// Mode says what a node with these labels is.
func (e EdgeNodes) Mode(labels map[string]string) (edge, tunneled bool) {
	edge = slices.ContainsFunc(e.Labels, func(l Label) bool { return labels[l.Key] == l.Value })
	direct := slices.ContainsFunc(e.Modes, func(key string) bool {
		mode, set := labels[key]
		return set && mode != "" && mode != modeNormal
	})
	return edge, edge && !direct
}

// keep returns those labels that decide, nil if there are none.
func (e EdgeNodes) keep(labels map[string]string) map[string]string {
	var kept map[string]string
	keep := func(key string) {
		if value, ok := labels[key]; ok {
			if kept == nil {
				kept = make(map[string]string)
			}
			kept[key] = value
		}
	}
	for _, l := range e.Labels {
		keep(l.Key)
	}
	for _, key := range e.Modes {
		keep(key)
	}
	return kept
}

// ParseLabel reads KEY=VALUE.
func ParseLabel(text string) (Label, error) {
	key, value, ok := strings.Cut(text, "=")
	if !ok || key == "" || value == "" {
		return Label{}, errors.New("is not KEY=VALUE")
	}
	return Label{key, value}, nil
}

// NodesConfig is what [NewNodes] needs.
type NodesConfig struct {
	Client kubernetes.Interface
	Edge   EdgeNodes

	// Self is the Node that we run on. A list without it is not the whole list of a cluster, but that of one that is being restored, say. Empty: any
	// Node will do.
	Self string

	Services []netip.Prefix // ranges of Services, beside those that the API server tells of

	// Changed is told every state, one at a time. Its context ends with Run's.
	Changed func(context.Context, NodesState)
	Log     *slog.Logger
}

// NodesState is what a cluster says, whole.
type NodesState struct {
	Tunneled []route.Claim // one for each node, sorted by its name, also for those without addresses

	// Rules say what cannot be a target: addresses of nodes that are no edge nodes, because servers run there, and of edge nodes that are reached
	// directly; API servers; Services.
	Rules route.Rules
}

// NodesStatus says how fresh the state is.
type NodesStatus struct {
	Complete bool      // all was seen since the start
	Nodes    int       // in the latest whole list, of every kind
	Err      error     // why there is nothing newer; nil while the watch works
	Since    time.Time // of Err
}

// Nodes follows the Node objects of a cluster, and where its API servers and Services are. What it last knew counts for as long as the API server cannot be reached, and nothing is
// concluded from a list that is not whole.
type Nodes struct {
	c      NodesConfig
	nodes  *follower[*corev1.Node]
	apis   *follower[*discoveryv1.EndpointSlice]
	ranges *serviceRanges
	change chan struct{}

	mu     sync.Mutex   // guards what follows
	status NodesStatus  // its Err is that of a list that is not whole
	found  []netip.Addr // of API servers
}

// NewNodes makes one that does nothing until Run.
func NewNodes(c NodesConfig) *Nodes {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	n := &Nodes{c: c, change: make(chan struct{}, 1)}
	api := c.Client.CoreV1().Nodes()
	n.nodes = &follower[*corev1.Node]{
		what: "nodes", client: c.Client, log: c.Log, lighten: n.lighten, changed: n.changed,
		list:  func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) { return api.List(ctx, o) },
		watch: api.Watch,
	}
	n.apis = apiServers(c, n.wake)
	n.ranges = &serviceRanges{client: c.Client, changed: n.wake}
	return n
}

func (n *Nodes) wake() {
	select {
	case n.change <- struct{}{}:
	default:
	}
}

func (n *Nodes) changed(changes []change[*corev1.Node]) {
	if len(changes) == 0 || slices.ContainsFunc(changes, func(c change[*corev1.Node]) bool {
		return c.was == nil || c.is == nil || !slices.Equal(c.was.Status.Addresses, c.is.Status.Addresses) || !maps.Equal(c.was.Labels, c.is.Labels)
	}) {
		n.wake()
	}
}

// lighten keeps of a Node what decides about it: some hundred bytes instead of some ten thousand, of which its images are most.
func (n *Nodes) lighten(node *corev1.Node) *corev1.Node {
	light := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: node.Name, UID: node.UID, ResourceVersion: node.ResourceVersion}}
	light.Labels = n.c.Edge.keep(node.Labels)
	for _, a := range node.Status.Addresses {
		if a.Type == corev1.NodeInternalIP {
			light.Status.Addresses = append(light.Status.Addresses, a)
		}
	}
	return light
}

// Run follows the Nodes until ctx ends, whatever happens to the API server.
func (n *Nodes) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { n.nodes.run(ctx) })
	wg.Go(func() { n.apis.run(ctx) })
	wg.Go(func() { n.ranges.run(ctx) })
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-n.change:
		}
		n.tell(ctx)
		if !sleep(ctx, settleTime) {
			return nil
		}
	}
}

// tell hands on what is known, if it is whole.
func (n *Nodes) tell(ctx context.Context) {
	_, listed := n.nodes.get("")
	_, apis := n.apis.get("")
	services, ranges := n.ranges.get()
	if !listed || !apis || !ranges {
		return
	}
	var (
		state NodesState
		self  = n.c.Self == ""
		list  = n.nodes.all()
	)
	for _, node := range list {
		self = self || node.Name == n.c.Self
		addrs := nodeAddrs(node)
		switch edge, tunneled := n.c.Edge.Mode(node.Labels); {
		case tunneled:
			state.Tunneled = append(state.Tunneled, route.Claim{Node: node.Name, Addrs: addrs})
		case edge:
			state.Rules.Direct = append(state.Rules.Direct, addrs...)
		default:
			state.Rules.Servers = append(state.Rules.Servers, addrs...)
		}
	}
	if len(list) == 0 || !self {
		err := fmt.Errorf("the API server lists %d nodes, and not this one, %q", len(list), n.c.Self)
		n.c.Log.Warn("the list of Nodes is not whole, what was known before stays in force", "err", err)
		n.mu.Lock()
		defer n.mu.Unlock()
		if n.status.Err == nil {
			n.status.Since = time.Now()
		}
		n.status.Err = err
		return
	}
	slices.SortFunc(state.Tunneled, func(a, b route.Claim) int { return strings.Compare(a.Node, b.Node) })
	slices.SortFunc(state.Rules.Servers, netip.Addr.Compare)
	slices.SortFunc(state.Rules.Direct, netip.Addr.Compare)
	state.Rules.Services = append(services, n.c.Services...)
	n.mu.Lock()
	state.Rules.APIServers = n.apiServers()
	n.status = NodesStatus{Complete: true, Nodes: len(list)}
	n.mu.Unlock()
	n.c.Changed(ctx, state)
}

// apiServers needs mu. That there are none any more is not believed: one has said so. While one restarts it is not listed.
func (n *Nodes) apiServers() []netip.Addr {
	var found []netip.Addr
	for _, slice := range n.apis.all() {
		found = append(found, endpointAddrs(slice)...)
	}
	if len(found) > 0 {
		slices.SortFunc(found, netip.Addr.Compare)
		n.found = found
	}
	return n.found
}

// nodeAddrs are the addresses by which a Node is reached, as its object says; what is no address is left out.
func nodeAddrs(node *corev1.Node) []netip.Addr {
	var addrs []netip.Addr
	for _, a := range node.Status.Addresses {
		if addr, err := netip.ParseAddr(a.Address); err == nil && a.Type == corev1.NodeInternalIP {
			addrs = append(addrs, addr)
		}
	}
	return addrs
}

// Status returns the present state.
func (n *Nodes) Status() NodesStatus {
	n.mu.Lock()
	s := n.status
	n.mu.Unlock()
	for _, outage := range []followerStatus{n.nodes.state(), n.apis.state(), n.ranges.state()} {
		if outage.Err != nil { // one is enough: when the API server is away, all say the same
			s.Err, s.Since = outage.Err, outage.Since
			break
		}
	}
	return s
}
