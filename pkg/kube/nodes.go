// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"

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

	// Changed is told every state, one at a time. Its context ends with Run's.
	Changed func(context.Context, NodesState)
	Log     *slog.Logger
}

// NodesState is what the Nodes of a cluster say, whole.
type NodesState struct {
	Tunneled []route.Claim // one for each node, sorted by its name, also for those without addresses
	Cloud    []netip.Addr  // addresses of nodes that are no edge nodes: servers run there
}

// NodesStatus says how fresh the state is.
type NodesStatus struct {
	Complete bool      // a whole list was seen since the start
	Nodes    int       // in the latest whole list, of every kind
	Err      error     // why there is nothing newer; nil while the watch works
	Since    time.Time // of Err
}

// Nodes follows the Node objects of a cluster. What it last knew counts for as long as the API server cannot be reached, and nothing is
// concluded from a list that is not whole.
type Nodes struct {
	c        NodesConfig
	informer cache.SharedIndexInformer
	changed  chan struct{}

	interrupted atomic.Bool // the latest watch could not be begun

	mu      sync.Mutex // guards what follows
	status  NodesStatus
	partial error // the latest list was not whole
}

// NewNodes makes one that does nothing until Run.
func NewNodes(c NodesConfig) (*Nodes, error) {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	n := &Nodes{c: c, changed: make(chan struct{}, 1)}
	nodes := c.Client.CoreV1().Nodes()
	n.informer = cache.NewSharedIndexInformer(cache.ToListWatcherWithWatchListSemantics(&cache.ListWatch{
		ListWithContextFunc:  func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) { return nodes.List(ctx, o) },
		WatchFuncWithContext: n.watch,
	}, c.Client), &corev1.Node{}, 0, nil)
	changed := func() {
		select {
		case n.changed <- struct{}{}:
		default:
		}
	}
	_, err := n.informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: func(any) { changed() },
		UpdateFunc: func(was, is any) {
			if !slices.EqualFunc(was.(*corev1.Node).Status.Addresses, is.(*corev1.Node).Status.Addresses, sameAddress) || !sameLabels(was, is) {
				changed()
			}
		},
		DeleteFunc: func(any) { changed() },
	})
	return n, errors.Join(err, n.informer.SetTransform(n.lighten), n.informer.SetWatchErrorHandlerWithContext(n.failed))
}

func sameAddress(a, b corev1.NodeAddress) bool { return a == b }

func sameLabels(was, is any) bool {
	a, b := was.(*corev1.Node).Labels, is.(*corev1.Node).Labels
	if len(a) != len(b) {
		return false
	}
	for key, value := range a {
		if other, ok := b[key]; !ok || other != value {
			return false
		}
	}
	return true
}

// lighten keeps of a Node what decides about it: some hundred bytes instead of some ten thousand, of which its images are most.
func (n *Nodes) lighten(object any) (any, error) {
	node, ok := object.(*corev1.Node)
	if !ok {
		return object, nil
	}
	light := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: node.Name, UID: node.UID, ResourceVersion: node.ResourceVersion}}
	keep := func(key string) {
		if value, ok := node.Labels[key]; ok {
			if light.Labels == nil {
				light.Labels = make(map[string]string)
			}
			light.Labels[key] = value
		}
	}
	for _, l := range n.c.Edge.Labels {
		keep(l.Key)
	}
	for _, key := range n.c.Edge.Modes {
		keep(key)
	}
	for _, a := range node.Status.Addresses {
		if a.Type == corev1.NodeInternalIP {
			light.Status.Addresses = append(light.Status.Addresses, a)
		}
	}
	return light, nil
}

// watch begins a watch. After an outage it has the informer list anew instead: what comes back may have been restored from a backup, and a
// watch from a version that it has not reached, or has reached in another way, would leave things out and say nothing.
func (n *Nodes) watch(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
	if n.interrupted.Swap(false) && o.ResourceVersion != "" {
		return nil, apierrors.NewResourceExpired("the API server was away")
	}
	w, err := n.c.Client.CoreV1().Nodes().Watch(ctx, o)
	if err == nil && reflect.TypeOf(w) == reflect.TypeOf(watch.NewEmptyWatch()) {
		// What client-go makes of a connection that was closed before an answer came, by a load balancer say.
		err = errors.New("the connection was closed before an answer came")
	}
	if err != nil {
		n.interrupted.Store(true)
		n.failed(ctx, nil, err) // the informer tells nobody of a refused connection
		return nil, err
	}
	n.succeed()
	return w, nil
}

// Run follows the Nodes until ctx ends, whatever happens to the API server.
func (n *Nodes) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { n.informer.RunWithContext(ctx) })
	if !cache.WaitForCacheSync(ctx.Done(), n.informer.HasSynced) {
		return nil
	}
	for {
		n.tell(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-n.changed:
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(settleTime):
		}
		select { // what came meanwhile is in the next snapshot
		case <-n.changed:
		default:
		}
	}
}

// tell hands on what the list says, if it is whole.
func (n *Nodes) tell(ctx context.Context) {
	var (
		state NodesState
		self  = n.c.Self == ""
		list  = n.informer.GetStore().List()
	)
	for _, object := range list {
		node := object.(*corev1.Node)
		self = self || node.Name == n.c.Self
		addrs := nodeAddrs(node)
		switch edge, tunneled := n.c.Edge.Mode(node.Labels); {
		case tunneled:
			state.Tunneled = append(state.Tunneled, route.Claim{Node: node.Name, Addrs: addrs})
		case !edge:
			state.Cloud = append(state.Cloud, addrs...)
		}
	}
	if len(list) == 0 || !self {
		err := fmt.Errorf("the API server lists %d nodes, and not this one, %q", len(list), n.c.Self)
		n.c.Log.Warn("the list of Nodes is not whole, what was known before stays in force", "err", err)
		n.mu.Lock()
		defer n.mu.Unlock()
		if n.partial == nil {
			n.status.Since = time.Now()
		}
		n.partial = err
		return
	}
	slices.SortFunc(state.Tunneled, func(a, b route.Claim) int { return strings.Compare(a.Node, b.Node) })
	slices.SortFunc(state.Cloud, netip.Addr.Compare)
	n.mu.Lock()
	n.status.Complete, n.status.Nodes, n.partial = true, len(list), nil
	if n.status.Err == nil {
		n.status.Since = time.Time{}
	}
	n.mu.Unlock()
	n.c.Changed(ctx, state)
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
	defer n.mu.Unlock()
	s := n.status
	s.Err = cmp.Or(s.Err, n.partial)
	return s
}

// succeed notes that the API server has begun a watch. Nothing else tells, in a cluster where nothing happens.
func (n *Nodes) succeed() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.status.Err == nil {
		return
	}
	n.c.Log.Info("the Nodes are followed again")
	n.status.Err = nil
	if n.partial == nil {
		n.status.Since = time.Time{}
	}
}

func (n *Nodes) fail(err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.status.Err == nil && n.partial == nil {
		n.status.Since = time.Now()
	}
	if n.status.Err == nil || n.status.Err.Error() != err.Error() {
		n.c.Log.Warn("the Nodes cannot be followed, what was known before stays in force", "err", err)
	}
	n.status.Err = err
}

// failed is told by the informer why its list or watch ended. It begins again by itself, with growing pauses.
func (n *Nodes) failed(ctx context.Context, _ *cache.Reflector, err error) {
	switch {
	case ctx.Err() != nil, apierrors.IsResourceExpired(err), apierrors.IsGone(err): // lists anew at once
	case apierrors.IsForbidden(err):
		n.fail(fmt.Errorf("not allowed to list and watch nodes: the ServiceAccount needs a ClusterRole with these verbs: %w", err))
	default:
		n.fail(fmt.Errorf("follow nodes: %w", err))
	}
}
