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
// # The programs
//
// All of them are in one binary, which the nested module in allinone/ builds; its go.mod says which version. The first test that needs it
// builds it (five minutes on two cores, 3 GB in Go's cache) and it stays in ~/.cache/edge-tunnel/kubernetes.
package kubebed
