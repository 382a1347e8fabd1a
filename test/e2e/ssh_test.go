// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/edge-tunnel/edge-tunnel/test/foreign"
	"github.com/edge-tunnel/edge-tunnel/test/netlab"
)

// rsyncPort is where rsync's daemon listens.
const rsyncPort = 873

// startFiles starts OpenSSH's server and rsync's daemon on the edge.
func (s *oneSite) startFiles() {
	s.t.Helper()
	args, err := foreign.SSHD(s.edge.Node, s.lab.Dir())
	s.edge.startForeign(s.edge.at(foreign.SSHPort), args, err)
	args, err = foreign.RSYNCD(s.lab.Dir(), rsyncPort)
	s.edge.startForeign(s.edge.at(rsyncPort), args, err)
}

func filePorts() []string {
	return []string{"--tunneled-ports", fmt.Sprint(foreign.SSHPort, ",", rsyncPort)}
}

// ssh runs commands on the edge: their exit status, both outputs and their input come through, and the end of the input.
func TestSSHExec(t *testing.T) {
	t.Parallel()
	s := newSite(t, filePorts()...)
	pod := s.cloud.pod("pod-1")
	s.startFiles()
	edgeNamespace := strings.TrimSpace(s.edge.mustRun("readlink", "/proc/self/ns/net"))

	for _, h := range []*host{s.cloud, pod} {
		for _, to := range []netip.Addr{s.edge.V4, s.edge.V6} {
			ssh := func(script string) *netlab.Cmd {
				args := append([]string{"ssh"}, foreign.SSHOptions()...)
				return h.command(t.Context(), append(args, "root@"+to.String(), script)...)
			}
			out, err := ssh("readlink /proc/self/ns/net").CombinedOutput()
			if err != nil || strings.TrimSpace(string(out)) != edgeNamespace {
				t.Errorf("ssh from %s to %s: %v, namespace %s, want %s", h.Name, to, err, out, edgeNamespace)
			}
			// sort answers when its input has ended, not before.
			cmd := ssh("sort; echo done >&2; exit 7")
			cmd.Stdin = strings.NewReader("c\na\nb\n")
			out, err = cmd.CombinedOutput()
			if err == nil || cmd.ProcessState.ExitCode() != 7 || string(out) != "a\nb\nc\ndone\n" {
				t.Errorf("ssh from %s to %s: %v, output %q", h.Name, to, err, out)
			}
		}
	}
	s.server.waitIdle()
	s.agent.waitIdle()
}

// bulkVariable changes how many MiB are copied, each of four times.
const bulkVariable = "EDGE_TUNNEL_BULK_MIB"

func bulkSize(t *testing.T) int64 {
	t.Helper()
	text := os.Getenv(bulkVariable)
	if text == "" {
		return 1 << 30
	}
	n, err := strconv.ParseInt(text, 10, 32)
	if err != nil || n < 1 {
		t.Fatalf("%s is %q, not a number of MiB", bulkVariable, text)
	}
	return n << 20
}

// scp and rsync copy a GiB to the edge and another one back.
func TestBulkCopies(t *testing.T) {
	t.Parallel()
	size := bulkSize(t)
	w := newPlainWorld(t)
	s := w.startSite(filePorts()...)
	pod := s.cloud.pod("pod-1")
	s.startFiles()

	in := func(file string) string { return filepath.Join(w.lab.Dir(), file) }
	want := fill(t, in("original"), size)
	for _, c := range []struct {
		client *host
		args   []string
		remote string // the edge's file, as the client names it
		file   string // the same, as it is on the disk of this machine
	}{
		{s.cloud, append([]string{"scp", "-q"}, foreign.SSHOptions()...), fmt.Sprintf("root@%s:%s", s.edge.V4, in("by-scp")), in("by-scp")},
		{pod, []string{"rsync"}, fmt.Sprintf("rsync://[%s]:%d/files/by-rsync", s.edge.V6, rsyncPort), in("rsync/files/by-rsync")},
	} {
		for _, way := range []struct{ from, to, file string }{{"original", c.remote, c.file}, {c.remote, "copy", in("copy")}} {
			began := time.Now()
			if out, err := c.client.outputWithin(5*time.Minute, append(c.args, way.from, way.to)...); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			t.Logf("%s to %s: %d MiB in %.1f s", c.args[0], way.to, size>>20, time.Since(began).Seconds())
			if got := checksum(t, way.file); got != want {
				t.Errorf("%s from %s to %s: the copy's SHA-256 is %x, want %x", c.args[0], way.from, way.to, got, want)
			}
		}
		for _, file := range []string{c.file, in("copy")} {
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
		}
	}
	s.server.waitIdle()
	s.agent.waitIdle()
	m := s.server.metrics()
	for _, direction := range []string{"sent", "received"} {
		if got := m[fmt.Sprintf("edge_tunnel_connection_bytes_total{direction=%q}", direction)]; got < float64(2*size) {
			t.Errorf("%v bytes were %s through the tunnel, want at least %d", got, direction, 2*size)
		}
	}
}

// fill writes a file of that size, a whole number of MiB, and returns its SHA-256. Nothing can compress a MiB of it, and no two of them are the same.
func fill(t *testing.T, path string, size int64) [sha256.Size]byte {
	t.Helper()
	file, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	sum := sha256.New()
	piece := make([]byte, 1<<20)
	_, _ = rand.NewChaCha8([32]byte{}).Read(piece)
	for n := range size >> 20 {
		binary.LittleEndian.PutUint64(piece, uint64(n))
		sum.Write(piece)
		if _, err := file.Write(piece); err != nil {
			t.Fatal(err)
		}
	}
	return [sha256.Size]byte(sum.Sum(nil))
}

func checksum(t *testing.T, path string) [sha256.Size]byte {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, file); err != nil {
		t.Fatal(err)
	}
	return [sha256.Size]byte(sum.Sum(nil))
}
