// SPDX-License-Identifier: Apache-2.0

package kubebed

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// want runs kubectl with a kubeconfig; its output or error must contain the text.
func (s *Server) want(t *testing.T, text, config string, args ...string) {
	t.Helper()
	out, err := s.Kubectl(append([]string{"--kubeconfig", config}, args...)...)
	if err != nil {
		out = err.Error()
	}
	if !strings.Contains(out, text) {
		t.Errorf("kubectl %s: %q lacks %q", strings.Join(args, " "), out, text)
	}
}

func TestServerKnowsWhoAsks(t *testing.T) {
	begin := time.Now()
	s := APIServer(t)
	t.Logf("ready after %v", time.Since(begin).Round(time.Millisecond))

	s.want(t, "system:masters", s.Admin(), "auth", "whoami")
	s.want(t, "cannot list resource", s.Kubeconfig("somebody"), "get", "nodes")

	account := s.ServiceAccount("tunnels", "server")
	s.want(t, "system:serviceaccount:tunnels:server", account, "auth", "whoami")
	s.want(t, "cannot list resource", account, "get", "nodes")
	s.Apply(`{"apiVersion": "v1", "kind": "List", "items": [
		{"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "pods"},
			"rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}]},
		{"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "server"},
			"roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "pods"},
			"subjects": [{"kind": "ServiceAccount", "namespace": "tunnels", "name": "server"}]}]}`)
	s.want(t, "No resources found", account, "get", "pods", "-n", "tunnels")

	pod := s.PodToken("tunnels", "agent", "edge-1")
	s.want(t, `"authentication.kubernetes.io/node-name":["edge-1"]`, pod, "auth", "whoami", "-o", "jsonpath={.status.userInfo.extra}")

	// The Node authorizer and NodeRestriction: a kubelet may write its own Node, but not the labels that an administrator keeps for himself.
	s.PodToken("tunnels", "agent", "edge-2")
	node := s.Kubeconfig("system:node:edge-1", "system:nodes")
	s.want(t, "labeled", node, "label", "node", "edge-1", "example.com/site=home")
	s.want(t, "is forbidden", node, "label", "node", "edge-2", "example.com/site=home")
	s.want(t, "is not allowed to modify labels", node, "label", "node", "edge-1", "node-restriction.kubernetes.io/site=home")

	s.Create("/apis/certificates.k8s.io/v1/certificatesigningrequests", Object{"metadata": Object{"name": "edge-1"},
		"spec": Object{"signerName": "example.com/tunnel", "usages": []string{"client auth"}, "request": request(t)}})
	s.want(t, "Pending", s.Admin(), "get", "csr", "edge-1")
}

func TestServerComesBack(t *testing.T) {
	s := APIServer(t)
	maps := "/api/v1/namespaces/default/configmaps"
	put := func(name string) string {
		t.Helper()
		var made struct {
			Metadata struct{ ResourceVersion string }
		}
		if err := s.Do(http.MethodPost, maps, Object{"metadata": Object{"name": name}}, &made); err != nil {
			t.Fatal(err)
		}
		return made.Metadata.ResourceVersion
	}
	has := func(name string) bool {
		t.Helper()
		err := s.Do(http.MethodGet, maps+"/"+name, nil, nil)
		if status := (*StatusError)(nil); err != nil && !(errors.As(err, &status) && status.Code == http.StatusNotFound) {
			t.Fatal(err)
		}
		return err == nil
	}

	put("early")
	saved := s.Save()
	for i := range 50 { // more than a start of the server writes
		put(fmt.Sprintf("later-%d", i))
	}
	version := put("late")

	s.Kill()
	if err := s.Do(http.MethodGet, maps, nil, nil); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a killed server: %v, want connection refused", err)
	}
	s.Start()
	if !has("early") || !has("late") {
		t.Error("a restart has lost something")
	}
	s.Stop()
	s.Restore(saved)
	if !has("early") || has("late") {
		t.Errorf("after the restore: early %v, late %v", has("early"), has("late"))
	}
	// Both are decimal, and of one length so early.
	if again := put("again"); len(again) == len(version) && again > version {
		t.Errorf("resource version %s was not set back: it was %s before", again, version)
	}
}

func TestServerLeavesNothing(t *testing.T) {
	var s *Server
	t.Run("run", func(t *testing.T) { s = APIServer(t) })
	if s == nil {
		t.Fatal("no server")
	}
	for _, path := range []string{s.node.Cgroup(), s.node.Path()} {
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", path, err)
		}
	}
	for _, pid := range []int{s.etcd.PID(), s.api.PID()} {
		if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
			t.Errorf("process %d is left: %v", pid, err)
		}
	}
	if l, err := net.Listen("tcp", s.addr.String()); err != nil {
		t.Errorf("the port is not free: %v", err)
	} else {
		l.Close()
	}
}

// request is a certificate signing request in PEM.
func request(t *testing.T) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "edge-1"}}, key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}
