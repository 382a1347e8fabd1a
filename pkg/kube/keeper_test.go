// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"bytes"
	"context"
	"log/slog"
	"net/http"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
)

type kept struct {
	*keeper
	t      *testing.T
	client *fake.Clientset
	now    time.Time
}

func newKept(t *testing.T) *kept {
	k := &kept{t: t, client: cluster(), now: time.Now()}
	k.keeper = &keeper{
		client: k.client, namespace: ns, secret: "ca", trust: "trust", skew: func() time.Duration { return 0 }, log: slog.New(slog.DiscardHandler),
	}
	k.o.Clock = func() time.Time { return k.now }
	return k
}

func (k *kept) look() error { return k.keeper.look(context.Background()) }

func (k *kept) must() {
	k.t.Helper()
	if err := k.look(); err != nil {
		k.t.Fatal(err)
	}
}

func (k *kept) stored() (secret *corev1.Secret, trust *corev1.ConfigMap) {
	k.t.Helper()
	secret, err := k.client.CoreV1().Secrets(ns).Get(context.Background(), "ca", metav1.GetOptions{})
	if err != nil {
		k.t.Fatal(err)
	}
	if trust, err = k.client.CoreV1().ConfigMaps(ns).Get(context.Background(), "trust", metav1.GetOptions{}); err != nil {
		k.t.Fatal(err)
	}
	return secret, trust
}

func (k *kept) put(secret *corev1.Secret, trust *corev1.ConfigMap) {
	k.t.Helper()
	if _, err := k.client.CoreV1().Secrets(ns).Update(context.Background(), secret, metav1.UpdateOptions{}); err != nil {
		k.t.Fatal(err)
	}
	if _, err := k.client.CoreV1().ConfigMaps(ns).Update(context.Background(), trust, metav1.UpdateOptions{}); err != nil {
		k.t.Fatal(err)
	}
}

func (k *kept) writes() (n int) {
	for _, a := range k.client.Actions() {
		if a.GetVerb() != "get" {
			n++
		}
	}
	return n
}

func TestKeeper(t *testing.T) {
	k := newKept(t)
	k.must()
	secret, trust := k.stored()
	if !bytes.Equal(secret.Data["ca.crt"], []byte(trust.Data["ca.crt"])) || !bytes.Contains(secret.Data["ca.key"], []byte("PRIVATE KEY")) ||
		strings.Contains(trust.Data["ca.crt"], "PRIVATE") || k.writes() != 2 {
		t.Errorf("%v %v, %d writes", secret.Data, trust.Data, k.writes())
	}
	k.must()
	if k.writes() != 2 {
		t.Error("writes at each look")
	}
	first := trust.Data["ca.crt"]

	// A bundle that somebody has changed is put right.
	for _, tampered := range []map[string]string{nil, {"ca.crt": "garbage"}, {"ca.crt": first + first}} {
		_, trust := k.stored()
		trust.Data = tampered
		k.put(secret, trust)
		k.must()
		if _, trust := k.stored(); trust.Data["ca.crt"] != first {
			t.Errorf("%q stays", tampered)
		}
	}

	// Rotation: believed beside the first.
	k.now = k.now.Add(500 * 24 * time.Hour)
	k.must()
	if secret, trust = k.stored(); !strings.HasPrefix(trust.Data["ca.crt"], first) || len(trust.Data["ca.crt"]) < 2*len(first)-200 {
		t.Errorf("%s", trust.Data["ca.crt"])
	}

	// A Secret that was emptied or made anew: what lives on is believed.
	secret.Data = nil
	k.put(secret, trust)
	k.must()
	if ca, _ := k.authority(); len(ca.CAs()) != 3 {
		t.Errorf("%v", ca.CAs())
	}
	if secret, _ = k.stored(); bytes.Count(secret.Data["ca.crt"], []byte("BEGIN")) != 3 || bytes.Count(secret.Data["ca.key"], []byte("BEGIN")) != 1 {
		t.Errorf("%s", secret.Data["ca.crt"])
	}
	_, trust = k.stored()
	secret.Data, trust.Data["ca.crt"] = nil, "garbage"
	k.put(secret, trust)
	k.must()
	if ca, _ := k.authority(); len(ca.CAs()) != 1 {
		t.Errorf("%v", ca.CAs())
	}
}

func TestKeeperFails(t *testing.T) {
	k := newKept(t)
	k.must()
	secret, trust := k.stored()
	whole := secret.DeepCopy()
	secret.Data["ca.key"] = secret.Data["ca.key"][:50]
	k.put(secret, trust)
	err := k.look()
	if err == nil || !strings.Contains(err.Error(), "Secret edge/ca") {
		t.Errorf("got %v", err)
	}
	if ca, err := k.authority(); ca == nil || err == nil {
		t.Errorf("the last good CA: %v, %v", ca, err)
	}
	if _, after := k.stored(); after.Data["ca.crt"] != trust.Data["ca.crt"] {
		t.Error("the bundle has changed")
	}
	k.put(whole, trust)
	k.must()

	k.skew = func() time.Duration { return 2 * time.Hour }
	if err := k.look(); err == nil || !strings.Contains(err.Error(), "clock is 2h0m0s off") {
		t.Errorf("got %v", err)
	}
	k.skew = func() time.Duration { return 0 }

	// Somebody was faster: nothing is published that is not kept.
	k.now = k.now.Add(500 * 24 * time.Hour)
	k.client.PrependReactor("update", "secrets", func(a clienttesting.Action) (bool, runtime.Object, error) {
		return true, nil, apierrors.NewConflict(a.GetResource().GroupResource(), "ca", nil)
	})
	if err := k.look(); !apierrors.IsConflict(err) {
		t.Errorf("got %v", err)
	}
	if _, after := k.stored(); after.Data["ca.crt"] != trust.Data["ca.crt"] {
		t.Error("the bundle has changed")
	}

	for _, kind := range []string{"configmaps", "secrets"} {
		if err := k.client.Tracker().Delete(corev1.SchemeGroupVersion.WithResource(kind), ns, map[string]string{"configmaps": "trust", "secrets": "ca"}[kind]); err != nil {
			t.Fatal(err)
		}
		if err := k.look(); err == nil || !strings.Contains(err.Error(), "kubectl -n edge create") {
			t.Errorf("got %v", err)
		}
	}
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func TestSkew(t *testing.T) {
	now := time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)
	s := Skew{now: func() time.Time { return now }}
	header := http.Header{}
	transport := s.Wrap(roundTrip(func(*http.Request) (*http.Response, error) {
		if header == nil {
			return nil, http.ErrServerClosed
		}
		return &http.Response{Header: header, Body: http.NoBody}, nil
	}))
	for _, c := range []struct {
		date string
		want time.Duration
	}{
		{"", 0}, {now.Add(-time.Hour).Format(http.TimeFormat), time.Hour}, {"garbage", time.Hour}, {now.Add(time.Minute).Format(http.TimeFormat), -time.Minute},
	} {
		header.Set("Date", c.date)
		resp, err := transport.RoundTrip(&http.Request{})
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if got := s.Ahead(); got != c.want {
			t.Errorf("%q: %v, want %v", c.date, got, c.want)
		}
	}
	header = nil
	if resp, err := transport.RoundTrip(&http.Request{}); err == nil || s.Ahead() != -time.Minute {
		resp.Body.Close()
		t.Errorf("%v, %v", err, s.Ahead())
	}
}
