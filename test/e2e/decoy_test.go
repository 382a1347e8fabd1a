// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

// decoy is a machine that happens to have an edge node's address, and that a cloud node and its pods can reach: private addresses are used twice. It is
// who gets what is not intercepted.
type decoy struct {
	*host
	at netip.AddrPort
}

// decoyWord is what a decoy says first, whatever it hears.
const decoyWord = "I am a stranger"

func stranger(conn *net.TCPConn) {
	if _, err := io.WriteString(conn, decoyWord); err == nil {
		hold(conn)
	}
}

// newDecoy makes one beside a cloud node's pods, serving that address.
func (h *host) newDecoy(at netip.AddrPort) *decoy {
	h.t.Helper()
	d := &decoy{h.pod("decoy"), at}
	if err := d.AddAddr("eth0", netip.PrefixFrom(at.Addr(), at.Addr().BitLen())); err != nil {
		h.t.Fatal(err)
	}
	bridge, err := h.Netlink().LinkByName("cni0")
	if err != nil {
		h.t.Fatal(err)
	}
	to := net.IPNet{IP: at.Addr().AsSlice(), Mask: net.CIDRMask(at.Addr().BitLen(), at.Addr().BitLen())}
	if err := h.Netlink().RouteAdd(&netlink.Route{Dst: &to, LinkIndex: bridge.Attrs().Index, Scope: netlink.SCOPE_LINK}); err != nil {
		h.t.Fatal(err)
	}
	d.serveAt(at, stranger)
	return d
}

// reached says who answers at the decoy's address: the decoy, or the edge, which has an echo there.
func (d *decoy) reached(from *host, o dialOptions) (decoy bool, err error) {
	conn, _, err := from.dialWith(d.at, o)
	if err != nil {
		return false, err
	}
	defer conn.Close()
	return whoAnswers(conn)
}

// whoAnswers tells a decoy from an echo.
func whoAnswers(conn net.Conn) (decoy bool, err error) {
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return false, err
	}
	if _, err := io.WriteString(conn, decoyWord[:1]); err != nil {
		return false, err
	}
	if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
		return false, err
	}
	// The echo has no more to say until it is told to.
	_ = conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	switch _, err = conn.Read(make([]byte, 1)); {
	case err == nil:
		return true, nil
	case errors.Is(err, os.ErrDeadlineExceeded):
		return false, nil
	}
	return false, err
}

// wantDecoy fails unless the decoy answers or, if not wanted, the edge.
func (d *decoy) wantDecoy(from *host, want bool, o dialOptions) {
	d.t.Helper()
	if decoy, err := d.reached(from, o); err != nil || decoy != want {
		d.t.Errorf("from %s the decoy answers: %t (%v), want %t", from.Name, decoy, err, want)
	}
}

// A socket without room for its record is refused and counted. It does not go direct: somebody else is there.
//
// Not parallel: before Linux 6.8 there is one optmem_max for the whole machine.
func TestNoSocketStorage(t *testing.T) {
	s := newSite(t)
	pod, otherPod := s.cloud.pod("pod-1"), s.cloud.pod("pod-2")
	addr := s.edge.serve(servicePort, echo)
	decoy := s.cloud.newDecoy(addr)
	for _, from := range []*host{s.cloud, pod, otherPod} {
		decoy.wantDecoy(from, false, dialOptions{})
	}
	decoy.serveAt(netip.AddrPortFrom(addr.Addr(), 7000), stranger)
	straight := pod.mustDial(netip.AddrPortFrom(addr.Addr(), 7000)) // not tunneled: the way is there
	if decoy, err := whoAnswers(straight); err != nil || !decoy {
		t.Fatalf("the decoy cannot be reached: %v", err)
	}

	before := s.server.metrics()
	restore := pod.setOptmem("0")
	for range 3 {
		if conn, err := pod.dial(addr); err == nil {
			decoy, err := whoAnswers(conn)
			t.Fatalf("connected without storage; a stranger answers: %t (%v)", decoy, err)
		} else {
			wantErrno(t, err, syscall.ENOMEM)
		}
	}
	if _, err := pod.dial(netip.AddrPortFrom(addr.Addr(), 7000)); err != nil {
		t.Errorf("a connect that is not ours: %v", err)
	}
	restore()
	m := s.server.metrics()
	if got := m.bpf("storage_failed") - before.bpf("storage_failed"); got != 3 {
		t.Errorf("%v connects counted, want 3", got)
	}
	if m.bpf("redirected_pod4") != before.bpf("redirected_pod4") {
		t.Error("one was redirected")
	}
	for _, from := range []*host{s.cloud, pod, otherPod} {
		decoy.wantDecoy(from, false, dialOptions{})
	}
}

// setOptmem sets how much memory options of a socket may take in the node's namespace, and returns what undoes it.
func (h *host) setOptmem(value string) (restore func()) {
	h.t.Helper()
	const path = "/proc/sys/net/core/optmem_max"
	set := func(value string) (before []byte) {
		change := func() (err error) {
			if before, err = os.ReadFile(path); err == nil {
				err = os.WriteFile(path, []byte(strings.TrimSpace(value)), 0)
			}
			return err
		}
		err := h.Do(change)
		if errors.Is(err, os.ErrNotExist) {
			err = change() // the machine's: this kernel has only that
		}
		if err != nil {
			h.t.Fatal(err)
		}
		return before
	}
	before, restored := string(set(value)), false
	restore = func() {
		if !restored {
			restored = true
			set(before)
		}
	}
	h.t.Cleanup(restore)
	return restore
}

// A cgroup that is opted out, with all below it, goes direct. Others do not; it may come to be while the server runs.
func TestOptOut(t *testing.T) {
	t.Parallel()
	s := newSite(t, "--opt-out-cgroup", "system/backup,later")
	pod := s.cloud.pod("pod-1")
	decoy := s.cloud.newDecoy(s.edge.serve(servicePort, echo))
	ask := func(folder string) string {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		dir := filepath.Join(s.cloud.Cgroup(), folder)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		out, err := s.cloud.helper(ctx, "ask-in-cgroup", dir, decoy.at.String()).CombinedOutput()
		if err != nil {
			t.Fatalf("in %s: %v: %s", folder, err, out)
		}
		return strings.TrimSpace(string(out))
	}
	// The folders are not there yet, and are looked for every few seconds.
	for _, folder := range []string{"system/backup", "later"} {
		eventually(t, patience, func() error {
			if got := ask(folder); got != "decoy" {
				return fmt.Errorf("from %s the %s answers", folder, got)
			}
			return nil
		})
	}
	before := s.server.metrics()
	for folder, want := range map[string]string{
		"system/backup":           "decoy",
		"system/backup/job/7":     "decoy",
		"later/deep/er/than/that": "decoy",
		"system":                  "edge",
		"system/backups":          "edge",
		"":                        "edge",
	} {
		if got := ask(folder); got != want {
			t.Errorf("from %q the %s answers, want the %s", folder, got, want)
		}
	}
	if got := s.server.metrics().bpf("opted_out") - before.bpf("opted_out"); got != 3 {
		t.Errorf("%v connects counted, want 3", got)
	}
	decoy.wantDecoy(s.cloud, false, dialOptions{})
	decoy.wantDecoy(pod, false, dialOptions{})
}

// askInCgroupMain moves to a cgroup, connects, and says who answers: "decoy" or "edge".
func askInCgroupMain(args []string) int {
	who, err := func() (string, error) {
		if err := os.WriteFile(filepath.Join(args[0], "cgroup.procs"), []byte("0"), 0); err != nil {
			return "", err
		}
		conn, err := net.DialTimeout("tcp", args[1], patience)
		if err != nil {
			return "", err
		}
		defer conn.Close()
		if decoy, err := whoAnswers(conn); err != nil || decoy {
			return "decoy", err
		}
		return "edge", nil
	}()
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println(who)
	return 0
}

// With --intercept host the pods of the node are left alone.
func TestInterceptHostOnly(t *testing.T) {
	t.Parallel()
	s := newSite(t, "--intercept", "host")
	pod := s.cloud.pod("pod-1")
	decoy := s.cloud.newDecoy(s.edge.serve(servicePort, echo))
	before := s.server.metrics()
	decoy.wantDecoy(pod, true, dialOptions{})
	decoy.wantDecoy(s.cloud, false, dialOptions{})
	m := s.server.metrics()
	if skipped, redirected := m.bpf("pod_skipped")-before.bpf("pod_skipped"), m.bpf("redirected_pod4")+m.bpf("redirected_pod6"); skipped != 1 || redirected != 0 {
		t.Errorf("%v connects of the pod were skipped, %v redirected", skipped, redirected)
	}
	status, err := s.server.client().Status(t.Context())
	if err != nil || status.Server.Intercept != "host" {
		t.Errorf("status %+v, %v", status.Server, err)
	}

	// Changing one's mind needs a restart only.
	s.server.stop()
	s.server = s.cloud.startServer("--tunneled-ports", fmt.Sprint(servicePort))
	s.server.waitTarget(s.edge.V4, "online")
	decoy.wantDecoy(pod, false, dialOptions{})
	decoy.wantDecoy(s.cloud, false, dialOptions{})
}
