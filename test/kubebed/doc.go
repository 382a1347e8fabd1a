// SPDX-License-Identifier: Apache-2.0

// Package kubebed runs real Kubernetes for tests: what is tested against it has met the real admission, the real authorizers and
// the real watch cache.
//
//	s := kubebed.APIServer(t)                              // etcd and kube-apiserver on loopback, 3 seconds
//	config := s.ServiceAccount("edge-tunnel", "server")    // a kubeconfig file; s.Admin(), s.Kubeconfig(user), s.PodToken(...)
//	s.Kill(); s.Start()                                    // same address, same data
//	saved := s.Save(); ...; s.Restore(saved)               // yesterday's data
//
// There is no controller-manager: no default ServiceAccount, no garbage collection, a deleted namespace stays, the
// ClusterRoles that are put together of others (view, edit, admin) are empty.
//
// # The cluster
//
//	c := kubebed.New(t)                                    // c.Cloud, c.Edge: nodes with kubelet, containerd and kube-proxy, all Ready
//	c.StartDNS(); c.StartMetricsServer()
//	c.Kubectl("logs", "pod")                               // what a Server can, a Cluster can
//
// Each node is one of [netlab]'s, with all of its processes and pods in its cgroup2 folder, so that each can have its own tunnel-server. What
// kubelets would change of the machine (settings below /proc/sys, files below /var) they change in copies.
//
// # The programs
//
// All of them are in one binary, which the nested module in allinone/ builds; its go.mod says which version. The first test that needs it
// builds it (five minutes on two cores, 3 GB in Go's cache) and it stays in ~/.cache/edge-tunnel/kubernetes. containerd, runc
// and the CNI plug-ins are Debian's, unpacked into ~/.cache/edge-tunnel/containerd.
package kubebed
