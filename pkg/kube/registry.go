// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"

	"github.com/edge-tunnel/edge-tunnel/pkg/kube/text"
)

// What the Leases of servers say. All of them have the label; its value is what they are.
const (
	LabelRegistry    = "edge-tunnel.io/registry"
	registryServer   = "server"  // one for each: its heartbeat
	registryNodes    = "nodes"   // a shard of the nodes that it has tunnels of
	registryRefused  = "refused" // what it refuses to be told people, at the Nodes
	annotationPeer   = "edge-tunnel.io/peer"
	annotationTunnel = "edge-tunnel.io/nodes"

	annotationRefused = "edge-tunnel.io/refused"
)

const (
	// A server's nodes are in so many Leases, by a hash of the name. One for each node would be a write, and an event to every server, for
	// each login: 1,000 of each at once when a server with 1,000 agents goes. One for each server would send 20 KB to every server for
	// each agent that flaps. Each Lease has one writer, so there are no conflicts.
	registryShards = 16

	// A server says so much of what it refuses. The rest has to be looked up there.
	maxRefusedText = 64 << 10

	recordEvery  = 5 * time.Second // what changes meanwhile is one write
	beatsEvery   = 3               // of these
	requestLimit = 10 * time.Second

	// A server counts as gone when its heartbeat is so much older than the latest of all: while the API server is away, nobody's is. It is
	// long because clocks differ, and because a peer that is gone costs a dial every ten seconds only: what counts is the
	// connection to it.
	serverGone = 10 * time.Minute
)

// RegistryConfig is what [NewRegistry] needs.
type RegistryConfig struct {
	Client    kubernetes.Interface
	Namespace string
	Server    string              // our name, that of the certificate
	Addr      func() string       // where peers reach us now, HOST:PORT; empty: not known
	Peers     func(addr []string) // is told where the other servers are when that changes; must not call the Registry
	Refused   func() []Refusal    // what we refuse now, in one order; nil: nothing is said of it
	Log       *slog.Logger
}

// Registry is where servers find each other, and who has which node, by Leases: each server writes its own and reads all. It is a hint. What
// it knew counts for as long as the API server cannot be reached.
type Registry struct {
	c      RegistryConfig
	every  time.Duration // recordEvery
	leases *follower[*coordinationv1.Lease]

	mu      sync.Mutex // guards what follows
	own     [registryShards]map[string]struct{}
	dirty   [registryShards]bool
	servers map[string]serverLease         // by the Lease's name
	owners  map[string]map[string]struct{} // servers, by node
	told    []string
	stats   RegistryStats
}

type serverLease struct {
	server, addr string // addr is empty if it is not known
	renewed      time.Time
}

// RegistryStats is a snapshot.
type RegistryStats struct {
	Servers  int    // others that are there
	Nodes    int    // that others have tunnels of
	Writes   uint64 // of Leases
	Failures uint64
	Err      error // of the latest write; nil if it went well
}

// NewRegistry makes one that does nothing until Run.
func NewRegistry(c RegistryConfig) (*Registry, error) {
	if c.Client == nil || c.Namespace == "" || c.Server == "" || c.Addr == nil || c.Peers == nil {
		return nil, errors.New("registry: Client, Namespace, Server, Addr and Peers must be set")
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	r := &Registry{c: c, every: recordEvery, servers: make(map[string]serverLease), owners: make(map[string]map[string]struct{})}
	for i := range r.own {
		r.own[i], r.dirty[i] = make(map[string]struct{}), true // a predecessor may have left something
	}
	r.leases = followLeases(c.Client, c.Namespace, c.Log, r.seen)
	return r, nil
}

// followLeases follows the Leases of servers, and tells seen what each said and says now; either may be nil.
func followLeases(client kubernetes.Interface, namespace string, log *slog.Logger, seen func(was, is *coordinationv1.Lease)) *follower[*coordinationv1.Lease] {
	api := client.CoordinationV1().Leases(namespace)
	return &follower[*coordinationv1.Lease]{
		what: "leases", client: client, log: log,
		lighten: func(whole *coordinationv1.Lease) *coordinationv1.Lease {
			light := *whole
			light.ManagedFields = nil
			return &light
		},
		changed: func(changes []change[*coordinationv1.Lease]) {
			for _, c := range changes {
				seen(c.was, c.is)
			}
		},
		list: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			o.LabelSelector = LabelRegistry
			return api.List(ctx, o)
		},
		watch: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.LabelSelector = LabelRegistry
			return api.Watch(ctx, o)
		},
	}
}

// Own notes that our server has a tunnel of a node now, or has none.
func (r *Registry) Own(node string, has bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	i := shardOf(node)
	if has {
		r.own[i][node] = struct{}{}
	} else {
		delete(r.own[i], node)
	}
	r.dirty[i] = true
}

func shardOf(node string) int {
	h := fnv.New32a()
	h.Write([]byte(node))
	return int(h.Sum32() % registryShards)
}

// Owner returns one of the other servers that say that they have a tunnel of a node, or "".
func (r *Registry) Owner(node string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	for server := range r.owners[node] {
		return server
	}
	return ""
}

// Stats returns a snapshot.
func (r *Registry) Stats() RegistryStats {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.stats
	s.Servers, s.Nodes = len(r.told), len(r.owners)
	return s
}

// Run writes and reads until ctx ends. Our Leases stay: peers let the connection to us go when it ends, and no sooner.
func (r *Registry) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { r.leases.run(ctx) })
	tick := time.NewTicker(r.every)
	defer tick.Stop()
	for n := 0; ctx.Err() == nil; n++ {
		if n%beatsEvery == 0 {
			r.write(ctx, r.beat())
		}
		if _, complete := r.leases.get(""); n > 0 && complete { // agents that were here before had time to come back
			r.record(ctx)
			r.refuse(ctx)
		}
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
	return nil
}

func (r *Registry) leaseName(kind string) string {
	hash := sha256.Sum256([]byte(r.c.Server)) // names of servers may be as long as those of objects
	return fmt.Sprintf("edge-tunnel-%s-%x", kind, hash[:8])
}

func (r *Registry) shardName(i int) string {
	return fmt.Sprintf("%s-%x", r.leaseName(registryNodes), i)
}

func (r *Registry) lease(kind, name, annotation, value string) *coordinationv1.Lease {
	return &coordinationv1.Lease{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: r.c.Namespace, Name: name,
			Labels: map[string]string{LabelRegistry: kind}, Annotations: map[string]string{annotation: value},
		},
		Spec: coordinationv1.LeaseSpec{HolderIdentity: &r.c.Server},
	}
}

func (r *Registry) beat() *coordinationv1.Lease {
	l := r.lease(registryServer, r.leaseName(registryServer), annotationPeer, r.c.Addr())
	seconds, now := int32(beatsEvery*recordEvery/time.Second), metav1.NowMicro()
	l.Spec.LeaseDurationSeconds, l.Spec.RenewTime = &seconds, &now
	return l
}

// record writes the shards that differ from what is there.
func (r *Registry) record(ctx context.Context) {
	for i := range registryShards {
		r.mu.Lock()
		dirty, nodes := r.dirty[i], text.FormatNodes(slices.Collect(maps.Keys(r.own[i])))
		r.dirty[i] = false
		r.mu.Unlock()
		if !dirty {
			continue
		}
		l := r.lease(registryNodes, r.shardName(i), annotationTunnel, nodes)
		old, _ := r.leases.get(l.Name)
		if same := old != nil && old.Annotations[annotationTunnel] == nodes; same || old == nil && nodes == "" {
			continue
		}
		if !r.write(ctx, l) {
			r.mu.Lock()
			r.dirty[i] = true
			r.mu.Unlock()
		}
	}
}

// refuse writes what we refuse, if that differs from what is there.
func (r *Registry) refuse(ctx context.Context) {
	if r.c.Refused == nil {
		return
	}
	l := r.lease(registryRefused, r.leaseName(registryRefused), annotationRefused, refusedText(r.c.Refused()))
	old, _ := r.leases.get(l.Name)
	if text := l.Annotations[annotationRefused]; old == nil && text != "[]" || old != nil && old.Annotations[annotationRefused] != text {
		r.write(ctx, l)
	}
}

func refusedText(list []Refusal) string {
	text := []byte{'['}
	for _, refusal := range list {
		one, err := json.Marshal(refusal)
		if err != nil || len(text)+len(one) > maxRefusedText {
			break
		}
		if len(text) > 1 {
			text = append(text, ',')
		}
		text = append(text, one...)
	}
	return string(append(text, ']'))
}

// write makes a Lease or replaces it: we are its only writer.
func (r *Registry) write(ctx context.Context, l *coordinationv1.Lease) bool {
	ctx, cancel := context.WithTimeout(ctx, requestLimit)
	defer cancel()
	leases := r.c.Client.CoordinationV1().Leases(l.Namespace)
	patch, err := json.Marshal(l)
	if err == nil {
		_, err = leases.Patch(ctx, l.Name, types.MergePatchType, patch, metav1.PatchOptions{})
	}
	if apierrors.IsNotFound(err) {
		_, err = leases.Create(ctx, l, metav1.CreateOptions{})
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stats.Writes++; err != nil {
		r.stats.Failures++
		if r.stats.Err == nil {
			r.c.Log.Warn("other servers may not find this one", "lease", l.Name, "err", err)
		}
	}
	r.stats.Err = err
	return err == nil
}

// seen takes what one Lease says in the place of what it said; either may be nil.
func (r *Registry) seen(old, now *coordinationv1.Lease) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, l := range []*coordinationv1.Lease{old, now} {
		if l == nil || l.Spec.HolderIdentity == nil {
			continue
		}
		if *l.Spec.HolderIdentity == r.c.Server {
			// Compared again: somebody may have taken us for gone, and deleted it.
			for i := range r.dirty {
				r.dirty[i] = r.dirty[i] || l.Name == r.shardName(i)
			}
			continue
		}
		switch server := *l.Spec.HolderIdentity; {
		case l.Labels[LabelRegistry] == registryNodes:
			r.index(server, l.Annotations[annotationTunnel], l == now)
		case l.Labels[LabelRegistry] != registryServer:
		case l == old:
			delete(r.servers, l.Name)
		default:
			s := serverLease{server: server}
			s.addr, _ = text.HostPort(l.Annotations[annotationPeer], 0) // none, if it is none
			if l.Spec.RenewTime != nil {
				s.renewed = l.Spec.RenewTime.Time
			}
			r.servers[l.Name] = s
		}
	}
	if peers := r.peers(); !slices.Equal(peers, r.told) {
		r.told = peers
		r.c.Peers(slices.Clone(peers))
	}
}

// index needs mu.
func (r *Registry) index(server, nodes string, add bool) {
	for _, node := range text.Nodes(nodes) {
		switch servers := r.owners[node]; {
		case add && servers == nil:
			r.owners[node] = map[string]struct{}{server: {}}
		case add:
			servers[server] = struct{}{}
		default:
			if delete(servers, server); len(servers) == 0 {
				delete(r.owners, node)
			}
		}
	}
}

// peers are the addresses of the servers that are there. It needs mu.
func (r *Registry) peers() []string {
	var latest time.Time
	for _, s := range r.servers {
		if s.renewed.After(latest) {
			latest = s.renewed
		}
	}
	var list []string
	for _, s := range r.servers {
		if s.addr != "" && latest.Sub(s.renewed) < serverGone {
			list = append(list, s.addr)
		}
	}
	slices.Sort(list)
	return slices.Compact(list)
}
