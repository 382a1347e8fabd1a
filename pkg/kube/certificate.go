// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	mathrand "math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	certsv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/util/certificate/csr"

	"github.com/edge-tunnel/edge-tunnel/pkg/identity"
)

// CertificateConfig is what a [Certificate] is kept with. Service and Namespace are for servers, Log is optional, the rest is required.
type CertificateConfig struct {
	Client kubernetes.Interface
	Role   identity.Role
	Node   string // whose certificate it is
	Dir    string // where it is kept, see CertificateFile

	Namespace, Service string // at which agents dial servers

	// Present puts a new certificate to use; it is told also what could not be written to Dir.
	Present func(cert, key []byte) error
	// Believed says whether our own CA bundle believes what is in use; nil: it does. It does not when the CA is another one, after Kubernetes was
	// installed anew, say.
	Believed func() bool
	Log      *slog.Logger
}

// CertificateFile is where a certificate is kept together with its key: one file is replaced at once.
func CertificateFile(dir string) string { return filepath.Join(dir, "current.pem") }

// Certificate asks the cluster for an agent's or a server's certificate and renews it. It uses client-go's way of asking, but not its
// certificate manager: that one drops a certificate that cannot be written to disk, and keeps its errors and its goroutines to itself.
type Certificate struct {
	c      CertificateConfig
	signer string
	log    *slog.Logger

	retry, poll, look time.Duration // shorter in tests
	doubt             time.Duration // so long a new one is used that is not believed: it may be the bundle that is wrong

	mu     sync.Mutex // guards what follows
	stats  CertificateStats
	leaf   *x509.Certificate // in use; nil if there is none
	due    time.Time         // when it is to be renewed
	issued time.Time         // when that was, if it was in this process
	hosts  []string          // a server's, when they were last looked up
	err    error
	stored error
}

// CertificateStats is a snapshot.
type CertificateStats struct {
	Asked  uint64    // requests made
	Issued uint64    // certificates received
	Failed uint64    // attempts that failed and are repeated
	Due    time.Time // when the certificate is renewed; zero if there is none
	Error  string    // why there is none, or no newer one
	Disk   string    // why the one in use could not be kept on disk
}

// NewCertificate looks at what is kept in the folder, which it makes; it does not talk to anybody before Run.
func NewCertificate(c CertificateConfig) (*Certificate, error) {
	k := &Certificate{c: c, log: c.Log, retry: 2 * time.Second, poll: time.Second, look: 15 * time.Second, doubt: 10 * time.Minute}
	switch c.Role {
	case identity.RoleAgent:
		k.signer = identity.SignerAgent
	case identity.RoleServer:
		k.signer = identity.SignerServer
	default:
		return nil, fmt.Errorf("certificate: unknown role %q", c.Role)
	}
	if err := identity.CheckName(c.Node); err != nil {
		return nil, fmt.Errorf("certificate: %w", err)
	}
	if k.log == nil {
		k.log = slog.New(slog.DiscardHandler)
	}
	// A folder that cannot be made is like a full disk: said, and survived.
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		k.stored = err
	}
	// Without one that is of use, one is asked for.
	kept, err := os.ReadFile(CertificateFile(c.Dir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		k.stored = err
	}
	if pair, err := tls.X509KeyPair(kept, kept); err == nil && pair.Leaf.Subject.CommonName == c.Node && time.Now().Before(pair.Leaf.NotAfter) {
		k.use(pair.Leaf)
	}
	return k, nil
}

// Stats returns a snapshot.
func (k *Certificate) Stats() CertificateStats {
	k.mu.Lock()
	defer k.mu.Unlock()
	out := k.stats
	out.Due = k.due
	if k.err != nil {
		out.Error = k.err.Error()
	}
	if k.stored != nil {
		out.Disk = k.stored.Error()
	}
	return out
}

// use says that leaf is in use. It is renewed when 10 to 30 % of its life are left, at different times everywhere.
func (k *Certificate) use(leaf *x509.Certificate) {
	k.mu.Lock()
	defer k.mu.Unlock()
	life := leaf.NotAfter.Sub(leaf.NotBefore)
	k.leaf, k.due = leaf, leaf.NotAfter.Add(-life/10-time.Duration(mathrand.Int64N(int64(life/5)+1)))
}

// Run keeps the certificate until ctx ends. That the API server is away, or denies a request, is said in Stats and tried again, at most
// once a minute.
func (k *Certificate) Run(ctx context.Context) error {
	pause := time.Duration(0)
	for {
		wanted, err := k.wanted(ctx)
		if err == nil && wanted {
			err = k.renew(ctx)
		}
		if ctx.Err() != nil {
			return nil
		}
		k.mu.Lock()
		if k.err = err; err != nil {
			k.stats.Failed++
		}
		k.mu.Unlock()
		wait := k.look
		if err != nil {
			pause = min(max(2*pause, k.retry), time.Minute)
			wait = pause/2 + mathrand.N(pause/2+1)
			k.log.Warn("no new certificate, will try again", "err", err, "in", wait.Round(time.Second))
		} else {
			pause = 0
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

// wanted says whether a certificate is to be asked for: there is none, it is due, it lacks a name, or is not believed.
func (k *Certificate) wanted(ctx context.Context) (bool, error) {
	var hosts []string
	if k.c.Role == identity.RoleServer {
		var err error
		if hosts, err = k.lookup(ctx); err != nil {
			return false, err
		}
		if len(hosts) == 0 {
			return false, fmt.Errorf("neither Service %s/%s nor Node %s has an address at which agents could dial this server", k.c.Namespace, k.c.Service, k.c.Node)
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.hosts = hosts
	if k.leaf == nil || time.Now().After(k.due) || !slices.Equal(hosts, hostsOf(k.leaf)) {
		return true, nil
	}
	if k.c.Believed == nil || k.c.Believed() || time.Since(k.issued) < k.doubt {
		return false, nil
	}
	k.log.Warn("the certificate is not believed by the CA bundle, another one is asked for", "issuer", k.leaf.Issuer.String())
	return true, nil
}

func hostsOf(leaf *x509.Certificate) []string {
	hosts := slices.Clone(leaf.DNSNames)
	for _, ip := range leaf.IPAddresses {
		hosts = append(hosts, ip.String())
	}
	slices.Sort(hosts)
	return hosts
}

// lookup asks by which names this server is dialed, in the same words as the signer will.
func (k *Certificate) lookup(ctx context.Context) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	node, err := k.c.Client.CoreV1().Nodes().Get(ctx, k.c.Node, metav1.GetOptions{})
	if err != nil {
		return nil, fmt.Errorf("look own Node up: %w", err)
	}
	service, err := k.c.Client.CoreV1().Services(k.c.Namespace).Get(ctx, k.c.Service, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		service, err = nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look the servers' Service up: %w", err)
	}
	return ServerHosts(service, node), nil
}

// renew has a new key certified and puts it to use.
func (k *Certificate) renew(ctx context.Context) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("generate key: %w", err)
	}
	tmpl := &x509.CertificateRequest{Subject: pkix.Name{CommonName: k.c.Node, Organization: []string{string(k.c.Role)}}}
	for _, h := range k.hosts { // only Run's goroutine writes them
		if ip := net.ParseIP(h); ip != nil {
			tmpl.IPAddresses = append(tmpl.IPAddresses, ip)
		} else {
			tmpl.DNSNames = append(tmpl.DNSNames, h)
		}
	}
	request, err := x509.CreateCertificateRequest(rand.Reader, tmpl, key)
	if err != nil {
		return fmt.Errorf("make certificate request: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fmt.Errorf("encode key: %w", err)
	}
	keyPEM := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	certPEM, err := k.ask(ctx, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: request}), key)
	if err != nil {
		return err
	}
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return fmt.Errorf("certificate is of no use: %w", err)
	}
	stored := keep(CertificateFile(k.c.Dir), slices.Concat(certPEM, keyPEM))
	if stored != nil {
		k.log.Error("the new certificate is in use, but cannot be kept on disk", "dir", k.c.Dir, "err", stored)
	}
	k.mu.Lock()
	k.stored = stored
	k.stats.Issued++
	k.issued = time.Now()
	k.mu.Unlock()
	k.use(pair.Leaf)
	k.log.Info("certificate issued", "name", k.c.Node, "hosts", len(k.hosts), "not_after", pair.Leaf.NotAfter)
	if err := k.c.Present(certPEM, keyPEM); err != nil {
		return fmt.Errorf("use the new certificate: %w", err)
	}
	return nil
}

// ask makes a request and waits until it is decided, for a quarter of an hour at most.
func (k *Certificate) ask(ctx context.Context, request []byte, key *ecdsa.PrivateKey) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Minute)
	defer cancel()
	usages := []certsv1.KeyUsage{certsv1.UsageDigitalSignature, certsv1.UsageClientAuth}
	if k.c.Role == identity.RoleServer {
		usages = append(usages, certsv1.UsageServerAuth)
	}
	name, uid, err := csr.RequestCertificateWithContext(ctx, k.c.Client, request, "", k.signer, nil, usages, key)
	if err != nil {
		return nil, fmt.Errorf("ask for a certificate: %w", err)
	}
	k.mu.Lock()
	k.stats.Asked++
	k.mu.Unlock()
	k.log.Info("certificate asked for", "csr", name, "signer", k.signer)
	pause := k.poll
	for {
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("request %s was not decided: is the controller running?", name)
		case <-time.After(pause):
		}
		pause = min(2*pause, 30*time.Second)
		got, err := k.c.Client.CertificatesV1().CertificateSigningRequests().Get(ctx, name, metav1.GetOptions{})
		switch {
		case apierrors.IsNotFound(err) || err == nil && got.UID != uid:
			return nil, fmt.Errorf("request %s was deleted", name)
		case err != nil:
			k.waiting(fmt.Errorf("wait for request %s: %w", name, err))
		case len(got.Status.Certificate) > 0:
			return got.Status.Certificate, nil
		default:
			for _, c := range got.Status.Conditions {
				if c.Type != certsv1.CertificateApproved && c.Status != corev1.ConditionFalse {
					return nil, fmt.Errorf("request %s is %s: %s: %s", name, c.Type, c.Reason, c.Message)
				}
			}
			k.waiting(fmt.Errorf("request %s is not decided yet", name))
		}
	}
}

func (k *Certificate) waiting(err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.err = err
}

// keep replaces a file, with all of data or not at all.
func keep(path string, data []byte) error {
	temp := path + ".unfinished"
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		os.Remove(temp)
	}
	return err
}
