// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"

	"github.com/edge-tunnel/edge-tunnel/pkg/identity"
	"github.com/edge-tunnel/edge-tunnel/pkg/kube/text"
)

const (
	tunnelPort = 10262 // of the Service, by which it is told from its other ports
	tunnelName = "tcp" // what yurt-tunnel calls it

	// Of many cloud nodes an agent knows some, each agent others: they are for when no better way leads in.
	maxServerNodes = 8
)

// LookupConfig is what [NewLookup] needs.
type LookupConfig struct {
	Client             kubernetes.Interface
	Namespace, Service string
	Dir                string // where what is known is kept, see ServersFile
	Agent              string // a name that other agents do not have
	// Changed is told that there is something new in Known, one call at a time.
	Changed func()
	Log     *slog.Logger
}

// ServersFile is where an agent keeps what it knows about where servers are.
func ServersFile(dir string) string { return filepath.Join(dir, "servers.json") }

// Lookup looks up where agents dial servers: the load balancer of their Service, the address in its annotation, the nodes that servers run on. What was
// known once counts until something else is: it is kept on disk, and neither an API server that is away nor a Service that is gone takes it
// away.
//
// Its rights are list and watch on this one Service, list and watch on EndpointSlices, which name the nodes that servers run on, and get on Nodes, for their
// external addresses. Without the second no nodes are found, without the third only those addresses that the EndpointSlices have; the rest works. No agent
// watches Nodes: 10,000 agents would be sent each other's heartbeats.
type Lookup struct {
	c        LookupConfig
	services *follower[*corev1.Service]
	slices   *follower[*discoveryv1.EndpointSlice]
	log      *slog.Logger

	serviceChanged, nodesChanged chan struct{}
	soon, later                  time.Duration // within which agents look at changes of the two
	reread                       time.Duration // addresses of Nodes, which are not followed

	nodes map[string]nodeHosts // by name, of servers; Run's

	mu      sync.Mutex // guards what follows
	known   text.Servers
	stats   LookupStats
	problem map[string]string // by what it is about
}

type nodeHosts struct {
	external, internal []string
	err                error
	read               time.Time // zero: not yet, or too long ago
}

// LookupStats is a snapshot.
type LookupStats struct {
	Stored   bool      // what is known comes from disk: the API server has not been reached since the start
	Problems []string  // sorted
	Err      error     // why nothing newer can be had; nil while all is well
	Since    time.Time // of Err
	Disk     string    // why what is known could not be kept
}

// NewLookup reads what was kept. It talks to nobody before Run.
func NewLookup(c LookupConfig) *Lookup {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	s := &Lookup{
		c: c, log: c.Log, serviceChanged: make(chan struct{}, 1), nodesChanged: make(chan struct{}, 1), nodes: make(map[string]nodeHosts),
		problem: make(map[string]string), soon: 2 * time.Second, later: time.Minute, reread: time.Hour,
		known: text.Servers{Service: c.Namespace + "/" + c.Service},
	}
	// A folder that cannot be made is like a full disk: said, and survived.
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		s.stats.Disk = err.Error()
	}
	kept, err := os.ReadFile(ServersFile(c.Dir))
	if err == nil {
		var found text.Servers
		if found, err = text.ParseServers(kept); err == nil && found.Service == s.known.Service {
			s.known, s.stats.Stored = found, true
		}
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.log.Warn("what was kept about where servers are is of no use", "file", ServersFile(c.Dir), "err", err)
	}
	signal := func(c chan struct{}) {
		select {
		case c <- struct{}{}:
		default:
		}
	}
	services, endpoints := c.Client.CoreV1().Services(c.Namespace), c.Client.DiscoveryV1().EndpointSlices(c.Namespace)
	// The name is what a right can be limited to.
	named := fields.OneTermEqualSelector(metav1.ObjectNameField, c.Service).String()
	labelled := discoveryv1.LabelServiceName + "=" + c.Service
	s.services = &follower[*corev1.Service]{
		what: "Service " + s.known.Service, client: c.Client, log: c.Log,
		lighten: func(whole *corev1.Service) *corev1.Service { return whole },
		changed: func([]change[*corev1.Service]) { signal(s.serviceChanged) },
		list: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			o.FieldSelector = named
			return services.List(ctx, o)
		},
		watch: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.FieldSelector = named
			return services.Watch(ctx, o)
		},
	}
	s.slices = &follower[*discoveryv1.EndpointSlice]{
		what: "EndpointSlices of Service " + s.known.Service, client: c.Client, log: c.Log,
		lighten: func(whole *discoveryv1.EndpointSlice) *discoveryv1.EndpointSlice { return whole },
		changed: func([]change[*discoveryv1.EndpointSlice]) { signal(s.nodesChanged) },
		list: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			o.LabelSelector = labelled
			return endpoints.List(ctx, o)
		},
		watch: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.LabelSelector = labelled
			return endpoints.Watch(ctx, o)
		},
	}
	return s
}

// Known returns what is known now.
func (s *Lookup) Known() text.Servers {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.known // its lists are replaced, never changed
}

// Stats returns a snapshot.
func (s *Lookup) Stats() LookupStats {
	service, nodes := s.services.state(), s.slices.state()
	s.mu.Lock()
	defer s.mu.Unlock()
	out := s.stats
	for _, p := range s.problem {
		out.Problems = append(out.Problems, p)
	}
	slices.Sort(out.Problems)
	out.Err, out.Since = service.Err, service.Since
	if out.Err == nil {
		out.Err, out.Since = nodes.Err, nodes.Since
	}
	return out
}

// Run looks servers up until ctx ends, whatever happens to the API server. What is first known is told at once. Later every agent looks at its own time: all
// of them are told of a change in the same instant.
func (s *Lookup) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { s.services.run(ctx) })
	wg.Go(func() { s.slices.run(ctx) })
	again := time.NewTicker(s.reread + rand.N(s.reread))
	defer again.Stop()
	for {
		within := s.soon
		select {
		case <-ctx.Done():
			return nil
		case <-s.serviceChanged:
		case <-s.nodesChanged:
			within = s.later
		case <-again.C:
			for name, n := range s.nodes {
				n.read = time.Time{}
				s.nodes[name] = n
			}
		}
		if known := s.Known(); len(known.Ways()) == 0 || within == s.later && len(known.Nodes) == 0 {
			within = 0
		}
		if within > 0 && !sleep(ctx, rand.N(within)) {
			return nil
		}
		s.look(ctx)
	}
}

// look makes what is known of what the followers have.
func (s *Lookup) look(ctx context.Context) {
	service, asked := s.services.get(s.c.Service)
	if !asked {
		return // not heard from it yet
	}
	known := s.Known()
	if service == nil {
		s.note("service", fmt.Errorf("there is no Service %s/%s", s.c.Namespace, s.c.Service))
		return
	}
	port, err := portOf(service)
	if s.note("service", err); err != nil {
		return
	}
	known.Addrs, err = addrsOf(service, port.Port)
	s.note("annotation", err)
	known.Common = ""
	if common := identity.Hosts(service.Spec.ClusterIPs); len(common) > 0 { // a headless Service has "None"
		known.Common = common[0]
	}
	var nodes []string
	_, asked = s.slices.get("")
	if asked {
		nodes = s.nodesOf(ctx, port)
	}
	switch {
	case ctx.Err() != nil:
		return
	case len(nodes) > 0:
		known.Nodes = nodes
	case len(known.Addrs) == 0 && asked:
		s.note("service", fmt.Errorf("the Service %s has neither a load balancer, nor an annotation %s, nor endpoints on nodes", known.Service, AnnotationExternalAddr))
		return
	case len(known.Addrs) == 0:
		return
	}
	s.use(known)
}

// note keeps what is wrong about something, or that nothing is.
func (s *Lookup) note(what string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil {
		delete(s.problem, what)
		return
	}
	if s.problem[what] != err.Error() {
		s.log.Warn("where servers are is not clear, what was known before counts", "err", err)
	}
	s.problem[what] = err.Error()
}

// use keeps what is known, and tells of it if it is something new.
func (s *Lookup) use(known text.Servers) {
	now := known.Format()
	s.mu.Lock()
	same := string(s.known.Format()) == string(now)
	unsaved := s.stats.Disk != ""
	s.known, s.stats.Stored = known, false
	s.mu.Unlock()
	if !same || unsaved {
		disk := ""
		if err := keep(ServersFile(s.c.Dir), now); err != nil {
			disk = err.Error()
			s.log.Error("where servers are cannot be kept on disk: without the API server they will not be found after a restart", "err", err)
		}
		s.mu.Lock()
		s.stats.Disk = disk
		s.mu.Unlock()
	}
	if !same {
		s.log.Info("servers are dialed at", "addresses", known.Ways())
		s.c.Changed()
	}
}

// portOf finds the port of tunnels among those of a Service.
func portOf(service *corev1.Service) (corev1.ServicePort, error) {
	ports := service.Spec.Ports
	for _, fits := range []func(corev1.ServicePort) bool{
		func(p corev1.ServicePort) bool { return p.Port == tunnelPort },
		func(p corev1.ServicePort) bool { return p.TargetPort.IntValue() == tunnelPort },
		func(p corev1.ServicePort) bool { return p.Name == tunnelName },
		func(corev1.ServicePort) bool { return len(ports) == 1 },
	} {
		if i := slices.IndexFunc(ports, fits); i >= 0 {
			return ports[i], nil
		}
	}
	return corev1.ServicePort{}, fmt.Errorf("none of the Service's ports is %d, has the name %q, or is the only one", tunnelPort, tunnelName)
}

// addrsOf are the addresses that a Service itself has: its load balancer's, then that of the annotation. The error is about the latter.
func addrsOf(service *corev1.Service, port int32) (addrs []string, err error) {
	for _, in := range service.Status.LoadBalancer.Ingress {
		addrs = append(addrs, join(identity.Hosts([]string{in.IP}), port)...)
		addrs = append(addrs, join(identity.Hosts([]string{in.Hostname}), port)...)
	}
	if external := service.Annotations[AnnotationExternalAddr]; strings.TrimSpace(external) != "" {
		addr, bad := text.HostPort(external, uint16(port))
		if bad == nil {
			addrs = append(addrs, addr)
		} else {
			err = fmt.Errorf("annotation %s: %w", AnnotationExternalAddr, bad)
		}
	}
	return distinct(addrs), err
}

func join(hosts []string, port int32) []string {
	var list []string
	for _, host := range hosts {
		list = append(list, net.JoinHostPort(host, strconv.Itoa(int(port))))
	}
	return list
}

// nodesOf are the addresses of nodes with servers that are ready: with the Service's node port if it has one, else with the port where the servers
// themselves listen, if that is on the node's network. External ones come first: an edge node is rarely on the cloud's network.
func (s *Lookup) nodesOf(ctx context.Context, port corev1.ServicePort) []string {
	var external, internal []string
	var failed error
	ready := s.ready(port)
	for _, server := range ready {
		node := s.node(ctx, server.node)
		if node.err != nil {
			failed = node.err
		}
		switch own := slices.Concat(node.external, node.internal); {
		case len(own) == 0:
			internal = append(internal, join(server.hosts, server.port)...)
		case port.NodePort != 0 || slices.ContainsFunc(server.hosts, func(host string) bool { return slices.Contains(own, host) }):
			external = append(external, join(node.external, server.port)...)
			internal = append(internal, join(node.internal, server.port)...)
		}
	}
	maps.DeleteFunc(s.nodes, func(name string, _ nodeHosts) bool {
		return !slices.ContainsFunc(ready, func(server readyServer) bool { return server.node == name })
	})
	s.note("node", failed)
	return distinct(slices.Concat(external, internal))
}

// readyServer is what an EndpointSlice says of one.
type readyServer struct {
	node  string
	hosts []string
	port  int32
}

// ready returns some of the servers that are ready, those of each node beside each other.
func (s *Lookup) ready(port corev1.ServicePort) []readyServer {
	var found []readyServer
	for _, slice := range s.slices.all() {
		listens := int32(0)
		for _, p := range slice.Ports {
			if p.Port != nil && p.Name != nil && *p.Name == port.Name {
				listens = *p.Port
			}
		}
		for _, e := range slice.Endpoints {
			if e.NodeName != nil && (e.Conditions.Ready == nil || *e.Conditions.Ready) && (port.NodePort != 0 || listens != 0) {
				found = append(found, readyServer{*e.NodeName, identity.Hosts(e.Addresses), cmp.Or(port.NodePort, listens)})
			}
		}
	}
	order := func(server readyServer) string { // by chance, and for this agent always the same
		hash := sha256.Sum256([]byte(s.c.Agent + "/" + server.node))
		return string(hash[:])
	}
	slices.SortFunc(found, func(a, b readyServer) int {
		return cmp.Or(cmp.Compare(order(a), order(b)), slices.Compare(a.hosts, b.hosts))
	})
	names := 0
	for i, server := range found {
		if i == 0 || server.node != found[i-1].node {
			names++
		}
		if names > maxServerNodes {
			return found[:i]
		}
	}
	return found
}

// node reads a Node's addresses, unless it has them. When they cannot be read, those of before count.
func (s *Lookup) node(ctx context.Context, name string) nodeHosts {
	n := s.nodes[name]
	if !n.read.IsZero() && (n.err == nil || apierrors.IsForbidden(n.err)) {
		return n
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	node, err := s.c.Client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
	n.read = time.Now()
	if n.err = err; err == nil {
		n.external, n.internal = hostsOfNode(node, corev1.NodeExternalIP), hostsOfNode(node, corev1.NodeInternalIP)
	} else {
		n.err = fmt.Errorf("look up addresses of a server's Node: %w", err)
	}
	s.nodes[name] = n
	return n
}

// hostsOfNode has no names: a kubelet chooses them.
func hostsOfNode(node *corev1.Node, kind corev1.NodeAddressType) []string {
	var hosts []string
	for _, addr := range node.Status.Addresses {
		if addr.Type == kind && net.ParseIP(addr.Address) != nil {
			hosts = append(hosts, addr.Address)
		}
	}
	return identity.Hosts(hosts)
}

// distinct leaves out what is there before, and what is too much.
func distinct(addrs []string) []string {
	var list []string
	for _, addr := range addrs {
		if len(list) < text.MaxWays && !slices.Contains(list, addr) {
			list = append(list, addr)
		}
	}
	return list
}
