// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes"
)

// PublisherConfig is what [NewPublisher] needs.
type PublisherConfig struct {
	Client    kubernetes.Interface
	Component string // our name in Events

	// Self is the Node that we run on. A list without it is not the whole list of a cluster, but that of one that is being restored, say. Empty: any
	// Node will do.
	Self string

	// RecordsNamespace and RecordsName are those of the ConfigMap that has the names of all Nodes, for CoreDNS; empty: none.
	RecordsNamespace, RecordsName string

	// Status has tunneled Nodes, which Edge tells, have the condition [ConditionReady], and Events be written about them. It needs Leases.
	Status bool
	Edge   EdgeNodes

	// Leases is the namespace of the servers' Leases, see [Registry]; empty: they are not looked at.
	Leases string

	Log *slog.Logger
}

// Publisher says in Kubernetes what is known of its Nodes: their names, and how their tunnels are; and it deletes the Leases of servers that are gone for good. Only one may run in a cluster, see [Leader].
type Publisher struct {
	c       PublisherConfig
	records *records    // nil: none
	status  *nodeStatus // nil: none
	events  *events

	mu      sync.Mutex
	nodes   *follower[*corev1.Node] // nil: Run does not run
	servers *servers                // nil: or they are not looked at
	swept   uint64                  // in earlier runs
}

// PublisherStats is a snapshot.
type PublisherStats struct {
	Records *RecordsStats // nil: none are written
	Status  *StatusStats  // nil: none is
	Events  EventsStats
	Swept   uint64 // Leases of servers that were gone
	Error   string // why the Nodes or the Leases are not known or put right; empty if they are
}

// NewPublisher makes one that does nothing until Run.
func NewPublisher(c PublisherConfig) (*Publisher, error) {
	if c.Client == nil || c.Component == "" || c.Status && c.Leases == "" || (c.RecordsNamespace == "") != (c.RecordsName == "") {
		return nil, errors.New("publisher: Client and Component, a whole name for the records or none, and Leases for Status must be set")
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	p := &Publisher{c: c, events: newEvents(c.Client, c.Component, c.Log)}
	if c.RecordsName != "" {
		p.records = newRecords(c.Client, c.RecordsNamespace, c.RecordsName, p.events, c.Log)
	}
	if c.Status {
		p.status = newNodeStatus(c, p.events)
	}
	return p, nil
}

// Stats returns a snapshot.
func (p *Publisher) Stats() PublisherStats {
	out := PublisherStats{Events: p.events.snapshot()}
	if p.records != nil {
		s := p.records.snapshot()
		out.Records = &s
	}
	if p.status != nil {
		s := p.status.snapshot()
		out.Status = &s
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	out.Swept = p.swept
	var errs []error
	if p.nodes != nil {
		errs = append(errs, p.nodes.state().Err)
	}
	if p.servers != nil {
		swept, err := p.servers.sweeps()
		out.Swept += swept
		errs = append(errs, p.servers.leases.state().Err, err)
	}
	if err := errors.Join(errs...); err != nil {
		out.Error = err.Error()
	}
	return out
}

// Run publishes until ctx ends. What an earlier Run has seen does not count: it may be hours old.
func (p *Publisher) Run(ctx context.Context) error {
	nodes := p.follow()
	var leases *servers
	if p.c.Leases != "" {
		leases = newServers(p.c.Client, p.c.Leases, p.c.Log)
	}
	p.mu.Lock()
	p.nodes, p.servers = nodes, leases
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if leases != nil {
			swept, _ := leases.sweeps()
			p.swept += swept
		}
		p.nodes, p.servers = nil, nil
	}()
	var wg sync.WaitGroup
	wg.Go(func() { nodes.run(ctx) })
	wg.Go(func() { p.events.run(ctx) })
	if leases != nil {
		wg.Go(func() { leases.run(ctx) })
	}
	if p.status != nil {
		wg.Go(func() { p.status.run(ctx, nodes, leases) })
	}
	if p.records != nil {
		wg.Go(func() { p.records.run(ctx, func() ([]recordNode, error) { return recordNodes(nodes, p.c.Self) }) })
	}
	wg.Wait()
	return nil
}

func (p *Publisher) follow() *follower[*corev1.Node] {
	api := p.c.Client.CoreV1().Nodes()
	return &follower[*corev1.Node]{
		what: "nodes", client: p.c.Client, log: p.c.Log, lighten: p.lighten, changed: p.changed,
		list:  func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) { return api.List(ctx, o) },
		watch: api.Watch,
	}
}

// changed wakes those who write about what has changed.
func (p *Publisher) changed(changes []change[*corev1.Node]) {
	if p.records != nil && (len(changes) == 0 || slices.ContainsFunc(changes, func(c change[*corev1.Node]) bool {
		return c.was == nil || c.is == nil || !slices.Equal(c.was.Status.Addresses, c.is.Status.Addresses)
	})) {
		p.records.changed()
	}
}

// lighten keeps of a Node what is written about: of ten thousand, some megabytes instead of a hundred.
func (p *Publisher) lighten(node *corev1.Node) *corev1.Node {
	light := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: node.Name, UID: node.UID, ResourceVersion: node.ResourceVersion}}
	for _, a := range node.Status.Addresses {
		if a.Type == corev1.NodeInternalIP {
			light.Status.Addresses = append(light.Status.Addresses, a)
		}
	}
	if is := conditionOf(node); is != nil {
		light.Status.Conditions = []corev1.NodeCondition{*is}
	}
	light.Labels = p.c.Edge.keep(node.Labels)
	return light
}

// recordNodes are all Nodes, if the list is whole.
func recordNodes(nodes *follower[*corev1.Node], self string) ([]recordNode, error) {
	if _, complete := nodes.get(self); !complete {
		return nil, errors.New("the nodes have not been listed yet")
	}
	var list []recordNode
	whole := self == ""
	for _, n := range nodes.all() {
		whole = whole || n.Name == self
		list = append(list, recordNode{n.Name, nodeAddrs(n)})
	}
	if len(list) == 0 || !whole {
		return nil, fmt.Errorf("the API server lists %d nodes, and not this one, %q: names of nodes stay as they are", len(list), self)
	}
	return list, nil
}
