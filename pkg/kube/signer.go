// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"
	certsv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"

	"github.com/edge-tunnel/edge-tunnel/pkg/identity"
)

const (
	signers = 4 // requests that are decided at once

	// What one requester can have decided: a few at once, then one every so often. The rest waits, so that one node that asks for
	// thousands delays nobody else's.
	requesterBurst = 10
	requesterEvery = 10 * time.Second

	// maxRequest is longer than any request that is granted; more of one is not kept.
	maxRequest = 65 << 10
)

// SignerConfig is what a [Signer] works with. All but the options of the CA, Clock and Log is required.
type SignerConfig struct {
	Client    kubernetes.Interface
	Namespace string // of all that follows, and of the pods of the accounts
	Secret    string // where the CA is kept
	Trust     string // ConfigMap with what is to be believed
	Service   string // at which agents dial the servers; need not exist
	Agent     string // ServiceAccount of the agents
	Server    string // and of the servers
	CA        identity.AuthorityOptions

	// Skew says how far our clock is from the API server's. Default: never.
	Skew func() time.Duration
	Log  *slog.Logger
}

// Validate joins everything that is wrong.
func (c SignerConfig) Validate() error {
	var bad []error
	for _, field := range []struct {
		name    string
		missing bool
	}{
		{"Client", c.Client == nil}, {"Namespace", c.Namespace == ""}, {"Secret", c.Secret == ""}, {"Trust", c.Trust == ""}, {"Service", c.Service == ""},
		{"Agent", c.Agent == ""}, {"Server", c.Server == ""},
	} {
		if field.missing {
			bad = append(bad, fmt.Errorf("signer: %s is not set", field.name))
		}
	}
	if c.Agent != "" && c.Server != "" {
		bad = append(bad, c.accounts().Validate())
	}
	return errors.Join(append(bad, c.CA.Validate())...)
}

func (c SignerConfig) accounts() identity.Accounts {
	user := func(name string) string { return "system:serviceaccount:" + c.Namespace + ":" + name }
	return identity.Accounts{Agent: user(c.Agent), Server: user(c.Server)}
}

// Signer approves and signs the requests for certificates of agents and servers, or denies them. Only one may run in a cluster, see
// [Leader]; two would do no harm beyond conflicts.
type Signer struct {
	c        SignerConfig
	accounts identity.Accounts
	ca       *keeper
	log      *slog.Logger

	mu     sync.Mutex
	stats  SignerStats
	err    error // the last one, and when it was
	errAt  time.Time
	queued func() int               // requests that wait, while it runs
	keys   map[string]types.UID     // which request has a key
	done   map[types.UID]bool       // decided, though our copy does not say so yet
	pace   map[string]*rate.Limiter // by requester

	burst int
	every time.Duration
}

// SignerStats is a snapshot.
type SignerStats struct {
	Running bool
	Waiting int               // requests to be decided
	Signed  map[string]uint64 // by signer
	Denied  map[string]uint64 // by reason
	Failed  uint64            // attempts to decide that will be repeated
	Error   string            // what keeps requests from being decided, empty if nothing does

	CAs    []identity.CAInfo // what is believed; empty until the CA was read
	Signer identity.CAInfo   // which of them signs
}

// NewSigner returns a signer for [Signer.Run].
func NewSigner(c SignerConfig) (*Signer, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Skew == nil {
		c.Skew = func() time.Duration { return 0 }
	}
	s := &Signer{
		c: c, accounts: c.accounts(), log: c.Log, burst: requesterBurst, every: requesterEvery,
		ca:    &keeper{client: c.Client, namespace: c.Namespace, secret: c.Secret, trust: c.Trust, o: c.CA, skew: c.Skew, log: c.Log},
		stats: SignerStats{Signed: map[string]uint64{identity.SignerAgent: 0, identity.SignerServer: 0}, Denied: map[string]uint64{}},
	}
	for _, reason := range identity.DenyReasons() {
		s.stats.Denied[reason] = 0
	}
	return s, nil
}

// Stats returns a snapshot.
func (s *Signer) Stats() SignerStats {
	ca, err := s.ca.authority()
	s.mu.Lock()
	defer s.mu.Unlock()
	out := s.stats
	out.Signed, out.Denied = maps.Clone(out.Signed), maps.Clone(out.Denied)
	if s.queued != nil {
		out.Waiting = s.queued()
	}
	// Whatever is wrong is tried again sooner than that.
	if err == nil && time.Since(s.errAt) < 2*time.Minute {
		err = s.err
	}
	if err != nil {
		out.Error = err.Error()
	}
	if ca != nil {
		out.CAs = ca.CAs()
		out.Signer, _ = ca.Signer() // the zero value says that none does
	}
	return out
}

func (s *Signer) change(f func(*SignerStats)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(&s.stats)
}

func (s *Signer) failed(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err, s.errAt = err, time.Now()
}

type queue = workqueue.TypedRateLimitingInterface[string]

// Run decides requests until ctx ends. It returns when everything has ended that it began.
func (s *Signer) Run(ctx context.Context) error {
	work := workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[string](250*time.Millisecond, time.Minute))
	s.mu.Lock()
	s.keys, s.done, s.pace = map[string]types.UID{}, map[types.UID]bool{}, map[string]*rate.Limiter{}
	s.stats.Running = true
	s.queued = work.Len
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.stats.Running, s.queued = false, nil
	}()

	var stores []cache.Store
	var synced []cache.InformerSynced
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	for _, signer := range []string{identity.SignerAgent, identity.SignerServer} {
		informer, registered, err := s.informer(signer, work)
		if err != nil {
			return err
		}
		stores, synced = append(stores, informer.GetStore()), append(synced, registered.HasSynced)
		wg.Go(func() { informer.RunWithContext(ctx) })
	}
	wg.Go(func() {
		<-ctx.Done()
		work.ShutDown()
	})
	first := make(chan struct{})
	wg.Go(func() {
		var once sync.Once
		s.ca.run(ctx, time.Minute, 5*time.Second, func(err error) {
			if err == nil {
				once.Do(func() { close(first) })
			}
		})
	})
	// All granted keys have to be known before the first is granted.
	if !cache.WaitForCacheSync(ctx.Done(), synced...) {
		return nil
	}
	select {
	case <-first:
	case <-ctx.Done():
		return nil
	}
	for range signers {
		wg.Go(func() {
			for s.next(ctx, work, stores) {
			}
		})
	}
	<-ctx.Done()
	return nil
}

// informer follows the requests to one signer: those to others are none of our business, and in a large cluster are many.
func (s *Signer) informer(signer string, work queue) (cache.SharedIndexInformer, cache.ResourceEventHandlerRegistration, error) {
	factory := informers.NewSharedInformerFactoryWithOptions(s.c.Client, 0, informers.WithTransform(slim),
		informers.WithTweakListOptions(func(o *metav1.ListOptions) {
			o.FieldSelector = fields.OneTermEqualSelector("spec.signerName", signer).String()
		}))
	informer := factory.Certificates().V1().CertificateSigningRequests().Informer()
	if err := informer.SetWatchErrorHandlerWithContext(func(_ context.Context, _ *cache.Reflector, err error) {
		s.log.Warn("cannot follow requests for certificates", "signer", signer, "err", err)
		s.failed(err)
	}); err != nil {
		return nil, nil, fmt.Errorf("follow requests for certificates: %w", err)
	}
	seen := func(obj any) {
		csr, ok := obj.(*certsv1.CertificateSigningRequest)
		if !ok || csr.Spec.SignerName != signer {
			return
		}
		if isTrue(csr, certsv1.CertificateApproved) {
			s.claim(keyOf(csr), csr.UID)
		}
		if !finished(csr) {
			work.Add(csr.Name)
		} else {
			s.forget(csr.UID)
		}
	}
	registered, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    seen,
		UpdateFunc: func(_, obj any) { seen(obj) },
		DeleteFunc: func(obj any) {
			if last, ok := obj.(cache.DeletedFinalStateUnknown); ok {
				obj = last.Obj
			}
			if csr, ok := obj.(*certsv1.CertificateSigningRequest); ok {
				s.release(csr)
			}
		},
	})
	if err != nil {
		return nil, nil, fmt.Errorf("follow requests for certificates: %w", err)
	}
	return informer, registered, nil
}

// keyAnnotation is where our copy of a request that is finished has the id of its key.
const keyAnnotation = "edge-tunnel.io/key-id"

// slim keeps of a request what is needed: the request until it is decided, then which key it was for. What was written on it goes if it is
// more than anybody needs: a memory full of pending requests would be a stranger's to fill.
func slim(obj any) (any, error) {
	const most = 4 << 10
	whole, ok := obj.(*certsv1.CertificateSigningRequest)
	if !ok || len(whole.Spec.Request) == 0 { // client-go may ask twice
		return obj, nil
	}
	copied := *whole
	csr := &copied
	csr.ManagedFields = nil
	csr.Spec.Request = csr.Spec.Request[:min(len(csr.Spec.Request), maxRequest)]
	written := 0
	for _, texts := range []map[string]string{csr.Labels, csr.Annotations} {
		for key, value := range texts {
			written += len(key) + len(value)
		}
	}
	if written > most {
		csr.Labels, csr.Annotations = nil, nil
	}
	if finished(csr) {
		csr.Labels, csr.Annotations = nil, map[string]string{keyAnnotation: requestedKey(csr)}
		csr.Spec.Request, csr.Spec.Extra, csr.Spec.Groups = nil, nil, nil
		if len(csr.Status.Certificate) > 0 {
			csr.Status.Certificate = []byte{'x'}
		}
	}
	return csr, nil
}

// keyOf is the id of the key that our copy of a request is for, empty if the request cannot be read.
func keyOf(csr *certsv1.CertificateSigningRequest) string {
	if finished(csr) {
		return csr.Annotations[keyAnnotation]
	}
	return requestedKey(csr)
}

func requestedKey(csr *certsv1.CertificateSigningRequest) string {
	parsed, err := identity.ParseCSR(csr.Spec.Request)
	if err != nil {
		return ""
	}
	return parsed.KeyID
}

func isTrue(csr *certsv1.CertificateSigningRequest, condition certsv1.RequestConditionType) bool {
	return slices.ContainsFunc(csr.Status.Conditions, func(c certsv1.CertificateSigningRequestCondition) bool {
		return c.Type == condition && c.Status != corev1.ConditionFalse
	})
}

func finished(csr *certsv1.CertificateSigningRequest) bool {
	return len(csr.Status.Certificate) > 0 || isTrue(csr, certsv1.CertificateDenied) || isTrue(csr, certsv1.CertificateFailed)
}

// claim gives a key to a request, unless another has it.
func (s *Signer) claim(key string, request types.UID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if holder, ok := s.keys[key]; ok {
		return holder == request
	}
	s.keys[key] = request
	return true
}

func (s *Signer) release(csr *certsv1.CertificateSigningRequest) {
	key := keyOf(csr)
	s.forget(csr.UID)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.keys[key] == csr.UID {
		delete(s.keys, key)
	}
}

func (s *Signer) forget(request types.UID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.done, request)
}

func (s *Signer) isDone(request types.UID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.done[request]
}

// next decides one request. It returns false when there will be no more.
func (s *Signer) next(ctx context.Context, work queue, stores []cache.Store) bool {
	name, down := work.Get()
	if down {
		return false
	}
	defer work.Done(name)
	var csr *certsv1.CertificateSigningRequest
	for _, store := range stores {
		if obj, ok, err := store.GetByKey(name); err == nil && ok {
			csr, _ = obj.(*certsv1.CertificateSigningRequest)
		}
	}
	if csr == nil || finished(csr) || s.isDone(csr.UID) {
		work.Forget(name)
		return true
	}
	if wait := s.turn(csr); wait > 0 {
		work.AddAfter(name, wait)
		return true
	}
	if err := s.decide(ctx, csr.DeepCopy()); err != nil && ctx.Err() == nil {
		// A conflict means that we have an old copy: the next one is on its way.
		if !apierrors.IsConflict(err) && !apierrors.IsNotFound(err) {
			s.log.Warn("a request for a certificate is not decided, will try again", "csr", name, "err", err)
			s.change(func(st *SignerStats) { st.Failed++ })
			s.failed(err)
		}
		work.AddRateLimited(name)
		return true
	}
	work.Forget(name)
	return true
}

// turn says how long a request has to wait, since its requester has had others decided.
func (s *Signer) turn(csr *certsv1.CertificateSigningRequest) time.Duration {
	const most = 1 << 16
	who := csr.Spec.Username
	for _, extra := range []string{"node-name", "pod-uid"} {
		who += "\x00" + strings.Join(csr.Spec.Extra["authentication.kubernetes.io/"+extra], ",")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	limit := s.pace[who]
	if limit == nil {
		if len(s.pace) == most {
			clear(s.pace) // forgives, once in a while
		}
		limit = rate.NewLimiter(rate.Every(s.every), s.burst)
		s.pace[who] = limit
	}
	if limit.Allow() {
		return 0
	}
	return s.every
}

// decide approves and signs a request, or denies it. An error means that it is to be decided later.
func (s *Signer) decide(ctx context.Context, csr *certsv1.CertificateSigningRequest) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	requests := s.c.Client.CertificatesV1().CertificateSigningRequests()
	log := s.log.With("csr", csr.Name, "signer", csr.Spec.SignerName, "user", csr.Spec.Username)
	approved := isTrue(csr, certsv1.CertificateApproved)

	asked, err := s.judge(ctx, csr)
	var denial *identity.Denial
	switch {
	case errors.As(err, &denial) && !approved:
		condition(csr, certsv1.CertificateDenied, denial.Reason(), denial.Detail())
		if _, err := requests.UpdateApproval(ctx, csr.Name, csr, metav1.UpdateOptions{}); err != nil {
			return fmt.Errorf("deny certificate: %w", err)
		}
		s.denied(csr, denial, log)
		return nil
	case errors.As(err, &denial):
		// Somebody else has approved it, who may, but not to have it signed by us.
		condition(csr, certsv1.CertificateFailed, denial.Reason(), denial.Detail())
		if _, err := requests.UpdateStatus(ctx, csr, metav1.UpdateOptions{}); err != nil {
			return fmt.Errorf("refuse to sign certificate: %w", err)
		}
		s.denied(csr, denial, log)
		return nil
	case err != nil:
		return err
	}

	if err := checkSkew(s.c.Skew()); err != nil {
		return err
	}
	ca, err := s.ca.authority()
	if ca == nil {
		return errors.Join(errNoCA, err)
	}
	if !approved {
		condition(csr, certsv1.CertificateApproved, "node_proven", "the requester is on node "+asked.Name)
		if csr, err = requests.UpdateApproval(ctx, csr.Name, csr, metav1.UpdateOptions{}); err != nil {
			return fmt.Errorf("approve certificate: %w", err)
		}
	}
	wish := time.Duration(0)
	if csr.Spec.ExpirationSeconds != nil {
		wish = time.Duration(*csr.Spec.ExpirationSeconds) * time.Second
	}
	cert, notAfter, err := ca.Sign(asked, csr.CreationTimestamp.Time, wish)
	if err != nil {
		return err
	}
	csr = csr.DeepCopy()
	csr.Status.Certificate = cert
	if _, err := requests.UpdateStatus(ctx, csr, metav1.UpdateOptions{}); err != nil {
		return fmt.Errorf("hand out certificate: %w", err)
	}
	s.change(func(st *SignerStats) {
		st.Signed[csr.Spec.SignerName]++
		s.done[csr.UID] = true
	})
	log.Info("certificate signed", "name", asked.Name, "hosts", len(asked.DNSNames)+len(asked.Addrs), "not_after", notAfter)
	return nil
}

func (s *Signer) denied(csr *certsv1.CertificateSigningRequest, d *identity.Denial, log *slog.Logger) {
	s.change(func(st *SignerStats) {
		st.Denied[d.Reason()]++
		s.done[csr.UID] = true
	})
	log.Warn("certificate denied", "reason", d.Reason(), "detail", d.Detail())
}

func condition(csr *certsv1.CertificateSigningRequest, kind certsv1.RequestConditionType, reason, message string) {
	now := metav1.Now()
	csr.Status.Conditions = append(csr.Status.Conditions, certsv1.CertificateSigningRequestCondition{
		Type: kind, Status: corev1.ConditionTrue, Reason: reason, Message: message, LastUpdateTime: now, LastTransitionTime: now,
	})
}

// judge returns what is to be signed. What is cheap comes first, so that the API server is asked for what may well be granted only.
func (s *Signer) judge(ctx context.Context, csr *certsv1.CertificateSigningRequest) (identity.CSR, error) {
	role := identity.SignerRole(csr.Spec.SignerName)
	who := identity.Requester{User: csr.Spec.Username, Groups: csr.Spec.Groups, Extra: map[string][]string{}}
	for key, values := range csr.Spec.Extra {
		who.Extra[key] = values
	}
	proof, err := s.accounts.Prove(role, who)
	if err != nil {
		return identity.CSR{}, err
	}
	var usages []string
	for _, u := range csr.Spec.Usages {
		usages = append(usages, string(u))
	}
	if err := identity.CheckUsages(role, usages); err != nil {
		return identity.CSR{}, err
	}
	asked, err := identity.ParseCSR(csr.Spec.Request)
	if err != nil {
		return identity.CSR{}, err
	}
	if proof.Node == "" {
		if proof.Node, err = s.nodeOfPod(ctx, role, proof); err != nil {
			return identity.CSR{}, err
		}
	}
	if asked.Name != proof.Node {
		return identity.CSR{}, asked.Check(role, proof.Node, nil)
	}
	hosts, err := s.hosts(ctx, role, proof)
	if err != nil {
		return identity.CSR{}, err
	}
	if err := asked.Check(role, proof.Node, hosts); err != nil {
		return identity.CSR{}, err
	}
	if !s.claim(asked.KeyID, csr.UID) {
		return identity.CSR{}, identity.Deny(identity.DenyReplayed, "another request has a certificate for the same key")
	}
	return asked, nil
}

// nodeOfPod is where the pod of a token runs, for API servers before 1.30.
func (s *Signer) nodeOfPod(ctx context.Context, role identity.Role, p identity.Proof) (string, error) {
	pod, err := s.c.Client.CoreV1().Pods(s.c.Namespace).Get(ctx, p.Pod, metav1.GetOptions{})
	account := s.c.Agent
	if role == identity.RoleServer {
		account = s.c.Server
	}
	switch {
	case apierrors.IsNotFound(err):
		return "", identity.Deny(identity.DenyNoNode, "there is no pod %s", p.Pod)
	case err != nil:
		return "", fmt.Errorf("look the requester's pod up: %w", err)
	case string(pod.UID) != p.PodUID:
		return "", identity.Deny(identity.DenyNoNode, "pod %s is another one by now", p.Pod)
	case pod.Spec.ServiceAccountName != account:
		return "", identity.Deny(identity.DenyNoNode, "pod %s does not run as %s", p.Pod, account)
	case pod.Spec.NodeName == "":
		return "", identity.Deny(identity.DenyNoNode, "pod %s is on no node", p.Pod)
	}
	return pod.Spec.NodeName, nil
}

// hosts are the names that the node's server may have. The node has to exist, for agents too: a Node that was deleted is no longer ours.
func (s *Signer) hosts(ctx context.Context, role identity.Role, p identity.Proof) ([]string, error) {
	node, err := s.c.Client.CoreV1().Nodes().Get(ctx, p.Node, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return nil, identity.Deny(identity.DenyUnknownNode, "there is no Node %s", p.Node)
	case err != nil:
		return nil, fmt.Errorf("look the requester's Node up: %w", err)
	case p.NodeUID != "" && p.NodeUID != string(node.UID):
		return nil, identity.Deny(identity.DenyUnknownNode, "Node %s is another one by now", p.Node)
	case role != identity.RoleServer:
		return nil, nil
	}
	service, err := s.c.Client.CoreV1().Services(s.c.Namespace).Get(ctx, s.c.Service, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		service, err = nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look the servers' Service up: %w", err)
	}
	return ServerHosts(service, node), nil
}
