// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
	"github.com/edge-tunnel/edge-tunnel/pkg/kube"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func environment(stderr io.Writer, args ...string) cli.Env {
	return cli.Env{Name: "tunnel-controller", Args: args, Stdout: io.Discard, Stderr: stderr, Getenv: func(string) string { return "" }}
}

// kubeconfig is for an API server at which nobody listens.
func kubeconfig(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "kubeconfig")
	text := `{apiVersion: v1, kind: Config, current-context: c, contexts: [{name: c, context: {cluster: c, user: u}}],
clusters: [{name: c, cluster: {server: "http://127.0.0.1:1"}}], users: [{name: u, user: {}}]}`
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestWithoutAPIServer: it goes on, says what is wrong, and ends when it is asked to.
func TestWithoutAPIServer(t *testing.T) {
	var stderr lockedBuffer
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	status := make(chan int, 1)
	go func() {
		status <- cli.Run(ctx, environment(&stderr, "--kubeconfig", kubeconfig(t), "--admin", "127.0.0.1:0"), run)
	}()
	var admin string
	get := func(path string) (int, string) {
		client := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
		resp, err := client.Get(fmt.Sprintf("http://%s%s", admin, path))
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
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if m := regexp.MustCompile(`msg=started .*admin=(\S+)`).FindStringSubmatch(stderr.String()); m != nil {
			admin = m[1]
			if code, body := get("/readyz"); code == http.StatusServiceUnavailable && strings.Contains(body, "[-]leader: ") && strings.Contains(body, "refused") {
				break
			}
		}
		if time.Now().After(deadline) {
			t.Fatalf("not said:\n%s", &stderr)
		}
	}
	if code, _ := get("/healthz"); code != http.StatusOK {
		t.Errorf("status %d", code)
	}
	if _, body := get("/state"); !strings.Contains(body, `"role":"controller"`) || strings.Contains(body, `"certificate"`) {
		t.Error(body)
	}
	if _, body := get("/metrics"); !strings.Contains(body, "edge_tunnel_controller_leading 0") || !strings.Contains(body, `certificates_denied_total{reason="replayed"} 0`) {
		t.Error(body)
	}
	select {
	case s := <-status:
		t.Fatalf("ended with %d:\n%s", s, &stderr)
	case <-time.After(time.Second):
	}
	stop()
	select {
	case s := <-status:
		if s != cli.StatusOK {
			t.Errorf("status %d:\n%s", s, &stderr)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("does not end")
	}
}

func TestMetricsAreNamedWell(t *testing.T) {
	client, err := kube.NewClient(kube.ClientOptions{Kubeconfig: kubeconfig(t)})
	if err != nil {
		t.Fatal(err)
	}
	c := &controller{skew: &kube.Skew{}}
	if c.leader, err = kube.NewLeader(kube.LeaderConfig{Client: client, Namespace: "a", Name: "b", Identity: "c"}); err != nil {
		t.Fatal(err)
	}
	if c.signer, err = kube.NewSigner(kube.SignerConfig{
		Client: client, Namespace: "a", Secret: "b", Trust: "c", Service: "d", Agent: "e", Server: "f",
	}); err != nil {
		t.Fatal(err)
	}
	if c.publisher, err = kube.NewPublisher(kube.PublisherConfig{Client: client, Component: "a", RecordsNamespace: "b", RecordsName: "c"}); err != nil {
		t.Fatal(err)
	}
	for _, m := range c.metrics() {
		if err := m.Validate(); err != nil {
			t.Error(err)
		}
	}
}

func TestBadStarts(t *testing.T) {
	config := kubeconfig(t)
	for _, c := range []struct {
		args   []string
		status int
		want   string
	}{
		{[]string{"--namespace", "No"}, cli.StatusUsage, "--namespace"},
		{[]string{"--ca-secret", ""}, cli.StatusUsage, "--ca-secret"},
		{[]string{"--agent-account", "tunnel-server"}, cli.StatusUsage, "are the same"},
		{[]string{"--ca-validity", "1h"}, cli.StatusUsage, "--ca-validity"},
		{[]string{"--certificate-validity", "1m"}, cli.StatusUsage, "--certificate-validity"},
		{[]string{"--certificate-validity", "3000h"}, cli.StatusUsage, "--certificate-validity"},
		{[]string{"--dns-configmap", "names"}, cli.StatusUsage, "is not NAMESPACE/NAME"},
		{[]string{"--dns-configmap", "a/b/c"}, cli.StatusUsage, "is not NAMESPACE/NAME"},
		{[]string{"--node-name", "No"}, cli.StatusUsage, "--node-name"},
		{[]string{"more"}, cli.StatusUsage, "unexpected argument"},
		{[]string{"--kubeconfig", config + "-not"}, cli.StatusFailed, "no such file"},
		{nil, cli.StatusFailed, "hint: outside of a pod, --kubeconfig"},
		{[]string{"--kubeconfig", config, "--admin", "192.0.2.1:1"}, cli.StatusFailed, "--admin"},
	} {
		var stderr lockedBuffer
		status := cli.Run(context.Background(), environment(&stderr, c.args...), run)
		if out := stderr.String(); status != c.status || !strings.Contains(out, c.want) || !strings.Contains(out, "error: ") {
			t.Errorf("%q: status %d and\n%swant status %d and %q", c.args, status, out, c.status, c.want)
		}
	}
}
