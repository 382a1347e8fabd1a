// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	certsv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/edge-tunnel/edge-tunnel/pkg/identity"
)

const (
	ns       = "edge"
	agentSA  = "system:serviceaccount:edge:agent"
	serverSA = "system:serviceaccount:edge:server"
)

// cluster is what the signer needs to be there.
func cluster(more ...runtime.Object) *fake.Clientset {
	meta := func(name string) metav1.ObjectMeta {
		return metav1.ObjectMeta{Namespace: ns, Name: name, UID: types.UID("uid-" + name)}
	}
	node := func(name string, addrs ...corev1.NodeAddress) *corev1.Node {
		return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID("uid-" + name)}, Status: corev1.NodeStatus{Addresses: addrs}}
	}
	return fake.NewClientset(append([]runtime.Object{
		&corev1.Secret{ObjectMeta: meta("ca")},
		&corev1.ConfigMap{ObjectMeta: meta("trust")},
		&corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "svc", Annotations: map[string]string{AnnotationExternalAddr: "tunnel.example.org:10262"}},
			Spec:       corev1.ServiceSpec{ClusterIPs: []string{"10.96.0.5"}},
			Status:     corev1.ServiceStatus{LoadBalancer: corev1.LoadBalancerStatus{Ingress: []corev1.LoadBalancerIngress{{IP: "203.0.113.7"}, {Hostname: "LB.example.org"}}}},
		},
		node("edge-1", corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: "10.99.1.10"}),
		node("edge-2"),
		node("cloud-1", corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: "10.99.0.1"}, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: "fd00::1"},
			corev1.NodeAddress{Type: corev1.NodeExternalIP, Address: "198.51.100.1"}, corev1.NodeAddress{Type: corev1.NodeHostName, Address: "kubernetes.default"}),
		&corev1.Pod{ObjectMeta: meta("agent-x"), Spec: corev1.PodSpec{NodeName: "edge-1", ServiceAccountName: "agent"}},
		&corev1.Pod{ObjectMeta: meta("other"), Spec: corev1.PodSpec{NodeName: "edge-1", ServiceAccountName: "default"}},
		&corev1.Pod{ObjectMeta: meta("pending"), Spec: corev1.PodSpec{ServiceAccountName: "agent"}},
	}, more...)...)
}

type ask struct {
	signer, user string
	groups       []string
	extra        map[string]certsv1.ExtraValue
	cn, o        string
	hosts        []string
	usages       []certsv1.KeyUsage
	request      []byte // in place of one of a new key
	seconds      int32
	approved     string
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func requestPEM(t testing.TB, key any, cn, o string, hosts ...string) []byte {
	t.Helper()
	tmpl := &x509.CertificateRequest{Subject: pkix.Name{CommonName: cn, Organization: []string{o}}}
	for _, h := range hosts {
		if ip := net.ParseIP(h); ip != nil {
			tmpl.IPAddresses = append(tmpl.IPAddresses, ip)
		} else {
			tmpl.DNSNames = append(tmpl.DNSNames, h)
		}
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, tmpl, key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}

func agentOn(node string) ask {
	return ask{
		signer: identity.SignerAgent, user: agentSA, cn: node, o: string(identity.RoleAgent),
		extra:  map[string]certsv1.ExtraValue{"authentication.kubernetes.io/node-name": {node}},
		usages: []certsv1.KeyUsage{certsv1.UsageDigitalSignature, certsv1.UsageClientAuth},
	}
}

func serverOn(node string, hosts ...string) ask {
	return ask{
		signer: identity.SignerServer, user: serverSA, cn: node, o: string(identity.RoleServer), hosts: hosts,
		extra:  map[string]certsv1.ExtraValue{"authentication.kubernetes.io/node-name": {node}},
		usages: []certsv1.KeyUsage{certsv1.UsageDigitalSignature, certsv1.UsageClientAuth, certsv1.UsageServerAuth},
	}
}

func (a ask) but(edit func(*ask)) ask {
	edit(&a)
	return a
}

func (a ask) object(t testing.TB, name string) *certsv1.CertificateSigningRequest {
	t.Helper()
	if a.request == nil {
		a.request = requestPEM(t, newKey(t), a.cn, a.o, a.hosts...)
	}
	csr := &certsv1.CertificateSigningRequest{
		ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID("uid-" + name), CreationTimestamp: metav1.Now(), Labels: map[string]string{"kept": "yes"}},
		Spec: certsv1.CertificateSigningRequestSpec{
			Request: a.request, SignerName: a.signer, Username: a.user, Groups: a.groups, Extra: a.extra, Usages: a.usages,
		},
	}
	if a.seconds > 0 {
		csr.Spec.ExpirationSeconds = &a.seconds
	}
	if a.approved != "" {
		csr.Status.Conditions = []certsv1.CertificateSigningRequestCondition{{Type: certsv1.CertificateApproved, Status: corev1.ConditionTrue, Reason: a.approved}}
	}
	return csr
}

func signerConfig(client *fake.Clientset) SignerConfig {
	return SignerConfig{Client: client, Namespace: ns, Secret: "ca", Trust: "trust", Service: "svc", Agent: "agent", Server: "server"}
}

// startSigner runs a signer until the test ends.
func startSigner(t *testing.T, c SignerConfig, edit ...func(*Signer)) *Signer {
	t.Helper()
	s, err := NewSigner(c)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range edit {
		f(s)
	}
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := s.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		stop()
		wg.Wait()
	})
	return s
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for range 12000 { // after an outage an informer tries again within half of it
		if ok() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("%s: did not happen", what)
}

func get(t testing.TB, client *fake.Clientset, name string) *certsv1.CertificateSigningRequest {
	t.Helper()
	csr, err := client.CertificatesV1().CertificateSigningRequests().Get(context.Background(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return csr
}

func create(t testing.TB, client *fake.Clientset, csr *certsv1.CertificateSigningRequest) {
	t.Helper()
	if _, err := client.CertificatesV1().CertificateSigningRequests().Create(context.Background(), csr, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

func decided(t testing.TB, client *fake.Clientset, name string) *certsv1.CertificateSigningRequest {
	t.Helper()
	var csr *certsv1.CertificateSigningRequest
	eventually(t, name+" decided", func() bool {
		csr = get(t, client, name)
		return finished(csr)
	})
	return csr
}

// trusted is the certificate of a request, believed by the published bundle.
func trusted(t testing.TB, client *fake.Clientset, csr *certsv1.CertificateSigningRequest) *x509.Certificate {
	t.Helper()
	trust, err := client.CoreV1().ConfigMaps(ns).Get(context.Background(), "trust", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(trust.Data["ca.crt"]))
	block, _ := pem.Decode(csr.Status.Certificate)
	if block == nil {
		t.Fatalf("%s has no certificate: %+v", csr.Name, csr.Status)
	}
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		t.Error(err)
	}
	return leaf
}

func TestSignerGrants(t *testing.T) {
	client := cluster()
	s := startSigner(t, signerConfig(client))
	all := []string{"10.96.0.5", "10.99.0.1", "198.51.100.1", "203.0.113.7", "fd00::1", "lb.example.org", "tunnel.example.org"}
	asks := map[string]ask{
		"token": agentOn("edge-1"),
		"uid": agentOn("edge-1").but(func(a *ask) {
			a.extra = map[string]certsv1.ExtraValue{"authentication.kubernetes.io/node-name": {"edge-1"}, "authentication.kubernetes.io/node-uid": {"uid-edge-1"}}
		}),
		"old-token": agentOn("edge-1").but(func(a *ask) {
			a.extra = map[string]certsv1.ExtraValue{"authentication.kubernetes.io/pod-name": {"agent-x"}, "authentication.kubernetes.io/pod-uid": {"uid-agent-x"}}
		}),
		"kubelet":  agentOn("edge-2").but(func(a *ask) { a.user, a.groups, a.extra = "system:node:edge-2", []string{"system:nodes"}, nil }),
		"server":   serverOn("cloud-1", all...),
		"few":      serverOn("cloud-1", "10.99.0.1"),
		"approved": agentOn("edge-1").but(func(a *ask) { a.approved = "by hand" }),
		"short":    agentOn("edge-1").but(func(a *ask) { a.seconds = 600 }),
	}
	for name, a := range asks {
		create(t, client, a.object(t, name))
	}
	for name, a := range asks {
		csr := decided(t, client, name)
		leaf := trusted(t, client, csr)
		if leaf.Subject.CommonName != a.cn || leaf.Subject.Organization[0] != a.o || len(leaf.DNSNames)+len(leaf.IPAddresses) != len(a.hosts) {
			t.Errorf("%s: %v, %v, %v", name, leaf.Subject, leaf.DNSNames, leaf.IPAddresses)
		}
		want := 30 * 24 * time.Hour
		if a.seconds > 0 {
			want = time.Duration(a.seconds) * time.Second
		}
		if left := time.Until(leaf.NotAfter); left > want || left < want-time.Minute {
			t.Errorf("%s ends in %v", name, left)
		}
		if c := csr.Status.Conditions; len(c) != 1 || c[0].Type != certsv1.CertificateApproved || c[0].Message == "" && a.approved == "" || csr.Labels["kept"] == "" {
			t.Errorf("%s: %+v", name, csr)
		}
	}
	eventually(t, "counted", func() bool {
		return s.Stats().Signed[identity.SignerAgent]+s.Stats().Signed[identity.SignerServer] == 8
	})
	st := s.Stats()
	if st.Signed[identity.SignerAgent] != 6 || st.Signed[identity.SignerServer] != 2 || st.Error != "" || len(st.CAs) != 1 || st.Signer.Subject == "" || !st.Running {
		t.Errorf("%+v", st)
	}
}

func TestSignerDenies(t *testing.T) {
	client := cluster()
	s := startSigner(t, signerConfig(client), func(s *Signer) { s.burst = 100 })
	pod := func(name, uid string) func(*ask) {
		return func(a *ask) {
			a.extra = map[string]certsv1.ExtraValue{"authentication.kubernetes.io/pod-name": {name}, "authentication.kubernetes.io/pod-uid": {uid}}
		}
	}
	denied := map[string]struct {
		ask    ask
		reason string
	}{
		"another-node":    {agentOn("edge-1").but(func(a *ask) { a.cn = "edge-2" }), identity.DenyWrongNode},
		"another-account": {agentOn("edge-1").but(func(a *ask) { a.user = "system:serviceaccount:edge:default" }), identity.DenyWrongAccount},
		"another-ns":      {agentOn("edge-1").but(func(a *ask) { a.user = "system:serviceaccount:default:agent" }), identity.DenyWrongAccount},
		"agent-as-server": {serverOn("edge-1", "10.99.1.10").but(func(a *ask) { a.user = agentSA }), identity.DenyWrongAccount},
		"kubelet-server": {serverOn("edge-1", "10.99.1.10").but(func(a *ask) {
			a.user, a.groups, a.extra = "system:node:edge-1", []string{"system:nodes"}, nil
		}), identity.DenyWrongAccount},
		"servers-o":    {agentOn("edge-1").but(func(a *ask) { a.o = string(identity.RoleServer) }), identity.DenyWrongSubject},
		"masters":      {agentOn("edge-1").but(func(a *ask) { a.o = "system:masters" }), identity.DenyWrongSubject},
		"usages":       {agentOn("edge-1").but(func(a *ask) { a.usages = append(a.usages, certsv1.UsageServerAuth) }), identity.DenyWrongUsages},
		"agent-names":  {agentOn("edge-1").but(func(a *ask) { a.hosts = []string{"10.99.1.10"} }), identity.DenyExtraNames},
		"server-names": {serverOn("cloud-1", "10.99.0.1", "kubernetes.default"), identity.DenyExtraNames},
		"server-none":  {serverOn("cloud-1"), identity.DenyNoNames},
		"no-node":      {agentOn("edge-1").but(func(a *ask) { a.extra = nil }), identity.DenyNoNode},
		"gone-node":    {agentOn("edge-9"), identity.DenyUnknownNode},
		"new-node": {agentOn("edge-1").but(func(a *ask) {
			a.extra = map[string]certsv1.ExtraValue{"authentication.kubernetes.io/node-name": {"edge-1"}, "authentication.kubernetes.io/node-uid": {"uid-before"}}
		}), identity.DenyUnknownNode},
		"gone-pod":    {agentOn("edge-1").but(pod("gone", "x")), identity.DenyNoNode},
		"new-pod":     {agentOn("edge-1").but(pod("agent-x", "x")), identity.DenyNoNode},
		"other-pod":   {agentOn("edge-1").but(pod("other", "uid-other")), identity.DenyNoNode},
		"pending-pod": {agentOn("edge-1").but(pod("pending", "uid-pending")), identity.DenyNoNode},
		"garbage":     {agentOn("edge-1").but(func(a *ask) { a.request = []byte("hello") }), identity.DenyBadRequest},
		"huge":        {agentOn("edge-1").but(func(a *ask) { a.request = make([]byte, 1<<20) }), identity.DenyBadRequest},
	}
	for name, c := range denied {
		create(t, client, c.ask.object(t, name))
	}
	want := map[string]uint64{}
	for name, c := range denied {
		csr := decided(t, client, name)
		last := csr.Status.Conditions[len(csr.Status.Conditions)-1]
		if last.Type != certsv1.CertificateDenied || last.Reason != c.reason || last.Message == "" || len(csr.Status.Certificate) > 0 {
			t.Errorf("%s: %+v, want %s", name, csr.Status, c.reason)
		}
		want[c.reason]++
	}
	for _, reason := range identity.DenyReasons() {
		if _, ok := s.Stats().Denied[reason]; !ok {
			t.Errorf("%s is not counted", reason)
		}
		eventually(t, reason+" counted", func() bool { return s.Stats().Denied[reason] == want[reason] }) // just after it is written down
	}

	// Somebody else's approval does not make us sign.
	create(t, client, agentOn("edge-1").but(func(a *ask) { a.cn, a.approved = "edge-2", "by hand" }).object(t, "forced"))
	csr := decided(t, client, "forced")
	if last := csr.Status.Conditions[1]; last.Type != certsv1.CertificateFailed || last.Reason != identity.DenyWrongNode || len(csr.Status.Certificate) > 0 {
		t.Errorf("%+v", csr.Status)
	}
	// Requests to others are none of our business.
	create(t, client, agentOn("edge-1").but(func(a *ask) { a.signer = "kubernetes.io/kube-apiserver-client" }).object(t, "foreign"))
	create(t, client, agentOn("edge-1").object(t, "after"))
	decided(t, client, "after")
	if csr := get(t, client, "foreign"); len(csr.Status.Conditions) > 0 {
		t.Errorf("%+v", csr.Status)
	}
}

func TestSignerReplays(t *testing.T) {
	client := cluster()
	startSigner(t, signerConfig(client))
	request := requestPEM(t, newKey(t), "edge-1", string(identity.RoleAgent))
	again := agentOn("edge-1").but(func(a *ask) { a.request = request })

	// Who replays it elsewhere first does not keep its owner from having it.
	create(t, client, agentOn("edge-2").but(func(a *ask) { a.request = request }).object(t, "stolen"))
	if c := decided(t, client, "stolen").Status.Conditions[0]; c.Reason != identity.DenyWrongNode {
		t.Errorf("%+v", c)
	}
	create(t, client, again.object(t, "first"))
	trusted(t, client, decided(t, client, "first"))
	create(t, client, again.object(t, "second"))
	if c := decided(t, client, "second").Status.Conditions[0]; c.Type != certsv1.CertificateDenied || c.Reason != identity.DenyReplayed {
		t.Errorf("%+v", c)
	}
	// The next leader knows it too.
	other := startSigner(t, signerConfig(client))
	eventually(t, "takes over", func() bool { return len(other.Stats().CAs) > 0 })
	create(t, client, again.object(t, "third"))
	if c := decided(t, client, "third").Status.Conditions[0]; c.Reason != identity.DenyReplayed {
		t.Errorf("%+v", c)
	}
	// A name that is used anew is another request.
	if err := client.CertificatesV1().CertificateSigningRequests().Delete(context.Background(), "second", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	renamed := agentOn("edge-1").object(t, "second")
	renamed.UID = "uid-anew"
	create(t, client, renamed)
	trusted(t, client, decided(t, client, "second"))
}

// TestSignerUnderFlood: one node asks for thousands; the others are served meanwhile, and few are decided at once.
func TestSignerUnderFlood(t *testing.T) {
	const flood, others = 150, 30
	var objects []runtime.Object
	for i := range others {
		objects = append(objects, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("node-%d", i)}})
	}
	client := cluster(objects...)
	var now, most atomic.Int64
	client.PrependReactor("get", "nodes", func(clienttesting.Action) (bool, runtime.Object, error) {
		n := now.Add(1)
		defer now.Add(-1)
		for {
			if old := most.Load(); n <= old || most.CompareAndSwap(old, n) {
				break
			}
		}
		time.Sleep(time.Millisecond)
		return false, nil, nil
	})
	key := newKey(t)
	request := requestPEM(t, key, "edge-1", string(identity.RoleAgent))
	for i := range flood {
		create(t, client, agentOn("edge-1").but(func(a *ask) { a.request = request }).object(t, fmt.Sprintf("flood-%d", i)))
	}
	for i := range others {
		create(t, client, agentOn(fmt.Sprintf("node-%d", i)).object(t, fmt.Sprintf("other-%d", i)))
	}
	s := startSigner(t, signerConfig(client))
	eventually(t, "all others signed", func() bool { return s.Stats().Signed[identity.SignerAgent] == others+1 })
	st := s.Stats()
	if n := st.Denied[identity.DenyReplayed]; n > 2*requesterBurst {
		t.Errorf("%d of one requester decided", n)
	}
	if m := most.Load(); m > signers || m == 0 {
		t.Errorf("%d at once", m)
	}
}

func TestSignerTriesAgain(t *testing.T) {
	client := cluster()
	var fail atomic.Int64
	fail.Store(3)
	for _, sub := range []string{"approval", "status"} {
		client.PrependReactor("update", "certificatesigningrequests/"+sub, func(a clienttesting.Action) (bool, runtime.Object, error) {
			if fail.Add(-1) < 0 {
				return false, nil, nil
			}
			if fail.Load()%2 == 0 {
				return true, nil, apierrors.NewConflict(a.GetResource().GroupResource(), "x", errors.New("changed"))
			}
			return true, nil, apierrors.NewForbidden(a.GetResource().GroupResource(), "x", errors.New("cannot update "+sub))
		})
	}
	s := startSigner(t, signerConfig(client))
	create(t, client, agentOn("edge-1").object(t, "a"))
	eventually(t, "says why", func() bool { return strings.Contains(s.Stats().Error, "cannot update") })
	trusted(t, client, decided(t, client, "a"))
	if s.Stats().Failed == 0 {
		t.Error("not counted")
	}
}

func TestSignerWithoutRights(t *testing.T) {
	client := cluster()
	client.PrependReactor("list", "certificatesigningrequests", func(a clienttesting.Action) (bool, runtime.Object, error) {
		return true, nil, apierrors.NewForbidden(a.GetResource().GroupResource(), "", errors.New(`cannot list resource "certificatesigningrequests"`))
	})
	s := startSigner(t, signerConfig(client))
	eventually(t, "says which", func() bool {
		return strings.Contains(s.Stats().Error, `cannot list resource "certificatesigningrequests"`)
	})
}

func TestSignerWithWrongClock(t *testing.T) {
	client := cluster()
	var ahead atomic.Int64
	ahead.Store(int64(-time.Hour))
	c := signerConfig(client)
	c.Skew = func() time.Duration { return time.Duration(ahead.Load()) }
	s := startSigner(t, c)
	create(t, client, agentOn("edge-1").object(t, "a"))
	eventually(t, "says so", func() bool { return strings.Contains(s.Stats().Error, "clock is -1h0m0s off") })
	if secret, err := client.CoreV1().Secrets(ns).Get(context.Background(), "ca", metav1.GetOptions{}); err != nil || len(secret.Data) > 0 {
		t.Errorf("a CA was made by a wrong clock: %v, %v", secret.Data, err)
	}
	ahead.Store(int64(10 * time.Minute))
	trusted(t, client, decided(t, client, "a"))
}

func TestSlim(t *testing.T) {
	twice := func(csr *certsv1.CertificateSigningRequest) *certsv1.CertificateSigningRequest {
		t.Helper()
		before := csr.DeepCopy()
		var obj any = csr
		for range 2 {
			var err error
			if obj, err = slim(obj); err != nil {
				t.Fatal(err)
			}
		}
		if !reflect.DeepEqual(csr, before) {
			t.Error("changes what is not its own")
		}
		return obj.(*certsv1.CertificateSigningRequest)
	}
	pending := agentOn("edge-1").object(t, "a")
	pending.Annotations = map[string]string{keyAnnotation: "forged"}
	key := requestedKey(pending)
	if got := twice(pending); keyOf(got) != key || len(key) != 64 || got.Labels["kept"] == "" {
		t.Errorf("%+v", got)
	}
	pending.Annotations["big"] = strings.Repeat("x", 5000)
	if got := twice(pending); got.Annotations != nil || keyOf(got) != key {
		t.Errorf("%+v", got)
	}
	pending.Status.Certificate = make([]byte, 2000)
	if got := twice(pending); keyOf(got) != key || len(got.Spec.Request)+len(got.Status.Certificate) > 1 || !finished(got) {
		t.Errorf("%+v", got)
	}
	big := agentOn("edge-1").but(func(a *ask) { a.request = make([]byte, 1<<20) }).object(t, "b")
	if got := twice(big); len(got.Spec.Request) != maxRequest {
		t.Errorf("%d bytes", len(got.Spec.Request))
	}
	if got, err := slim("other"); got != "other" || err != nil {
		t.Errorf("%v, %v", got, err)
	}
}

func TestSignerConfig(t *testing.T) {
	if err := (SignerConfig{}).Validate(); err == nil || !strings.Contains(err.Error(), "Client is not set") {
		t.Errorf("got %v", err)
	}
	c := signerConfig(cluster())
	c.Server = c.Agent
	c.CA.LeafValidity = time.Second
	if _, err := NewSigner(c); err == nil || !strings.Contains(err.Error(), "share") || !strings.Contains(err.Error(), "validity") {
		t.Errorf("got %v", err)
	}
}

func TestServerHosts(t *testing.T) {
	node := &corev1.Node{}
	if got := ServerHosts(nil, node); len(got) > 0 {
		t.Errorf("%q", got)
	}
	node.Status.Addresses = []corev1.NodeAddress{
		{Type: corev1.NodeInternalIP, Address: "127.0.0.1"}, {Type: corev1.NodeInternalIP, Address: "garbage"}, {Type: corev1.NodeInternalIP, Address: "10.0.0.1"},
		{Type: corev1.NodeInternalDNS, Address: "kubernetes.default.svc"},
	}
	for annotation, want := range map[string]string{
		"": "10.0.0.1", "a.example.org:10262": "10.0.0.1 a.example.org", "[fd00::9]:1": "10.0.0.1 fd00::9", "192.0.2.9": "10.0.0.1 192.0.2.9", "bad name:1": "10.0.0.1",
	} {
		service := &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{AnnotationExternalAddr: annotation}}, Spec: corev1.ServiceSpec{ClusterIPs: []string{"None"}},
		}
		if got := strings.Join(ServerHosts(service, node), " "); got != want {
			t.Errorf("%q: %q, want %q", annotation, got, want)
		}
	}
}
