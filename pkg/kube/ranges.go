// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
)

const (
	// Ranges of Services are added once in a cluster's life, if ever, and API servers before Kubernetes 1.33 know nothing of them: asking now
	// and then is enough.
	rangesEvery = time.Minute
	rangesRetry = 5 * time.Second
)

// apiServers follows at which addresses the API servers are: the EndpointSlices of the Service "kubernetes".
func apiServers(c NodesConfig, wake func()) *follower[*discoveryv1.EndpointSlice] {
	api := c.Client.DiscoveryV1().EndpointSlices(metav1.NamespaceDefault)
	const only = discoveryv1.LabelServiceName + "=kubernetes"
	return &follower[*discoveryv1.EndpointSlice]{
		what: "the API servers' endpointslices", client: c.Client, log: c.Log,
		lighten: func(whole *discoveryv1.EndpointSlice) *discoveryv1.EndpointSlice { return whole },
		changed: func(changes []change[*discoveryv1.EndpointSlice]) {
			if len(changes) == 0 || slices.ContainsFunc(changes, func(c change[*discoveryv1.EndpointSlice]) bool {
				return c.was == nil || c.is == nil || !slices.Equal(endpointAddrs(c.was), endpointAddrs(c.is))
			}) {
				wake()
			}
		},
		list: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			o.LabelSelector = only
			return api.List(ctx, o)
		},
		watch: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.LabelSelector = only
			return api.Watch(ctx, o)
		},
	}
}

func endpointAddrs(slice *discoveryv1.EndpointSlice) []netip.Addr {
	var addrs []netip.Addr
	for _, e := range slice.Endpoints {
		for _, text := range e.Addresses {
			if addr, err := netip.ParseAddr(text); err == nil { // or a name
				addrs = append(addrs, addr.Unmap())
			}
		}
	}
	return addrs
}

// serviceRanges asks for the ranges of Services.
type serviceRanges struct {
	client  kubernetes.Interface
	changed func()

	mu       sync.Mutex // guards what follows
	complete bool       // it was answered once
	ranges   []netip.Prefix
	outage   followerStatus
}

func (s *serviceRanges) run(ctx context.Context) {
	for pause := time.Duration(0); sleep(ctx, pause); {
		list, err := s.client.NetworkingV1().ServiceCIDRs().List(ctx, metav1.ListOptions{})
		if ctx.Err() != nil {
			return
		}
		pause = rangesEvery
		if s.note(list, err) != nil {
			pause = rangesRetry
		}
	}
}

// note takes an answer in. An API server that does not know such objects has none; but what was known stays.
func (s *serviceRanges) note(list *networkingv1.ServiceCIDRList, err error) error {
	var ranges []netip.Prefix
	if err == nil {
		for _, item := range list.Items {
			for _, text := range item.Spec.CIDRs {
				if prefix, err := netip.ParsePrefix(text); err == nil {
					ranges = append(ranges, prefix.Masked())
				}
			}
		}
		slices.SortFunc(ranges, netip.Prefix.Compare)
	}
	s.mu.Lock()
	if err != nil && !apierrors.IsNotFound(err) {
		defer s.mu.Unlock()
		if s.outage.Err == nil {
			s.outage.Since = time.Now()
		}
		s.outage.Err = fmt.Errorf("list servicecidrs: %w", err)
		return err
	}
	same := s.complete && (err != nil || slices.Equal(s.ranges, ranges))
	if err == nil {
		s.ranges = ranges
	}
	s.complete, s.outage = true, followerStatus{}
	s.mu.Unlock()
	if !same {
		s.changed()
	}
	return nil
}

// get returns what is known, and whether anything is.
func (s *serviceRanges) get() ([]netip.Prefix, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.ranges), s.complete
}

func (s *serviceRanges) state() followerStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.outage
}
