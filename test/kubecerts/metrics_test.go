// SPDX-License-Identifier: Apache-2.0

package kubecerts

import (
	"context"
	"crypto/tls"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/edge-tunnel/edge-tunnel/test/kubebed"
)

// TestMetricsNeedAToken: controller and agent show their metrics to whom the API server knows and allows it, and to nobody else; and say which
// right they lack themselves.
func TestMetricsNeedAToken(t *testing.T) {
	s := bed(t)
	prometheus, guest := token(t, s, "prometheus"), token(t, s, "guest")
	s.Apply(`{"apiVersion": "v1", "kind": "List", "items": [
		{"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "scraper"},
			"rules": [{"nonResourceURLs": ["/metrics"], "verbs": ["get"]}]},
		{"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "scraper"},
			"roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "scraper"},
			"subjects": [{"kind": "ServiceAccount", "namespace": "kube-system", "name": "prometheus"}]},
		{"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "asker"}, "rules": []},
		{"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "asker"},
			"roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "asker"},
			"subjects": [{"kind": "ServiceAccount", "namespace": "kube-system", "name": "tunnel-controller"}, {"kind": "ServiceAccount", "namespace": "kube-system", "name": "tunnel-agent"}]}]}`)
	dir := t.TempDir()
	c := start(t, s, "--metrics", "127.0.0.1:0")
	eventually(t, "bundle published", func() bool { return bundle(t, s) != "" })
	ca := filepath.Join(dir, "ca.crt")
	if err := os.WriteFile(ca, []byte(bundle(t, s)), 0o600); err != nil {
		t.Fatal(err)
	}
	a := launch(t, nil, "tunnel-agent", "--server", "127.0.0.1:1", "--ca-cert", ca, "--certificate-from", "kubernetes", "--kubeconfig", s.PodToken(namespace, "tunnel-agent", "edge-1"),
		"--node-name", "edge-1", "--certificate-dir", filepath.Join(dir, "kept"), "--admin", "127.0.0.1:0", "--control", filepath.Join(dir, "agent.sock"), "--metrics", "127.0.0.1:0")
	for _, p := range []*process{c, a} {
		addr := regexp.MustCompile(`msg="metrics over TLS" addr=(\S+)`).FindStringSubmatch(p.log.String())[1]
		want := func(token string, status int, text string) {
			t.Helper()
			var code int
			var body string
			eventually(t, text, func() bool {
				code, body = scrape(t, addr, token)
				return code == status && strings.Contains(body, text)
			})
		}
		asker := func(resources ...string) {
			t.Helper()
			rules := []kubebed.Object{}
			for _, r := range resources {
				group := map[string]string{"tokenreviews": "authentication.k8s.io", "subjectaccessreviews": "authorization.k8s.io"}[r]
				rules = append(rules, kubebed.Object{"apiGroups": []string{group}, "resources": []string{r}, "verbs": []string{"create"}})
			}
			if err := s.Do(http.MethodPatch, "/apis/rbac.authorization.k8s.io/v1/clusterroles/asker", kubebed.Object{"rules": rules}, nil); err != nil {
				t.Fatal(err)
			}
		}
		want("", 401, "show a token")
		want(prometheus, 503, `cannot create resource "tokenreviews"`)
		asker("tokenreviews")
		want(prometheus, 503, `cannot create resource "subjectaccessreviews"`)
		asker("tokenreviews", "subjectaccessreviews")
		want(prometheus, 200, "\nedge_tunnel_build_info{")
		want(guest, 403, "system:serviceaccount:kube-system:guest may not get /metrics")
		want("garbage", 401, "does not know the token")
		asker()
	}
	s.Kill()
	addr := regexp.MustCompile(`msg="metrics over TLS" addr=(\S+)`).FindStringSubmatch(c.log.String())[1]
	eventually(t, "without an API server nobody is known", func() bool {
		code, body := scrape(t, addr, guest+"x")
		return code == 503 && strings.Contains(body, "refused")
	})
	c.stop()
	a.stop()
}

// token is one of a ServiceAccount.
func token(t *testing.T, s *kubebed.Server, name string) string {
	t.Helper()
	s.ServiceAccount(namespace, name)
	var answer struct{ Status struct{ Token string } }
	if err := s.Do(http.MethodPost, "/api/v1/namespaces/"+namespace+"/serviceaccounts/"+name+"/token", kubebed.Object{"spec": kubebed.Object{"expirationSeconds": 3600}}, &answer); err != nil {
		t.Fatal(err)
	}
	return answer.Status.Token
}

func scrape(t *testing.T, addr, token string) (int, string) {
	t.Helper()
	client := http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	req, err := http.NewRequestWithContext(context.Background(), http.MethodGet, "https://"+addr+"/metrics", http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}
