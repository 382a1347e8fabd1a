// SPDX-License-Identifier: Apache-2.0

//go:build !nokube

package main

import (
	"context"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
	"github.com/edge-tunnel/edge-tunnel/cmd/internal/kubecert"
	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
	"github.com/edge-tunnel/edge-tunnel/pkg/kube"
	kubetext "github.com/edge-tunnel/edge-tunnel/pkg/kube/text"
)

// kubeconfig leads to an API server that is not there.
func kubeconfig(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "config")
	writeFile(t, file, `{"apiVersion": "v1", "kind": "Config", "current-context": "a", "clusters": [{"name": "a", "cluster": {"server": "http://127.0.0.1:1"}}],
		"contexts": [{"name": "a", "context": {"cluster": "a", "user": "a"}}], "users": [{"name": "a", "user": {}}]}`)
	return file
}

func TestLookupMetricsAreNamedWell(t *testing.T) {
	l, err := newLookup(cli.Env{}, options{cluster: kubecert.Options{Kubeconfig: kubeconfig(t)}, lookup: lookupOptions{serverService, t.TempDir()}}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range l.metrics() {
		if err := m.Validate(); err != nil {
			t.Error(err)
		}
	}
}

// An agent that found servers once finds them without an API server, by whichever address leads in. At a node it is content with what the
// certificate of every server says.
func TestServersFromDisk(t *testing.T) {
	dir := pki(t)
	cloud := startCloud(t, dir)
	f, state := files(dir, "edge-1"), t.TempDir()
	run := func(want string) {
		t.Helper()
		ctx, stop := context.WithCancel(context.Background())
		var log lockedBuffer
		socket := filepath.Join(t.TempDir(), "agent.sock")
		done := make(chan int)
		env := cli.Env{Name: "tunnel-agent", Stdout: io.Discard, Stderr: &log, Getenv: func(string) string { return "" }, Args: []string{
			"--kubeconfig", kubeconfig(t), "--state-dir", state, "--ca-cert", f.CA, "--cert", f.Cert, "--key", f.Key, "--admin", "127.0.0.1:0", "--control", socket}}
		go func() { done <- cli.Run(ctx, env, run) }()
		defer func() {
			stop()
			if status := <-done; status != cli.StatusOK {
				t.Errorf("status %d:\n%s", status, &log)
			}
		}()
		eventually(t, want, func() bool {
			status, err := admin.NewClient(socket).Status(ctx)
			if err != nil || status.Agent.Lookup.Stored != (len(status.Agent.Servers) > 0) {
				return false
			}
			text := ""
			for _, c := range status.Conditions {
				if c.Name == "tunnel" {
					text = c.Reason
				}
			}
			return strings.Contains(text, want) && (want != "" || status.Tunnels == 1)
		})
	}
	for common, want := range map[string]string{"10.96.0.77": "", "192.0.2.9": "not 192.0.2.9"} {
		writeFile(t, kube.ServersFile(state), string(kubetext.Servers{
			Service: serverService, Addrs: []string{"gone.invalid:10262"}, Nodes: []string{strings.Replace(cloud.addr, "127.0.0.1", "localhost", 1)}, Common: common,
		}.Format()))
		run(want)
	}
	if err := os.Remove(kube.ServersFile(state)); err != nil {
		t.Fatal(err)
	}
	run("no address of a server is known yet")
}
