// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"context"
	"crypto/tls"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
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

// asking has the fake API server add who asks, and a name, as the real one does.
func asking(client *fake.Clientset, who func(signer string) ask) {
	var mu sync.Mutex
	n := 0
	client.PrependReactor("create", "certificatesigningrequests", func(a clienttesting.Action) (bool, runtime.Object, error) {
		mu.Lock()
		defer mu.Unlock()
		csr := a.(clienttesting.CreateAction).GetObject().(*certsv1.CertificateSigningRequest)
		n++
		csr.Name, csr.CreationTimestamp = "csr-"+string(rune('a'+n)), metav1.Now()
		csr.UID = types.UID("uid-" + csr.Name)
		w := who(csr.Spec.SignerName)
		csr.Spec.Username, csr.Spec.Groups, csr.Spec.Extra = w.user, w.groups, w.extra
		return false, nil, nil
	})
}

type kepts struct {
	*Certificate
	mu        sync.Mutex
	presented []tls.Certificate
}

func (k *kepts) last() *tls.Certificate {
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.presented) == 0 {
		return nil
	}
	return &k.presented[len(k.presented)-1]
}

func newCertificate(t *testing.T, client *fake.Clientset, role identity.Role, node, dir string) *kepts {
	t.Helper()
	k := &kepts{}
	var err error
	k.Certificate, err = NewCertificate(CertificateConfig{
		Client: client, Role: role, Node: node, Dir: dir, Namespace: ns, Service: "svc",
		Present: func(cert, key []byte) error {
			pair, err := tls.X509KeyPair(cert, key)
			if err != nil {
				return err
			}
			k.mu.Lock()
			defer k.mu.Unlock()
			k.presented = append(k.presented, pair)
			return nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	k.retry, k.poll, k.look = 10*time.Millisecond, 10*time.Millisecond, 20*time.Millisecond
	return k
}

func (k *kepts) start(t *testing.T) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := k.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	stop = func() {
		cancel()
		wg.Wait()
	}
	t.Cleanup(stop)
	return stop
}

func TestCertificateOfAgent(t *testing.T) {
	client := cluster()
	asking(client, func(string) ask { return agentOn("edge-1") })
	startSigner(t, signerConfig(client))
	dir := filepath.Join(t.TempDir(), "made")
	k := newCertificate(t, client, identity.RoleAgent, "edge-1", dir)
	stop := k.start(t)
	eventually(t, "issued", func() bool { return k.last() != nil })
	if leaf := k.last().Leaf; leaf.Subject.CommonName != "edge-1" || leaf.Subject.Organization[0] != string(identity.RoleAgent) {
		t.Errorf("%v", leaf.Subject)
	}
	st := k.Stats()
	if st.Asked != 1 || st.Issued != 1 || st.Error != "" || st.Disk != "" || time.Until(st.Due) < 20*24*time.Hour || time.Until(st.Due) > 28*24*time.Hour {
		t.Errorf("%+v", st)
	}
	info, err := os.Stat(CertificateFile(dir))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	stop()

	// It is there again at the next start: nobody is asked.
	down := fake.NewClientset()
	again := newCertificate(t, down, identity.RoleAgent, "edge-1", dir)
	if !again.Stats().Due.Equal(again.due) || again.leaf == nil {
		t.Error("forgotten")
	}
	again.start(t)
	time.Sleep(100 * time.Millisecond)
	if n := len(down.Actions()); n > 0 {
		t.Errorf("%d requests", n)
	}
	// What its own bundle does not believe is replaced, once: it may be the bundle that is wrong.
	stale := newCertificate(t, client, identity.RoleAgent, "edge-1", dir)
	stale.c.Believed, stale.doubt = func() bool { return false }, time.Hour
	stop = stale.start(t)
	eventually(t, "issued anew", func() bool { return stale.last() != nil })
	time.Sleep(100 * time.Millisecond)
	stop()
	if st := stale.Stats(); st.Asked != 1 || st.Issued != 1 {
		t.Errorf("%+v", st)
	}
	// What is another node's, or nothing, is not used.
	if other := newCertificate(t, down, identity.RoleAgent, "edge-2", dir); other.leaf != nil {
		t.Error("another node's is used")
	}
	if err := os.WriteFile(CertificateFile(dir), []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	if bad := newCertificate(t, down, identity.RoleAgent, "edge-1", dir); bad.leaf != nil {
		t.Error("garbage is used")
	}
	// Renewed when it is due.
	due := newCertificate(t, client, identity.RoleAgent, "edge-1", t.TempDir())
	due.use(k.last().Leaf)
	due.due = time.Now().Add(-time.Second)
	due.start(t)
	eventually(t, "renewed", func() bool { return due.last() != nil })
}

func TestCertificateOfServerFollowsItsNames(t *testing.T) {
	client := cluster()
	asking(client, func(string) ask { return serverOn("cloud-1") })
	startSigner(t, signerConfig(client))
	k := newCertificate(t, client, identity.RoleServer, "cloud-1", t.TempDir())
	k.start(t)
	eventually(t, "issued", func() bool { return k.last() != nil })
	service, err := client.CoreV1().Services(ns).Get(context.Background(), "svc", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	service.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "203.0.113.99"}}
	if _, err := client.CoreV1().Services(ns).Update(context.Background(), service, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "reissued", func() bool {
		hosts := hostsOf(k.last().Leaf)
		return slices.Contains(hosts, "203.0.113.99") && !slices.Contains(hosts, "203.0.113.7") && slices.Contains(hosts, "tunnel.example.org")
	})
	time.Sleep(100 * time.Millisecond)
	if st := k.Stats(); st.Issued != 2 {
		t.Errorf("%+v", st)
	}
}

func TestCertificateIsSaidToFail(t *testing.T) {
	client := cluster()
	forbidden, down := true, errors.New("connection refused")
	var mu sync.Mutex
	set := func(f bool, d error) {
		mu.Lock()
		defer mu.Unlock()
		forbidden, down = f, d
	}
	asking(client, func(string) ask { return agentOn("edge-2") }) // another node than the one that is asked for
	client.PrependReactor("create", "certificatesigningrequests", func(a clienttesting.Action) (bool, runtime.Object, error) {
		mu.Lock()
		defer mu.Unlock()
		switch {
		case down != nil:
			return true, nil, down
		case forbidden:
			return true, nil, apierrors.NewForbidden(a.GetResource().GroupResource(), "", errors.New(`cannot create resource "certificatesigningrequests"`))
		}
		return false, nil, nil
	})
	k := newCertificate(t, client, identity.RoleAgent, "edge-1", t.TempDir())
	k.start(t)
	says := func(text string) {
		t.Helper()
		eventually(t, "says "+text, func() bool { return strings.Contains(k.Stats().Error, text) })
	}
	says("connection refused")
	set(true, nil)
	says(`cannot create resource "certificatesigningrequests"`)
	set(false, nil)
	says("is not decided yet")
	startSigner(t, signerConfig(client))
	says("is Denied: wrong_node")
	if k.last() != nil || k.Stats().Failed == 0 {
		t.Errorf("%+v", k.Stats())
	}
}

// TestCertificateWithoutDisk: what cannot be kept is used all the same, and that is said.
func TestCertificateWithoutDisk(t *testing.T) {
	client := cluster()
	asking(client, func(string) ask { return agentOn("edge-1") })
	startSigner(t, signerConfig(client))
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	k := newCertificate(t, client, identity.RoleAgent, "edge-1", filepath.Join(file, "below"))
	k.start(t)
	eventually(t, "issued", func() bool { return k.last() != nil })
	if st := k.Stats(); !strings.Contains(st.Disk, "not a directory") || st.Error != "" {
		t.Errorf("%+v", st)
	}

	// A full device: nothing of the old one is lost.
	dir := t.TempDir()
	path := CertificateFile(dir)
	if err := keep(path, []byte("old")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/dev/full", path+".unfinished"); err != nil {
		t.Fatal(err)
	}
	if err := keep(path, []byte("new")); err == nil || !strings.Contains(err.Error(), "no space left") {
		t.Errorf("got %v", err)
	}
	if kept, err := os.ReadFile(path); string(kept) != "old" {
		t.Errorf("%q, %v", kept, err)
	}
	if err := keep(path, []byte("new")); err != nil {
		t.Error(err)
	}
}
