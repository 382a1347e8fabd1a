// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// fakeAPI answers with one status after the other, and keeps to the last.
func fakeAPI(t *testing.T, answers ...string) *podAPI {
	t.Helper()
	var n atomic.Int32
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/apis/apps/v1/namespaces/kube-system/daemonsets/sweep" || r.Header.Get("Authorization") != "Bearer secret" {
			w.WriteHeader(http.StatusForbidden)
			fmt.Fprint(w, `{"message": "forbidden"}`)
			return
		}
		fmt.Fprint(w, answers[min(int(n.Add(1)), len(answers))-1])
	}))
	t.Cleanup(server.Close)
	dir := t.TempDir()
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	for name, content := range map[string][]byte{"token": []byte("secret\n"), "ca.crt": ca} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	at, err := url.Parse(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	api, err := newPodAPI(dir, func(name string) string {
		return map[string]string{"KUBERNETES_SERVICE_HOST": at.Hostname(), "KUBERNETES_SERVICE_PORT": at.Port()}[name]
	})
	if err != nil {
		t.Fatal(err)
	}
	api.every = time.Millisecond
	return api
}

func TestAwait(t *testing.T) {
	const (
		unseen = `{"metadata": {"generation": 2}, "status": {"observedGeneration": 1, "desiredNumberScheduled": 2, "numberReady": 2}}`
		half   = `{"metadata": {"generation": 2}, "status": {"observedGeneration": 2, "desiredNumberScheduled": 2, "numberReady": 1}}`
		whole  = `{"metadata": {"generation": 2}, "status": {"observedGeneration": 2, "desiredNumberScheduled": 2, "numberReady": 2}}`
	)
	for _, c := range []struct {
		name        string
		answers     []string
		daemonset   string
		says, fails string
	}{
		{"at last", []string{unseen, half, "{", whole}, "sweep", "all pods of DaemonSet kube-system/sweep are ready", ""},
		{"one is off", []string{half}, "sweep", "1 pods of DaemonSet kube-system/sweep are not ready", ""},
		{"never seen", []string{unseen}, "sweep", "1 pods", ""},
		{"no right", []string{whole}, "other", "", "forbidden"},
		{"nonsense", []string{"{"}, "sweep", "", "answer 200 OK"},
	} {
		t.Run(c.name, func(t *testing.T) {
			api := fakeAPI(t, c.answers...)
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			defer cancel()
			var out bytes.Buffer
			err := api.await(ctx, &out, "kube-system", c.daemonset)
			if c.fails == "" && err != nil || c.fails != "" && (err == nil || !strings.Contains(err.Error(), c.fails)) || !strings.Contains(out.String(), c.says) {
				t.Errorf("%q, %v", out.String(), err)
			}
		})
	}
}

func TestAwaitNeedsAnAccount(t *testing.T) {
	if _, err := newPodAPI(t.TempDir(), os.Getenv); err == nil || !strings.Contains(err.Error(), "read the pod's account") {
		t.Errorf("%v", err)
	}
	dir := t.TempDir()
	for _, name := range []string{"token", "ca.crt"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := newPodAPI(dir, os.Getenv); err == nil || !strings.Contains(err.Error(), "has no certificate") {
		t.Errorf("%v", err)
	}
}
