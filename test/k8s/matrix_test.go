// SPDX-License-Identifier: Apache-2.0

package k8s

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/edge-tunnel/edge-tunnel/test/kubebed"
)

// TestMatrix makes every check on every node: with a tunnel all of them pass, without one those on edge nodes fail.
func TestMatrix(t *testing.T) {
	begin := time.Now()
	since := func() time.Duration { return time.Since(begin).Round(100 * time.Millisecond) }
	var lab string
	t.Run("cluster", func(t *testing.T) {
		w := newWorld(t)
		lab = filepath.Dir(w.Lab.Dir())
		t.Logf("ready after %v", since())
		w.runPods()
		if err := errors.Join(w.StartMetricsServer(), w.StartDNS("hosts "+w.names()+" {\nreload 100ms\nfallthrough\n}"), w.StartPrometheus()); err != nil {
			t.Fatal(err)
		}
		t.Logf("pods run after %v", since())

		w.check("before", checks, false, w.Edge)
		w.tunnelUp()
		t.Logf("installed after %v", since())
		w.check("with", checks, true, w.Nodes())
		w.check("long", longChecks, true, w.Edge[:1])
		w.dropPorts()
		if err := w.lacking(); err != nil { // before the API server is killed: until it has read its roles again, it forbids everything
			t.Error(err)
		}
		w.addPorts()
		w.suffer()
		t.Logf("suffered after %v", since())
		w.tunnelDown()
		w.check("after", checks, false, w.Edge)
		t.Logf("checked after %v", since())

		// The nodes remember a CA that is gone.
		w.tunnelUp()
		w.check("again", []check{{"exec", (*client).exec}, {"logs -f", (*client).follow}}, true, w.Edge)
		w.breakServer()
		w.eventually(w.unused)
		w.tunnelDown()
		t.Logf("installed again and checked after %v", since())
	})
	if lab != "" {
		checkLeft(t, filepath.Base(lab))
	}
}

// check makes every check on the nodes, four at a time whatever the machine has, since they wait more than they work.
func (w *world) check(when string, checks []check, tunnel bool, nodes []*kubebed.Node) {
	type result struct {
		err  error
		took time.Duration
	}
	results := make([]result, len(nodes)*len(checks))
	slots := make(chan struct{}, 4)
	var wait sync.WaitGroup
	for i := range results {
		slots <- struct{}{}
		wait.Go(func() {
			defer func() { <-slots }()
			c := &client{w: w, node: nodes[i/len(checks)], limit: patience}
			if !tunnel {
				c.limit = 5 * time.Second
			}
			begin := time.Now()
			err := checks[i%len(checks)].run(c)
			results[i] = result{err, time.Since(begin)}
		})
	}
	wait.Wait()
	if tunnel && slices.ContainsFunc(results, func(r result) bool { return r.err != nil }) {
		w.showPods() // soon there may be others
	}
	for i, r := range results {
		w.t.Run(when+"/"+nodes[i/len(checks)].Name+"/"+checks[i%len(checks)].name, func(t *testing.T) {
			t.Logf("%v: %v", r.took.Round(time.Millisecond), r.err)
			if tunnel && r.err != nil {
				t.Error("fails with the tunnel")
			}
			if !tunnel && r.err == nil {
				t.Error("passes without a tunnel")
			}
		})
	}
}

// checkLeft looks for what the cluster may have left: everything of it has the name of its lab, or is a process in its cgroups.
func checkLeft(t *testing.T, lab string) {
	t.Helper()
	for _, pattern := range []string{filepath.Join(os.TempDir(), lab), "/sys/fs/cgroup/" + lab + "*", "/sys/fs/cgroup/*/" + lab + "*"} {
		left, err := filepath.Glob(pattern)
		if err != nil || len(left) > 0 {
			t.Errorf("left: %v, %v", left, err)
		}
	}
	groups, err := filepath.Glob("/proc/[0-9]*/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range append(groups, "/proc/self/mounts") {
		content, err := os.ReadFile(file)
		if stat, _ := os.ReadFile(filepath.Join(filepath.Dir(file), "stat")); bytes.Contains(stat, []byte(") Z ")) {
			continue // dead: its parent, the machine's first process, has not asked for its status yet
		}
		if err == nil && strings.Contains(string(content), lab) { // an error: the process has ended
			t.Errorf("left: %s:\n%s", file, content)
		}
	}
}
