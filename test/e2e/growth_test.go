// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/cilium/ebpf"
)

// storeTargets writes a server's state: this many nodes, with one address each.
func (h *host) storeTargets(n int) {
	h.t.Helper()
	type claim struct {
		Node  string       `json:"node"`
		Addrs []netip.Addr `json:"addrs"`
	}
	state := struct {
		Version int     `json:"version"`
		Nodes   []claim `json:"nodes"`
	}{Version: 1}
	for i := range n {
		state.Nodes = append(state.Nodes, claim{fmt.Sprintf("stored-%d", i), []netip.Addr{farAddr(1, i)}})
	}
	content, err := json.Marshal(state)
	if err == nil {
		err = os.MkdirAll(h.Path("state"), 0o700)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(h.Path("state"), "targets.json"), content, 0o600)
	}
	if err != nil {
		h.t.Fatal(err)
	}
}

// farAddr is address i of a network of that number; nobody has it.
func farAddr(network byte, i int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 200 + network, byte(i >> 8), byte(i)})
}

// targetMap tells how large the pinned target map is, and how full.
func (h *host) targetMap() (size, used int) {
	h.t.Helper()
	m, err := ebpf.LoadPinnedMap(filepath.Join(h.BPFFS(), "edge-tunnel", "v1", "maps", "targets"), &ebpf.LoadPinOptions{ReadOnly: true})
	if err != nil {
		h.t.Fatal(err)
	}
	defer m.Close()
	key, value := make([]byte, m.KeySize()), make([]byte, m.ValueSize())
	for entries := m.Iterate(); entries.Next(&key, &value); {
		used++
	}
	return int(m.MaxEntries()), used
}

// The kernel's list of targets starts larger than its usual size, and is replaced by a larger one while more and more agents come. Connections that are
// made meanwhile all arrive, those that are open go on, and no target is without protection for a moment.
func TestTargetMapGrows(t *testing.T) {
	t.Parallel()
	const stored, agents, claims = 5000, 24, 64
	w := newWorld(t)
	cloud := w.cloud("cloud-1")
	pod := cloud.pod("pod-1")
	edge := w.site("home").edge("edge-1")
	cloud.storeTargets(stored)
	server := cloud.startServer("--tunneled-ports", fmt.Sprint(servicePort))
	edge.startAgent([]*host{cloud})
	server.waitTarget(edge.V4, "online")
	server.waitTarget(edge.V6, "online")
	before, used := cloud.targetMap()
	if used != stored+2 || before < used {
		t.Fatalf("the map has %d entries of %d", used, before)
	}
	if after := stored + 2 + agents*claims; after < before*3/4 {
		t.Fatalf("%d entries do not make a map of %d grow", after, before)
	}
	links := cloud.linkIDs()
	addr, addr6 := edge.serve(servicePort, echo), edge.serveAt(edge.at6(servicePort), echo)
	open := cloud.mustDial(addr)
	if err := exchange(open, "before"); err != nil {
		t.Fatal(err)
	}

	var (
		wg    sync.WaitGroup
		made  atomic.Int64
		ended = make(chan struct{})
	)
	for _, from := range []*host{cloud, pod} {
		for _, to := range []netip.AddrPort{addr, addr6} {
			wg.Go(func() {
				for {
					select {
					case <-ended:
						return
					default:
					}
					conn, err := from.dial(to)
					if err == nil {
						err = exchange(conn, "ping")
						conn.Close()
					}
					if err != nil {
						t.Errorf("%s from %s: %v", to, from.Name, err)
						return
					}
					made.Add(1)
				}
			})
		}
	}
	for i := range agents {
		f := forged{name: fmt.Sprintf("growing-%d", i)}
		for j := range claims {
			f.addrs = append(f.addrs, farAddr(2, i*claims+j))
		}
		w.forge(f)
		edge.logIn(cloud, f.name)
	}
	total := stored + 2 + agents*claims
	server.waitMetric(`edge_tunnel_targets{state="offline"}`, float64(total-2))
	eventually(t, patience, func() error {
		size, used := cloud.targetMap()
		if size <= before || used != total {
			return fmt.Errorf("the map has %d entries of %d, before it was one of %d", used, size, before)
		}
		return nil
	})
	close(ended)
	wg.Wait()
	t.Logf("%d connections were made meanwhile", made.Load())
	if made.Load() < 20 {
		t.Error("too few to prove anything")
	}

	server.waitLog("Replaced the target map by a larger one")
	m := server.metrics()
	if redirected := m.bpf("redirected_pod4") + m.bpf("redirected_pod6"); redirected == 0 || m.bpf("offline") != 0 {
		t.Errorf("%v connects of the pod were redirected, %v refused", redirected, m.bpf("offline"))
	}
	wantLinks(t, cloud, links)
	if err := exchange(open, "after"); err != nil {
		t.Error(err)
	}

	// All of it was stored, too.
	server.Kill()
	if _, used := cloud.targetMap(); used != total {
		t.Errorf("the map of the dead server has %d entries", used)
	}
	server = cloud.startServer("--tunneled-ports", fmt.Sprint(servicePort))
	server.waitTarget(edge.V4, "online")
	if m := server.metrics(); m[`edge_tunnel_targets{state="offline"}`]+m[`edge_tunnel_targets{state="online"}`] != float64(total) {
		t.Errorf("after the restart: %v offline, %v online", m[`edge_tunnel_targets{state="offline"}`], m[`edge_tunnel_targets{state="online"}`])
	}
	cloud.mustEcho(addr)
}
