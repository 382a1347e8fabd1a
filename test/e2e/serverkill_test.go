// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"maps"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/edge-tunnel/edge-tunnel/pkg/redirect"
)

// A server that is killed leaves the interception in force: connects are refused at once, nobody can take its ports, and its
// successor goes on with what is pinned.
func TestServerKilled(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	pod := s.cloud.pod("pod-1")
	addr := s.edge.serve(servicePort, echo)
	s.cloud.mustEcho(addr)
	pod.mustEcho(addr)
	open := s.cloud.mustDial(addr)
	if err := exchange(open, "still here"); err != nil {
		t.Fatal(err)
	}
	links := s.cloud.linkIDs()
	wantLinks(t, s.cloud, links)

	s.server.Kill()
	waitReset(t, open, patience) // not an orderly end: a part must not be taken for the whole
	for _, h := range []*host{s.cloud, pod} {
		for _, to := range []netip.AddrPort{addr, s.edge.at6(servicePort)} {
			_, took, err := h.dialWith(to, dialOptions{})
			wantErrno(t, err, syscall.ECONNREFUSED)
			if took > time.Second {
				t.Errorf("%s: %s: refused after %v", h.Name, to, took)
			}
		}
	}

	refused := 0
	for _, to := range []string{"127.0.0.1:10270", "[::1]:10277", "0.0.0.0:10271", "[::]:10272", s.cloud.at(10273).String(), s.cloud.at6(10274).String()} {
		for _, uid := range []int{nobody, 0} {
			ln, err := s.cloud.listen(netip.MustParseAddrPort(to), uid)
			if err == nil {
				ln.Close()
				t.Fatalf("user %d could take %s", uid, to)
			}
			wantErrno(t, err, syscall.EACCES)
			refused++
		}
	}
	pinned, err := redirect.ReadPinned(s.cloud.BPFFS())
	if err != nil {
		t.Fatal(err)
	}
	if pinned.Counters.BindRefused != uint64(refused) {
		t.Errorf("the kernel refused %d binds, want %d", pinned.Counters.BindRefused, refused)
	}
	if len(pinned.Targets) != 2 || len(pinned.Detached) != 0 {
		t.Errorf("in force while the server is away: %+v", pinned)
	}
	// Other ports are everybody's, and in a pod these are, too.
	for _, free := range []struct {
		host *host
		addr string
	}{{s.cloud, "127.0.0.1:10278"}, {pod, "127.0.0.1:10270"}} {
		ln, err := free.host.listen(netip.MustParseAddrPort(free.addr), nobody)
		if err != nil {
			t.Fatalf("%s: %v", free.host.Name, err)
		}
		ln.Close()
	}

	s.server = s.cloud.startServer("--tunneled-ports", fmt.Sprint(servicePort))
	if now := s.cloud.linkIDs(); !maps.Equal(now, links) {
		t.Errorf("links %v, before %v", now, links)
	}
	wantLinks(t, s.cloud, links)
	if got := s.server.metrics().bpf("bind_refused"); got != float64(refused) {
		t.Errorf("after the restart %v binds were refused, want %d: the counters are not the pinned ones", got, refused)
	}
	s.server.waitTarget(s.edge.V4, "online")
	s.cloud.mustEcho(addr)
	pod.mustEcho(addr)
	s.server.waitIdle()
}

// wantLinks checks that the cgroup of a node has exactly one program on each hook, and that these are the pinned links'.
func wantLinks(t *testing.T, h *host, pinned map[string]uint32) {
	t.Helper()
	if len(pinned) != 7 {
		t.Errorf("%d links are pinned, want 7: %v", len(pinned), pinned)
	}
	dir, err := os.Open(h.Cgroup())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	for _, hook := range []ebpf.AttachType{
		ebpf.AttachCGroupInet4Connect, ebpf.AttachCGroupInet6Connect, ebpf.AttachCgroupInet4GetPeername, ebpf.AttachCgroupInet6GetPeername,
		ebpf.AttachCGroupInet4Bind, ebpf.AttachCGroupInet6Bind, ebpf.AttachCGroupSockOps,
	} {
		found, err := link.QueryPrograms(link.QueryOptions{Target: int(dir.Fd()), Attach: hook})
		if err != nil {
			t.Fatal(err)
		}
		if len(found.Programs) != 1 {
			t.Errorf("%d programs on %s, want 1", len(found.Programs), hook)
		}
	}
}
