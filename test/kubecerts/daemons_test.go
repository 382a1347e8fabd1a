// SPDX-License-Identifier: Apache-2.0

package kubecerts

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/edge-tunnel/edge-tunnel/pkg/identity"
	"github.com/edge-tunnel/edge-tunnel/pkg/kube"
	"github.com/edge-tunnel/edge-tunnel/pkg/tunnel"
	"github.com/edge-tunnel/edge-tunnel/pkg/wire"
	"github.com/edge-tunnel/edge-tunnel/test/kubebed"
)

// cloud is a server's certificate and its tunnels, without the kernel's half.
type cloud struct {
	store *identity.Store
	cert  *kube.Certificate
	port  string
}

func startCloud(t *testing.T, s *kubebed.Server, ca string) *cloud {
	t.Helper()
	client, err := kube.NewClient(kube.ClientOptions{Kubeconfig: s.PodToken(namespace, "tunnel-server", "cloud-1")})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	c := &cloud{}
	c.store, err = identity.Open(identity.Files{CA: ca, Cert: kube.CertificateFile(dir), Key: kube.CertificateFile(dir)},
		identity.Options{Role: identity.RoleServer, Late: "cloud-1"})
	if err != nil {
		t.Fatal(err)
	}
	c.cert, err = kube.NewCertificate(kube.CertificateConfig{
		Client: client, Role: identity.RoleServer, Node: "cloud-1", Dir: dir, Namespace: namespace, Service: "x-tunnel-server-svc", Present: c.store.Present,
	})
	if err != nil {
		t.Fatal(err)
	}
	server, err := tunnel.NewServer(tunnel.ServerConfig{
		ID:  "cloud-1",
		TLS: c.store.ServerTLS(map[string]identity.Role{wire.ALPNAgent: identity.RoleAgent}),
		Authorize: func(state tls.ConnectionState) (tunnel.Identity, error) {
			peer, err := c.store.Peer(state)
			return tunnel.Identity{Name: peer.Name, Serial: peer.Serial, NotAfter: peer.NotAfter}, err
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, c.port, _ = net.SplitHostPort(ln.Addr().String())
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for _, run := range []func(context.Context) error{c.store.Run, c.cert.Run, func(ctx context.Context) error { return server.Serve(ctx, ln) }} {
		wg.Go(func() {
			if err := run(ctx); err != nil {
				t.Error(err)
			}
		})
	}
	t.Cleanup(func() {
		stop()
		wg.Wait()
	})
	return c
}

// TestDaemons: a real agent gets its certificate, logs in to a server that got its own, and does both again without the API server.
func TestDaemons(t *testing.T) {
	s := bed(t)
	annotate := func(addr string) {
		t.Helper()
		if err := s.Do(http.MethodPatch, "/api/v1/namespaces/kube-system/services/x-tunnel-server-svc",
			kubebed.Object{"metadata": kubebed.Object{"annotations": kubebed.Object{"x-tunnel-server-external-addr": addr}}}, nil); err != nil {
			t.Fatal(err)
		}
	}
	ca := filepath.Join(t.TempDir(), "ca.crt")
	server := startCloud(t, s, ca)
	annotate("localhost:" + server.port) // an address of the loopback would not be taken
	config := s.PodToken(namespace, "tunnel-agent", "edge-1")
	dir := t.TempDir()
	agent := func() *process {
		t.Helper()
		return launch(t, nil, "tunnel-agent", "--state-dir", filepath.Join(dir, "state"), "--ca-cert", ca, "--certificate-from", "kubernetes", "--kubeconfig", config,
			"--node-name", "edge-1", "--certificate-dir", filepath.Join(dir, "kept"), "--admin", "127.0.0.1:0", "--control", filepath.Join(dir, "agent.sock"))
	}

	// Nothing is there yet, not even somebody who signs, and not all of the rights.
	rights := "/apis/rbac.authorization.k8s.io/v1/clusterroles/edge-tunnel-agent"
	allow := func(verbs ...string) {
		t.Helper()
		if err := s.Do(http.MethodPatch, rights, kubebed.Object{"rules": []kubebed.Object{
			{"apiGroups": []string{"certificates.k8s.io"}, "resources": []string{"certificatesigningrequests"}, "verbs": verbs}}}, nil); err != nil {
			t.Fatal(err)
		}
	}
	allow("get")
	eventually(t, "right is gone", func() bool { // which takes the API server a moment
		var review struct{ Status struct{ Allowed bool } }
		if err := s.Do(http.MethodPost, "/apis/authorization.k8s.io/v1/subjectaccessreviews", kubebed.Object{"spec": kubebed.Object{
			"user":               "system:serviceaccount:kube-system:tunnel-agent",
			"resourceAttributes": kubebed.Object{"group": "certificates.k8s.io", "resource": "certificatesigningrequests", "verb": "create"},
		}}, &review); err != nil {
			t.Fatal(err)
		}
		return !review.Status.Allowed
	})
	a := agent()
	says := func(text string) {
		t.Helper()
		eventually(t, "says "+text, func() bool { return strings.Contains(a.get("/state"), text) })
	}
	says(`cannot create resource \"certificatesigningrequests\"`)
	allow("create")
	says(`cannot get resource \"certificatesigningrequests\"`)
	allow("create", "get")
	says("is not decided yet")
	if body := a.get("/readyz"); !strings.Contains(body, "[-]certificate: there is none yet") {
		t.Error(body)
	}
	start(t, s)
	eventually(t, "bundle published", func() bool { return bundle(t, s) != "" })
	if err := os.WriteFile(ca, []byte(bundle(t, s)), 0o600); err != nil { // as a kubelet does with a ConfigMap that a pod has as a volume
		t.Fatal(err)
	}
	eventually(t, "agent logged in", a.ready)
	if body := a.get("/metrics"); !strings.Contains(body, "\nedge_tunnel_agent_certificates_issued_total 1\n") {
		t.Error(body)
	}

	// The load balancer is another one, and does not lead in yet: the tunnel by the old one stays.
	before := server.store.Self().Serial
	annotate("localhost.example.org:10262")
	eventually(t, "server's certificate reissued", func() bool { return server.store.Self().Serial != before })
	says(`"servers":["localhost.example.org:10262"]`)
	if !a.ready() {
		t.Error("the agent left its tunnel before it had another one")
	}
	annotate("localhost:" + server.port)
	before = server.store.Self().Serial
	eventually(t, "and again", func() bool { return server.store.Self().Serial != before })
	eventually(t, "agent logged in", a.ready)
	says(`"servers":["localhost:` + server.port + `"]`)

	s.Kill()
	a.stop()
	a = agent()
	eventually(t, "agent logged in without the API server", a.ready)
	if body := a.get("/metrics"); !strings.Contains(body, "\nedge_tunnel_agent_certificates_issued_total 0\n") {
		t.Error(body)
	}
	says(`"stored":true`)
	says("follow Service kube-system/x-tunnel-server-svc")
	s.Start()
	says(`"stored":false`)
	a.stop()
}

// TestRightsOfAgents takes each right of an agent away in turn: it has to say which one it lacks.
func TestRightsOfAgents(t *testing.T) {
	s := bed(t)
	s.Create("/api/v1/nodes", kubebed.Object{"metadata": kubebed.Object{"name": "cloud-1"}})
	s.Create("/apis/discovery.k8s.io/v1/namespaces/kube-system/endpointslices", kubebed.Object{"metadata": kubebed.Object{"name": "x-tunnel-server-svc-1",
		"labels": kubebed.Object{"kubernetes.io/service-name": "x-tunnel-server-svc"}}, "addressType": "IPv4", "ports": []kubebed.Object{{"name": "tunnels", "port": 10262}},
		"endpoints": []kubebed.Object{{"addresses": []string{"10.0.0.1"}, "nodeName": "cloud-1"}}})
	config := s.PodToken(namespace, "tunnel-agent", "edge-1")
	n := 0
	eachRight(t, s, func(right) bool { return true }, func(t *testing.T, verb, resource string, env []string, back func()) {
		n++
		dir := t.TempDir()
		a := launch(t, env, "tunnel-agent", "--state-dir", dir, "--ca-cert", filepath.Join(dir, "ca.crt"), "--certificate-from", "kubernetes", "--kubeconfig", config,
			"--node-name", "edge-1", "--certificate-dir", dir, "--admin", "127.0.0.1:0", "--control", filepath.Join(dir, "agent.sock"))
		says := func() bool { return cannot(verb, resource).MatchString(a.get("/state")) }
		eventually(t, "says which right is missing", says)
		back()
		if resource != "nodes" { // which it looks at again an hour later
			eventually(t, "says so no more", func() bool { return !says() })
		}
		a.stop()
	}, "/apis/rbac.authorization.k8s.io/v1/clusterroles/edge-tunnel-agent", "/apis/rbac.authorization.k8s.io/v1/namespaces/kube-system/roles/edge-tunnel-agent")
	if n != 7 {
		t.Errorf("%d rights", n)
	}
}
