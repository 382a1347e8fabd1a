// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"testing"
)

func TestWhichDaemonIsAsked(t *testing.T) {
	dir := t.TempDir()
	server, agent := filepath.Join(dir, "server.sock"), filepath.Join(dir, "agent.sock")
	ask := func(given, agentToo string) string {
		return (&daemon{server: server, agent: agentToo, given: given}).client().Path()
	}
	if got := ask(server, agent); got != server {
		t.Errorf("without any socket it asks %s", got)
	}
	touch(t, agent)
	if got := ask(server, agent); got != agent {
		t.Errorf("with the agent's socket only it asks %s", got)
	}
	if got := ask(server, ""); got != server {
		t.Errorf("a command for servers asks %s", got)
	}
	if got := ask("/elsewhere", agent); got != "/elsewhere" {
		t.Errorf("told where, it asks %s", got)
	}
	touch(t, server)
	if got := ask(server, agent); got != server {
		t.Errorf("with both sockets it asks %s", got)
	}
}

func touch(t *testing.T, path string) {
	t.Helper()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
}
