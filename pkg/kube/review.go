// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"context"
	"crypto/sha256"
	"fmt"
	"net/http"
	"sync"
	"time"

	"golang.org/x/time/rate"
	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

const (
	reviewGranted = time.Minute // an answer counts for so long
	reviewRefused = 10 * time.Second
	reviewLimit   = 5 * time.Second
	maxReviews    = 1024 // answers that are kept
	maxToken      = 8 << 10

	// Tokens that nobody has granted before are asked about at this rate, so that strangers cannot have us ask without end.
	reviewEvery = 200 * time.Millisecond
	reviewBurst = 20
)

// Reviewer asks the API server who has a bearer token, and whether that one may get a path: what the kubelet and the cluster's own programs do
// about their metrics.
type Reviewer struct {
	client kubernetes.Interface
	path   string
	limit  *rate.Limiter
	now    func() time.Time

	mu      sync.Mutex
	answers map[[sha256.Size]byte]review
	stats   ReviewStats
}

type review struct {
	err   error
	until time.Time
	good  bool // it was granted before
}

// ReviewStats is a snapshot.
type ReviewStats struct {
	Asked    uint64 // questions to the API server
	Failures uint64 // that it did not answer
}

// NewReviewer makes one for a path such as /metrics.
func NewReviewer(client kubernetes.Interface, path string) *Reviewer {
	return &Reviewer{
		client: client, path: path, limit: rate.NewLimiter(rate.Every(reviewEvery), reviewBurst), now: time.Now,
		answers: make(map[[sha256.Size]byte]review),
	}
}

// ReviewError is why a token is not good enough. Its Status is that of HTTP.
type ReviewError struct {
	status int
	text   string
}

func (e *ReviewError) Error() string { return e.text }

// Status is 401, 403, 429 or 503.
func (e *ReviewError) Status() int { return e.status }

// Stats returns a snapshot.
func (r *Reviewer) Stats() ReviewStats {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.stats
}

// Review returns nil if the token's owner may get the path, or else a [*ReviewError].
func (r *Reviewer) Review(ctx context.Context, token string) error {
	if len(token) > maxToken {
		return &ReviewError{http.StatusUnauthorized, "the token is too long"}
	}
	key := sha256.Sum256([]byte(token))
	r.mu.Lock()
	known, ok := r.answers[key]
	r.mu.Unlock()
	if ok && r.now().Before(known.until) {
		return known.err
	}
	if !known.good && !r.limit.AllowN(r.now(), 1) {
		return &ReviewError{http.StatusTooManyRequests, "too many tokens that are not known yet, try again"}
	}
	err := r.ask(ctx, token)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stats.Asked++
	answer := review{err: err, until: r.now().Add(reviewGranted), good: err == nil}
	if refused, _ := err.(*ReviewError); refused != nil {
		answer.until = r.now().Add(reviewRefused)
		if refused.status == http.StatusServiceUnavailable {
			r.stats.Failures++
			return err // no answer
		}
	}
	if _, again := r.answers[key]; !again && len(r.answers) >= maxReviews {
		clear(r.answers)
	}
	r.answers[key] = answer
	return err
}

func (r *Reviewer) ask(ctx context.Context, token string) error {
	ctx, cancel := context.WithTimeout(ctx, reviewLimit)
	defer cancel()
	who, err := r.client.AuthenticationV1().TokenReviews().Create(ctx, &authenticationv1.TokenReview{
		Spec: authenticationv1.TokenReviewSpec{Token: token},
	}, metav1.CreateOptions{})
	if err != nil {
		return unanswered("who has the token", err)
	}
	if !who.Status.Authenticated {
		return &ReviewError{http.StatusUnauthorized, "the API server does not know the token: " + who.Status.Error}
	}
	extra := make(map[string]authorizationv1.ExtraValue, len(who.Status.User.Extra))
	for key, values := range who.Status.User.Extra {
		extra[key] = authorizationv1.ExtraValue(values)
	}
	may, err := r.client.AuthorizationV1().SubjectAccessReviews().Create(ctx, &authorizationv1.SubjectAccessReview{
		Spec: authorizationv1.SubjectAccessReviewSpec{
			User: who.Status.User.Username, UID: who.Status.User.UID, Groups: who.Status.User.Groups, Extra: extra,
			NonResourceAttributes: &authorizationv1.NonResourceAttributes{Path: r.path, Verb: "get"},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		return unanswered("what that one may", err)
	}
	if !may.Status.Allowed {
		return &ReviewError{http.StatusForbidden, fmt.Sprintf("%s may not get %s: a ClusterRole with nonResourceURLs [%[2]s] and verbs [get] allows it", who.Status.User.Username, r.path)}
	}
	return nil
}

func unanswered(what string, err error) error {
	text := fmt.Sprintf("the API server does not say %s: %v", what, err)
	if apierrors.IsForbidden(err) {
		text += "; our ServiceAccount needs a role that allows it to ask"
	}
	return &ReviewError{http.StatusServiceUnavailable, text}
}
