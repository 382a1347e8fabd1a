// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"net"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/edge-tunnel/edge-tunnel/pkg/identity"
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
		if addr := strings.TrimSpace(service.Annotations[AnnotationExternalAddr]); addr != "" {
			if host, _, err := net.SplitHostPort(addr); err == nil {
				addr = host
			}
			hosts = append(hosts, addr)
		}
		// A headless Service has "None", which could be a name.
		for _, ip := range service.Spec.ClusterIPs {
			if net.ParseIP(ip) != nil {
				hosts = append(hosts, ip)
			}
		}
	}
	for _, addr := range node.Status.Addresses {
		if (addr.Type == corev1.NodeInternalIP || addr.Type == corev1.NodeExternalIP) && net.ParseIP(addr.Address) != nil {
			hosts = append(hosts, addr.Address)
		}
	}
	return identity.Hosts(hosts)
}
