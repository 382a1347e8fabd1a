// SPDX-License-Identifier: Apache-2.0

package kube

import (
	"context"
	"maps"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/edge-tunnel/edge-tunnel/test/kubebed"
)

const configMapRights = `{"apiVersion": "v1", "kind": "List", "items": [
	{"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": "server-cfg", "namespace": "kube-system"}, "rules": [
		{"apiGroups": [""], "resources": ["configmaps"], "resourceNames": ["edge-tunnel-server-cfg"], "verbs": ["get", "list", "watch"]}]},
	{"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": {"name": "server-cfg", "namespace": "kube-system"},
		"roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "server-cfg"},
		"subjects": [{"kind": "ServiceAccount", "namespace": "kube-system", "name": "tunnel-server"}]}]}`

// The rights to one ConfigMap of that name are enough to follow it, over an outage and a restore.
func TestConfigMap(t *testing.T) {
	api := kubebed.APIServer(t)
	account, err := NewClient(ClientOptions{Kubeconfig: api.ServiceAccount("kube-system", "tunnel-server")})
	if err != nil {
		t.Fatal(err)
	}
	admin, err := NewClient(ClientOptions{Kubeconfig: api.Admin()})
	if err != nil {
		t.Fatal(err)
	}
	states := make(chan map[string]string, 100)
	m := NewConfigMap(ConfigMapConfig{
		Client: account, Namespace: "kube-system", Name: "edge-tunnel-server-cfg",
		Changed: func(_ context.Context, data map[string]string) { states <- data },
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- m.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	want := func(what string, data map[string]string) {
		t.Helper()
		select {
		case got := <-states:
			if (got == nil) != (data == nil) || !maps.Equal(got, data) {
				t.Fatalf("%s: %v, want %v", what, got, data)
			}
		case <-time.After(30 * time.Second):
			t.Fatalf("%s: nothing, want %v; %+v", what, data, m.Status())
		}
	}
	status := func(what string, ok func(ConfigMapStatus) bool) {
		t.Helper()
		for end := time.Now().Add(30 * time.Second); !ok(m.Status()); time.Sleep(5 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%s: %+v", what, m.Status())
			}
		}
	}

	status("no rights", func(s ConfigMapStatus) bool {
		return !s.Complete && s.Err != nil && strings.Contains(s.Err.Error(), `cannot list resource "configmaps"`) && !s.Since.IsZero()
	})
	api.Apply(configMapRights)
	want("none", nil)
	status("rights", func(s ConfigMapStatus) bool { return s.Complete && !s.Exists && s.Err == nil })

	maps := admin.CoreV1().ConfigMaps("kube-system")
	put := func(data map[string]string, name string) *corev1.ConfigMap {
		return &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}, Data: data}
	}
	must := func(_ any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(maps.Create(ctx, put(map[string]string{"http-proxy-ports": "9"}, "another"), metav1.CreateOptions{}))
	must(maps.Create(ctx, put(map[string]string{"http-proxy-ports": "9100"}, "edge-tunnel-server-cfg"), metav1.CreateOptions{}))
	want("made", map[string]string{"http-proxy-ports": "9100"})
	saved := api.Save()
	must(maps.Update(ctx, put(nil, "edge-tunnel-server-cfg"), metav1.UpdateOptions{}))
	want("emptied", map[string]string{})
	must(nil, maps.Delete(ctx, "edge-tunnel-server-cfg", metav1.DeleteOptions{}))
	want("deleted", nil)

	// Replaced in two steps it is never gone.
	must(maps.Create(ctx, put(map[string]string{"a": "1"}, "edge-tunnel-server-cfg"), metav1.CreateOptions{}))
	want("made again", map[string]string{"a": "1"})
	must(nil, maps.Delete(ctx, "edge-tunnel-server-cfg", metav1.DeleteOptions{}))
	must(maps.Create(ctx, put(map[string]string{"a": "2"}, "edge-tunnel-server-cfg"), metav1.CreateOptions{}))
	want("replaced", map[string]string{"a": "2"})

	api.Kill()
	status("an outage", func(s ConfigMapStatus) bool { return s.Complete && s.Exists && s.Err != nil })
	api.Restore(saved)
	want("restored", map[string]string{"http-proxy-ports": "9100"})
	status("after the outage", func(s ConfigMapStatus) bool { return s.Err == nil && s.Since.IsZero() })
}
