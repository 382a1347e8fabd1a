// SPDX-License-Identifier: Apache-2.0

// Package kubecerts tests certificates in Kubernetes: the real tunnel-controller at a real API server.
package kubecerts

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/edge-tunnel/edge-tunnel/test/kubebed"
)

const (
	namespace = "kube-system"
	csrs      = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
	role      = "/apis/rbac.authorization.k8s.io/v1/namespaces/kube-system/roles/edge-tunnel-controller"
	leaseRole = "/apis/rbac.authorization.k8s.io/v1/namespaces/edge-tunnel-leases/roles/edge-tunnel-controller"
	eventRole = "/apis/rbac.authorization.k8s.io/v1/namespaces/default/roles/edge-tunnel-controller"
	bigRole   = "/apis/rbac.authorization.k8s.io/v1/clusterroles/edge-tunnel-controller"
)

var bin string // folder of the programs

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "kubecerts-")
	if err == nil {
		bin = dir
		var out []byte
		if out, err = exec.Command("go", "build", "-o", bin+"/", "../../cmd/tunnel-controller", "../../cmd/tunnel-agent").CombinedOutput(); err != nil {
			err = fmt.Errorf("%w: %s", err, out)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(func(status int) {
		os.RemoveAll(dir)
		os.Exit(status)
	}))
}

// bed is an API server with what deploy/ puts there.
func bed(t *testing.T) *kubebed.Server {
	t.Helper()
	s := kubebed.APIServer(t)
	s.Install()
	if err := s.Do(http.MethodPatch, "/api/v1/namespaces/kube-system/services/x-tunnel-server-svc", kubebed.Object{
		"metadata": kubebed.Object{"annotations": kubebed.Object{"x-tunnel-server-external-addr": "tunnel.example.org:10262"}},
	}, nil); err != nil {
		t.Fatal(err)
	}
	return s
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// process is one of the programs.
type process struct {
	t     *testing.T
	cmd   *exec.Cmd
	log   lockedBuffer
	admin string
	ended chan error
}

func start(t *testing.T, s *kubebed.Server, args ...string) *process {
	t.Helper()
	return startIn(t, s, nil, args...)
}

func startIn(t *testing.T, s *kubebed.Server, env []string, args ...string) *process {
	t.Helper()
	return launch(t, env, "tunnel-controller", append([]string{"--kubeconfig", s.ServiceAccount(namespace, "tunnel-controller"), "--admin", "127.0.0.1:0",
		"--lease-namespace", "edge-tunnel-leases"}, args...)...)
}

func launch(t *testing.T, env []string, program string, args ...string) *process {
	t.Helper()
	c := &process{t: t, ended: make(chan error, 1)}
	c.cmd = exec.Command(filepath.Join(bin, program), args...)
	c.cmd.Env = append(os.Environ(), env...)
	c.cmd.Stdout, c.cmd.Stderr = &c.log, &c.log
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { c.ended <- c.cmd.Wait() }()
	t.Cleanup(func() {
		if c.cmd.ProcessState == nil {
			_ = c.cmd.Process.Kill()
			<-c.ended
		}
		if t.Failed() {
			t.Logf("log:\n%s", &c.log)
		}
	})
	eventually(t, "started", func() bool {
		m := regexp.MustCompile(`msg=started .*admin=(\S+)`).FindStringSubmatch(c.log.String())
		if m != nil {
			c.admin = m[1]
		}
		return m != nil
	})
	return c
}

// stop ends it as Kubernetes does.
func (c *process) stop() {
	c.t.Helper()
	if err := c.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		c.t.Fatal(err)
	}
	select {
	case err := <-c.ended:
		c.ended <- err
		if err != nil {
			c.t.Errorf("ended: %v", err)
		}
	case <-time.After(30 * time.Second):
		c.t.Fatal("does not end")
	}
}

func (c *process) get(path string) string {
	c.t.Helper()
	client := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get("http://" + c.admin + path)
	if err != nil {
		c.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		c.t.Fatal(err)
	}
	return string(body)
}

func (c *process) leads() bool {
	return strings.Contains(c.get("/metrics"), "\nedge_tunnel_controller_leading 1\n")
}

func (c *process) ready() bool { return strings.HasSuffix(c.get("/readyz"), "\nready\n") }

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(90 * time.Second); !ok(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: did not happen", what)
		}
	}
}

// request is a request in PEM, for a key of its own.
func request(t *testing.T, cn, o string, dns ...string) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: cn, Organization: []string{o}}, DNSNames: dns,
	}, key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}

// ask has kubectl create a request with these credentials.
func ask(t *testing.T, s *kubebed.Server, config, name, signer string, request []byte, usages ...string) {
	t.Helper()
	text, err := json.Marshal(kubebed.Object{
		"apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest", "metadata": kubebed.Object{"name": name},
		"spec": kubebed.Object{"signerName": signer, "request": request, "usages": append([]string{"digital signature", "client auth"}, usages...)},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := s.KubectlCommand(ctx, "--kubeconfig", config, "create", "-f", "-")
	cmd.Stdin = bytes.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("create %s: %v: %s", name, err, out)
	}
}

type csr struct {
	Status struct {
		Certificate []byte
		Conditions  []struct{ Type, Reason, Message string }
	}
}

func (c csr) decided() bool {
	return len(c.Status.Certificate) > 0 || slices.ContainsFunc(c.Status.Conditions, func(x struct{ Type, Reason, Message string }) bool { return x.Type != "Approved" })
}

func read(t *testing.T, s *kubebed.Server, name string) (c csr) {
	t.Helper()
	if err := s.Do(http.MethodGet, csrs+"/"+name, nil, &c); err != nil {
		t.Fatal(err)
	}
	return c
}

func decided(t *testing.T, s *kubebed.Server, name string) (c csr) {
	t.Helper()
	eventually(t, name+" decided", func() bool {
		c = read(t, s, name)
		return c.decided()
	})
	return c
}

// signed is the certificate, which the published bundle has to believe.
func signed(t *testing.T, s *kubebed.Server, name string) *x509.Certificate {
	t.Helper()
	c := decided(t, s, name)
	block, _ := pem.Decode(c.Status.Certificate)
	if block == nil {
		t.Fatalf("%s: %+v", name, c)
	}
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(bundle(t, s)))
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		t.Errorf("%s: %v", name, err)
	}
	return leaf
}

func bundle(t *testing.T, s *kubebed.Server) string {
	t.Helper()
	var trust struct{ Data map[string]string }
	if err := s.Do(http.MethodGet, "/api/v1/namespaces/kube-system/configmaps/edge-tunnel-ca", nil, &trust); err != nil {
		t.Fatal(err)
	}
	return trust.Data["ca.crt"]
}

const (
	agents  = "edge-tunnel:agents"
	servers = "edge-tunnel:servers"
)

// askers lets everybody who is authenticated create requests: whether they get anything is the controller's business.
func askers(s *kubebed.Server) {
	s.Apply(`{"apiVersion": "v1", "kind": "List", "items": [
		{"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "askers"},
			"rules": [{"apiGroups": ["certificates.k8s.io"], "resources": ["certificatesigningrequests"], "verbs": ["create"]}]},
		{"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "askers"},
			"roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "askers"},
			"subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "Group", "name": "system:authenticated"}]}]}`)
}

func TestController(t *testing.T) {
	s := bed(t)
	askers(s)
	agent1, server := s.PodToken(namespace, "tunnel-agent", "edge-1"), s.PodToken(namespace, "tunnel-server", "cloud-1")
	s.PodToken(namespace, "tunnel-agent", "edge-2")
	c := start(t, s)
	eventually(t, "ready", c.ready)

	ask(t, s, agent1, "agent", "edge-tunnel.io/agent", request(t, "edge-1", agents))
	ask(t, s, s.Kubeconfig("system:node:edge-2", "system:nodes"), "kubelet", "edge-tunnel.io/agent", request(t, "edge-2", agents))
	ask(t, s, server, "server", "edge-tunnel.io/server", request(t, "cloud-1", servers, "tunnel.example.org"), "server auth")
	for name, cn := range map[string]string{"agent": "edge-1", "kubelet": "edge-2", "server": "cloud-1"} {
		if leaf := signed(t, s, name); leaf.Subject.CommonName != cn {
			t.Errorf("%s: %v", name, leaf.Subject)
		}
	}

	ask(t, s, agent1, "other-node", "edge-tunnel.io/agent", request(t, "edge-2", agents))
	ask(t, s, s.PodToken(namespace, "default", "edge-1"), "other-account", "edge-tunnel.io/agent", request(t, "edge-1", agents))
	ask(t, s, s.ServiceAccount(namespace, "tunnel-agent"), "unbound", "edge-tunnel.io/agent", request(t, "edge-1", agents))
	ask(t, s, agent1, "as-server", "edge-tunnel.io/server", request(t, "edge-1", servers, "tunnel.example.org"), "server auth")
	ask(t, s, server, "extra", "edge-tunnel.io/server", request(t, "cloud-1", servers, "tunnel.example.org", "kubernetes.default"), "server auth")
	ask(t, s, agent1, "usages", "edge-tunnel.io/agent", request(t, "edge-1", agents), "server auth")
	twice := request(t, "edge-1", agents)
	ask(t, s, agent1, "once", "edge-tunnel.io/agent", twice)
	signed(t, s, "once")
	ask(t, s, agent1, "twice", "edge-tunnel.io/agent", twice)
	for name, reason := range map[string]string{
		"other-node": "wrong_node", "other-account": "wrong_account", "unbound": "no_node", "as-server": "wrong_account", "extra": "extra_names",
		"usages": "wrong_usages", "twice": "replayed",
	} {
		got := decided(t, s, name)
		if len(got.Status.Conditions) != 1 || got.Status.Conditions[0].Type != "Denied" || got.Status.Conditions[0].Reason != reason || got.Status.Conditions[0].Message == "" {
			t.Errorf("%s: %+v, want %s", name, got.Status, reason)
		}
	}
	// kubectl shows it.
	if out, err := s.Kubectl("get", "csr", "other-node"); err != nil || !strings.Contains(out, "Denied") {
		t.Errorf("%q, %v", out, err)
	}

	// None of the cluster's signers is ours to use.
	for signer, want := range map[string]bool{"edge-tunnel.io/agent": true, "kubernetes.io/kube-apiserver-client": false, "kubernetes.io/kubelet-serving": false} {
		for _, verb := range []string{"approve", "sign"} {
			var review struct{ Status struct{ Allowed bool } }
			err := s.Do(http.MethodPost, "/apis/authorization.k8s.io/v1/subjectaccessreviews", kubebed.Object{"spec": kubebed.Object{
				"user":               "system:serviceaccount:kube-system:tunnel-controller",
				"resourceAttributes": kubebed.Object{"group": "certificates.k8s.io", "resource": "signers", "name": signer, "verb": verb},
			}}, &review)
			if err != nil || review.Status.Allowed != want {
				t.Errorf("may %s for %s: %v, %v", verb, signer, review.Status.Allowed, err)
			}
		}
	}

	// Node gone: no certificate any more. Its kubelet's credential lives on.
	if err := s.Do(http.MethodDelete, "/api/v1/nodes/edge-2", nil, nil); err != nil {
		t.Fatal(err)
	}
	ask(t, s, s.Kubeconfig("system:node:edge-2", "system:nodes"), "gone", "edge-tunnel.io/agent", request(t, "edge-2", agents))
	if got := decided(t, s, "gone"); got.Status.Conditions[0].Reason != "unknown_node" {
		t.Errorf("%+v", got.Status)
	}

	// Somebody changes the bundle; the API server goes away and comes back. The controller sees to both, in the same process.
	before := bundle(t, s)
	s.Kill()
	eventually(t, "leadership lost", func() bool { return !c.leads() && strings.Contains(c.get("/readyz"), "[-]leader") })
	s.Start()
	if err := s.Do(http.MethodPatch, "/api/v1/namespaces/kube-system/configmaps/edge-tunnel-ca", kubebed.Object{"data": kubebed.Object{"ca.crt": "x"}}, nil); err != nil {
		t.Fatal(err)
	}
	eventually(t, "leads again", c.leads)
	eventually(t, "bundle put right", func() bool { return bundle(t, s) == before })
	ask(t, s, agent1, "after", "edge-tunnel.io/agent", request(t, "edge-1", agents))
	signed(t, s, "after")

	// A second one waits, and takes over at once when the first one is asked to end.
	second := start(t, s)
	eventually(t, "second ready", second.ready)
	if second.leads() {
		t.Error("two lead")
	}
	begin := time.Now()
	c.stop()
	eventually(t, "taken over", second.leads)
	t.Logf("taken over after %v", time.Since(begin).Round(time.Millisecond))
	eventually(t, "ready", second.ready)
	ask(t, s, agent1, "again", "edge-tunnel.io/agent", twice)
	if got := decided(t, s, "again"); got.Status.Conditions[0].Reason != "replayed" {
		t.Errorf("%+v", got.Status)
	}
	if bundle(t, s) != before {
		t.Error("another CA")
	}
	second.stop()
}

// TestRights takes each right away in turn: without it something must not work, and the controller must say which verb on which resource
// it lacks. With all of them everything works, see above.
func TestRights(t *testing.T) {
	s := bed(t)
	askers(s)
	agent1, server := s.PodToken(namespace, "tunnel-agent", "edge-1"), s.PodToken(namespace, "tunnel-server", "cloud-1")
	n := 0
	eachRight(t, s, func(r right) bool {
		return !ofRecords(r) && !ofStatus(r) && r.resource != "pods" // for API servers before 1.30, which this one is not
	}, func(t *testing.T, verb, resource string, env []string, back func()) {
		n++
		fresh(t, s)
		c := startIn(t, s, env, "--dns-configmap", "", "--node-status=false")
		ask(t, s, agent1, fmt.Sprintf("agent-%d", n), "edge-tunnel.io/agent", request(t, "edge-1", agents))
		ask(t, s, server, fmt.Sprintf("server-%d", n), "edge-tunnel.io/server", request(t, "cloud-1", servers, "tunnel.example.org"), "server auth")
		// The API server's own words, in /readyz.
		want := cannot(verb, resource)
		switch {
		case resource == "signers":
			want = regexp.MustCompile(`\[-\]certificates: .*not permitted to ` + verb + ` requests with signerName`)
		case verb == "watch":
			// Without it the list is all that there is: what comes later is not seen.
			want = regexp.MustCompile(`\[-\]certificates: .*cannot watch resource`)
		}
		eventually(t, "says which right is missing", func() bool { return want.MatchString(c.get("/readyz")) })
		back()
		signed(t, s, fmt.Sprintf("agent-%d", n))
		signed(t, s, fmt.Sprintf("server-%d", n))
		c.stop()
	})
	if n < 14 {
		t.Errorf("only %d rights", n)
	}
}

// cannot is how the API server says that a right is missing.
func cannot(verb, resource string) *regexp.Regexp {
	return regexp.MustCompile(`cannot ` + verb + ` resource \\*"` + regexp.QuoteMeta(resource) + `\\*"`)
}

// right is one that a role gives.
type right struct {
	verb, resource string
	names          []string
	role           string
}

// eachRight runs a test for each of some rights, without it. Back gives it back. They are those of the controller, if no roles are named.
func eachRight(t *testing.T, s *kubebed.Server, of func(right) bool, test func(t *testing.T, verb, resource string, env []string, back func()), roles ...string) {
	t.Helper()
	if len(roles) == 0 {
		roles = []string{role, bigRole, leaseRole, eventRole}
	}
	type rules struct {
		Rules []struct {
			APIGroups     []string `json:"apiGroups"`
			Resources     []string `json:"resources"`
			ResourceNames []string `json:"resourceNames,omitempty"`
			Verbs         []string `json:"verbs"`
		} `json:"rules"`
	}
	for _, path := range roles {
		var whole rules
		if err := s.Do(http.MethodGet, path, nil, &whole); err != nil {
			t.Fatal(err)
		}
		for i, r := range whole.Rules {
			for _, verb := range r.Verbs {
				resource := r.Resources[0]
				if !of(right{verb, resource, r.ResourceNames, path}) {
					continue
				}
				t.Run(verb+" "+resource, func(t *testing.T) {
					less := rules{Rules: slices.Clone(whole.Rules)}
					less.Rules[i].Verbs = slices.DeleteFunc(slices.Clone(r.Verbs), func(v string) bool { return v == verb })
					if len(less.Rules[i].Verbs) == 0 {
						less.Rules = slices.Delete(less.Rules, i, i+1)
					}
					put := func(r rules) {
						if err := s.Do(http.MethodPatch, path, r, nil); err != nil {
							t.Fatal(err)
						}
					}
					put(less)
					t.Cleanup(func() { put(whole) })
					var env []string
					if verb == "list" {
						// Newer API servers stream the list through the watch, which older ones cannot.
						env = append(env, "KUBE_FEATURE_WatchListClient=false")
					}
					test(t, verb, resource, env, func() { put(whole) })
				})
			}
		}
	}
}

// fresh takes away what a controller has made, so that the next needs the right to make it.
func fresh(t *testing.T, s *kubebed.Server) {
	t.Helper()
	err := s.Do(http.MethodDelete, "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases/edge-tunnel-controller", nil, nil)
	if status := (*kubebed.StatusError)(nil); err != nil && !(errors.As(err, &status) && status.Code == http.StatusNotFound) {
		t.Fatal(err)
	}
	for _, path := range []string{"secrets", "configmaps"} {
		if err := s.Do(http.MethodPatch, "/api/v1/namespaces/kube-system/"+path+"/edge-tunnel-ca", kubebed.Object{"data": nil}, nil); err != nil {
			t.Fatal(err)
		}
	}
}
