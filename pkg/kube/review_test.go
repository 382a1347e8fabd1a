// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
)

func TestReviewer(t *testing.T) {
	client := fake.NewClientset()
	var away error
	client.PrependReactor("create", "tokenreviews", func(a clienttesting.Action) (bool, runtime.Object, error) {
		review := a.(clienttesting.CreateAction).GetObject().(*authenticationv1.TokenReview).DeepCopy()
		if user, known := strings.CutPrefix(review.Spec.Token, "user:"); known {
			review.Status.Authenticated, review.Status.User.Username = true, user
		} else {
			review.Status.Error = "invalid bearer token"
		}
		return true, review, away
	})
	client.PrependReactor("create", "subjectaccessreviews", func(a clienttesting.Action) (bool, runtime.Object, error) {
		review := a.(clienttesting.CreateAction).GetObject().(*authorizationv1.SubjectAccessReview).DeepCopy()
		if asked := review.Spec.NonResourceAttributes; asked == nil || *asked != (authorizationv1.NonResourceAttributes{Path: "/metrics", Verb: "get"}) {
			t.Errorf("asked for %+v", review.Spec)
		}
		review.Status.Allowed = review.Spec.User == "prometheus"
		return true, review, away
	})
	r := NewReviewer(client, "/metrics")
	clock := time.Now()
	r.now = func() time.Time { return clock }
	want := func(token string, status int, text string, asked int) {
		t.Helper()
		client.ClearActions()
		err := r.Review(t.Context(), token)
		got := http.StatusOK
		if refused := (*ReviewError)(nil); errors.As(err, &refused) {
			got = refused.Status()
		}
		if got != status || err != nil && !strings.Contains(err.Error(), text) || len(client.Actions()) != asked {
			t.Errorf("%.20s: %v (%d), asked %d times; want %d %q, %d", token, err, got, len(client.Actions()), status, text, asked)
		}
	}
	want("user:prometheus", 200, "", 2)
	want("user:prometheus", 200, "", 0)
	want("user:guest", 403, "guest may not get /metrics: a ClusterRole with nonResourceURLs [/metrics]", 2)
	want("user:guest", 403, "", 0)
	want("garbage", 401, "invalid bearer token", 1)
	want("garbage", 401, "invalid bearer token", 0)
	want(strings.Repeat("x", maxToken+1), 401, "too long", 0)
	clock = clock.Add(reviewRefused)
	want("garbage", 401, "", 1)
	want("user:guest", 403, "", 2)
	want("user:prometheus", 200, "", 0)

	// Without an API server what was answered counts until its time is up, and nothing is made up.
	away = errors.New("connection refused")
	want("user:prometheus", 200, "", 0)
	want("user:other", 503, "does not say who has the token: connection refused", 1)
	clock = clock.Add(reviewGranted)
	want("user:prometheus", 503, "connection refused", 1)
	away = apierrors.NewForbidden(schema.GroupResource{Resource: "tokenreviews"}, "", errors.New(`User "u" cannot create resource "tokenreviews"`))
	want("user:prometheus", 503, "needs a role", 1)
	away = nil
	want("user:prometheus", 200, "", 2)

	// Strangers cannot have us ask without end, nor fill the memory, nor get in the way of who is known.
	asked := r.Stats().Asked
	limited := 0
	for i := range 3000 {
		if refused := (*ReviewError)(nil); errors.As(r.Review(t.Context(), fmt.Sprint("stranger-", i)), &refused) && refused.Status() == http.StatusTooManyRequests {
			limited++
		}
	}
	if n := r.Stats().Asked - asked; n > reviewBurst || limited < 3000-reviewBurst || len(r.answers) > maxReviews {
		t.Errorf("asked %d times, refused %d, keeps %d", n, limited, len(r.answers))
	}
	clock = clock.Add(reviewGranted)
	for range reviewBurst + 1 {
		r.limit.AllowN(clock, 1)
	}
	want("user:prometheus", 200, "", 2)
	for i := range 2 * maxReviews {
		clock = clock.Add(reviewEvery)
		_ = r.Review(t.Context(), fmt.Sprint("user:", i))
	}
	if len(r.answers) > maxReviews {
		t.Errorf("keeps %d", len(r.answers))
	}
	if s := r.Stats(); s.Failures != 3 {
		t.Errorf("%+v", s)
	}
}
