// SPDX-License-Identifier: Apache-2.0

// Package kube is all that the programs have to do with Kubernetes, and the only importer of client-go.
//
// [NewClient] connects to the API server. [Nodes] follows the Node objects, and what else is at addresses that cannot be tunneled, and [ConfigMap] one ConfigMap, for the ports. [Leader] has something run in one of several processes. [Signer] decides requests for
// certificates of agents and servers, by the rules of package identity, with a CA that it keeps in a Secret; it is what the leader runs. [Certificate] is the other
// end: it asks for a certificate, keeps it on disk and renews it.
//
// [Publisher], which the leader runs too, says in Kubernetes what is known of its Nodes.
//
// [Lookup] tells agents where to dial servers.
//
// [Registry] has servers find each other, and says who has which node.
//
// Nothing here ends because the API server is away, and everything says what is wrong in its Stats, in the API server's words, which name
// the verb and the resource that a right is missing for. Run methods return when all that they began has ended.
package kube

import (
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"syscall"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"
)

// Client is a connection to an API server, for those who may not import client-go.
type Client = kubernetes.Interface

// ClientOptions say where the API server is and how it may be burdened.
type ClientOptions struct {
	Kubeconfig string  // file; empty: that of the pod's ServiceAccount
	UserAgent  string  // program and version
	QPS        float32 // requests a second; default 20, and twice that at once
	Wrap       func(http.RoundTripper) http.RoundTripper
	// Control is called for each socket before it connects; nil: nothing is.
	Control func(network, address string, c syscall.RawConn) error
}

// NewClient connects to nothing yet: the API server need not be there.
func NewClient(o ClientOptions) (kubernetes.Interface, error) {
	config, err := clientcmd.BuildConfigFromFlags("", o.Kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("find API server: %w", err)
	}
	if o.QPS <= 0 {
		o.QPS = 20
	}
	config.QPS, config.Burst, config.UserAgent = o.QPS, int(2*o.QPS), o.UserAgent
	config.ContentType, config.AcceptContentTypes = "application/vnd.kubernetes.protobuf", "application/vnd.kubernetes.protobuf,application/json"
	if o.Control != nil {
		dialer := net.Dialer{Timeout: 30 * time.Second, KeepAlive: 30 * time.Second, Control: o.Control} // times as client-go's own
		dialer.SetMultipathTCP(false)
		config.Dial = dialer.DialContext
	}
	if o.Wrap != nil {
		config.Wrap(o.Wrap)
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("find API server: %w", err)
	}
	return client, nil
}

// LogTo sends what client-go logs, which it does for the whole process, to log. To be called once, by a program's main.
func LogTo(log *slog.Logger) { klog.SetSlogLogger(log.With("part", "client-go")) }
