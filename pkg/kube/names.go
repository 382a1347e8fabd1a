// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"net"

	corev1 "k8s.io/api/core/v1"

	"github.com/edge-tunnel/edge-tunnel/pkg/identity"
	"github.com/edge-tunnel/edge-tunnel/pkg/kube/text"
)

// AnnotationExternalAddr on the Service names the address that agents dial, as HOST:PORT.
const AnnotationExternalAddr = "x-tunnel-server-external-addr"

// ServerHosts are the names and addresses at which the server on a node is dialed: those of the Service, which may be nil, and its Node's
// own addresses. A Node's names are left out: its kubelet chooses them.
func ServerHosts(service *corev1.Service, node *corev1.Node) []string {
	var hosts []string
	if service != nil {
		for _, in := range service.Status.LoadBalancer.Ingress {
			hosts = append(hosts, in.IP, in.Hostname)
		}
		if addr, err := text.HostPort(service.Annotations[AnnotationExternalAddr], tunnelPort); err == nil {
			host, _, _ := net.SplitHostPort(addr)
			hosts = append(hosts, host)
		}
		// A headless Service has "None", which could be a name.
		for _, ip := range service.Spec.ClusterIPs {
			if net.ParseIP(ip) != nil {
				hosts = append(hosts, ip)
			}
		}
	}
	hosts = append(hosts, hostsOfNode(node, corev1.NodeInternalIP)...)
	hosts = append(hosts, hostsOfNode(node, corev1.NodeExternalIP)...)
	return identity.Hosts(hosts)
}
