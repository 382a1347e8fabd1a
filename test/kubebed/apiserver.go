// SPDX-License-Identifier: Apache-2.0

package kubebed

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"time"

	"golang.org/x/sys/unix"

	"github.com/edge-tunnel/edge-tunnel/test/netlab"
)

// startPatience is for a machine that is busy with other tests; alone it takes three seconds.
const startPatience = 2 * time.Minute

// Server is a kube-apiserver with an etcd of its own. Its methods end the test when they fail, so they are for the test's own goroutine.
type Server struct {
	URL string // https://127.0.0.1:PORT, the same after each restart

	t     netlab.T
	node  *netlab.Node
	pki   *pki
	addr  netip.AddrPort
	flags []string // further ones for kube-apiserver, which win
	admin *client

	etcd, api *netlab.Process
}

// APIServer starts a server on the machine's loopback and waits until it is ready. Flags are further ones for kube-apiserver. Its address
// stays reserved while the server is down, so that clients are refused then. Everything goes with the test.
func APIServer(t netlab.T, flags ...string) *Server {
	t.Helper()
	node := netlab.New(t).Host("apiserver")
	addr, release, err := reserve()
	if err != nil {
		t.Fatalf("reserve a port: %v", err)
	}
	t.Cleanup(release)
	return newServer(t, node, addr, append([]string{"--permit-port-sharing", "--endpoint-reconciler-type=none"}, flags...))
}

// newServer starts one on a node.
func newServer(t netlab.T, node *netlab.Node, addr netip.AddrPort, flags []string) *Server {
	t.Helper()
	s := &Server{URL: "https://" + addr.String(), t: t, node: node, addr: addr, flags: flags}
	err := s.prepare()
	if err == nil {
		err = s.start()
	}
	if err != nil {
		t.Fatalf("start an API server: %v", err)
	}
	return s
}

// reserve binds a free port of the loopback without listening there: nobody else gets it, and connects are refused until the API server,
// which shares it, listens.
func reserve() (netip.AddrPort, func(), error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return netip.AddrPort{}, nil, err
	}
	release := func() { _ = unix.Close(fd) }
	loopback := [4]byte{127, 0, 0, 1}
	err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrInet4{Addr: loopback})
	}
	var name unix.Sockaddr
	if err == nil {
		name, err = unix.Getsockname(fd)
	}
	if err != nil {
		release()
		return netip.AddrPort{}, nil, err
	}
	return netip.AddrPortFrom(netip.AddrFrom4(loopback), uint16(name.(*unix.SockaddrInet4).Port)), release, nil
}

// prepare makes the certificates and a folder in which each program has its name.
func (s *Server) prepare() error {
	bin, err := binary()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(s.node.Path("bin"), 0o755); err != nil {
		return err
	}
	for _, name := range []string{"etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl", "coredns", "metrics-server"} {
		if err := os.Symlink(bin, s.Program(name)); err != nil {
			return err
		}
	}
	if s.pki, err = newPKI(s.node.Path("pki"), net.IP(s.addr.Addr().AsSlice())); err != nil {
		return err
	}
	if err := s.writeKubeconfig("admin", "admin", "system:masters"); err != nil {
		return err
	}
	s.admin, err = s.newClient("admin", "system:masters")
	return err
}

// Addr is where the server listens.
func (s *Server) Addr() netip.AddrPort { return s.addr }

// Program is the path of one of Kubernetes' programs.
func (s *Server) Program(name string) string { return s.node.Path("bin", name) }

// Sockets, so that nobody else's port can be in the way. Relative ones in the folder that both programs run in, and etcd wants something
// like a port in the name.
const etcdURL, etcdPeerURL = "unix://client.sock:1", "unix://peer.sock:1"

func (s *Server) start() error {
	var err error
	if s.etcd == nil {
		s.etcd, err = s.launch("etcd", "--data-dir", "etcd", "--unsafe-no-fsync", "--log-level", "error",
			"--listen-client-urls", etcdURL, "--advertise-client-urls", etcdURL, "--listen-peer-urls", etcdPeerURL,
			"--initial-advertise-peer-urls", etcdPeerURL, "--initial-cluster", "default="+etcdPeerURL)
		if err != nil {
			return err
		}
	}
	args := []string{
		"--etcd-servers=" + etcdURL,
		"--bind-address=" + s.addr.Addr().String(), fmt.Sprintf("--secure-port=%d", s.addr.Port()), "--advertise-address=" + s.addr.Addr().String(),
		"--tls-cert-file=pki/apiserver.crt", "--tls-private-key-file=pki/apiserver.key", "--client-ca-file=pki/ca.crt",
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged",
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--service-account-key-file=pki/accounts.key", "--service-account-signing-key-file=pki/accounts.key",
		"--service-cluster-ip-range=" + services,
		"--kubelet-certificate-authority=pki/ca.crt",
		"--kubelet-client-certificate=pki/apiserver-kubelet-client.crt", "--kubelet-client-key=pki/apiserver-kubelet-client.key",
		"--requestheader-client-ca-file=pki/front-proxy-ca.crt", "--requestheader-allowed-names=front-proxy-client",
		"--requestheader-username-headers=X-Remote-User", "--requestheader-group-headers=X-Remote-Group",
		"--requestheader-extra-headers-prefix=X-Remote-Extra-",
		"--proxy-client-cert-file=pki/front-proxy-client.crt", "--proxy-client-key-file=pki/front-proxy-client.key",
		"--profiling=false",
	}
	if s.api, err = s.launch("kube-apiserver", append(args, s.flags...)...); err != nil {
		return err
	}
	return s.waitReady()
}

func (s *Server) launch(name string, args ...string) (*netlab.Process, error) {
	cmd := s.node.Command(context.Background(), s.Program(name), args...)
	cmd.Dir = s.node.Path()
	return s.node.StartCmd(cmd)
}

// waitReady waits until the server says so and has made the namespace of those who name none, which comes a moment later.
func (s *Server) waitReady() error {
	ctx, cancel := context.WithTimeout(context.Background(), startPatience)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	path := "/readyz"
	for {
		err := s.admin.do(ctx, http.MethodGet, path, nil, nil)
		switch {
		case err == nil && path == "/readyz":
			path = "/api/v1/namespaces/default"
			continue
		case err == nil:
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("not ready after %v: %w", startPatience, err)
		case <-s.etcd.Exited():
			return errors.New("etcd ended:\n" + s.etcd.Log())
		case <-s.api.Exited():
			return errors.New("kube-apiserver ended:\n" + s.api.Log())
		case <-tick.C:
		}
	}
}

// Stop ends the server as an upgrade does: with SIGTERM, answering what it has begun.
func (s *Server) Stop() {
	s.t.Helper()
	if err := s.api.Stop(startPatience); err != nil {
		s.t.Fatalf("stop the API server: %v", err)
	}
}

// Kill ends the server as a power cut does.
func (s *Server) Kill() { s.api.Kill() }

// Start starts a server that was stopped or killed, and waits until it is ready: same address, same data.
func (s *Server) Start() {
	s.t.Helper()
	if err := s.start(); err != nil {
		s.t.Fatalf("start the API server again: %v", err)
	}
}

// Save copies etcd's data as it is now and returns the copy's folder, for [Server.Restore].
func (s *Server) Save() string {
	s.t.Helper()
	dir, err := os.MkdirTemp(s.node.Path(), "saved-")
	if err == nil {
		err = s.frozen(func() error { return copyDir(s.node.Path("etcd"), dir) })
	}
	if err != nil {
		s.t.Fatalf("save etcd's data: %v", err)
	}
	return dir
}

// isFrozen matches what the kernel says of a cgroup all of whose processes stand still.
var isFrozen = regexp.MustCompile(`(?m)^frozen 1$`)

// frozen stops every process of the node while f runs, so that files do not change.
func (s *Server) frozen(f func() error) error {
	set := func(value string) error {
		return os.WriteFile(filepath.Join(s.node.Cgroup(), "cgroup.freeze"), []byte(value), 0)
	}
	err := set("1")
	for deadline := time.Now().Add(10 * time.Second); err == nil; time.Sleep(time.Millisecond) {
		var events []byte
		events, err = os.ReadFile(filepath.Join(s.node.Cgroup(), "cgroup.events"))
		if err == nil && isFrozen.Match(events) {
			err = f()
			break
		}
		if time.Now().After(deadline) {
			err = errors.New("the processes do not freeze")
		}
	}
	return errors.Join(err, set("0"))
}

// Restore kills the server and its etcd, and starts both with data that was saved before: what the cluster has learnt since then is
// forgotten, and resource versions go back, as after a restore from a backup.
func (s *Server) Restore(saved string) {
	s.t.Helper()
	s.api.Kill()
	s.etcd.Kill()
	s.etcd = nil
	data := s.node.Path("etcd")
	err := os.RemoveAll(data)
	if err == nil {
		err = copyDir(saved, data)
	}
	if err == nil {
		err = s.start()
	}
	if err != nil {
		s.t.Fatalf("restore etcd's data: %v", err)
	}
}

// copyDir copies a folder; to may exist if it is empty.
func copyDir(from, to string) error {
	// etcd makes large files before it fills them.
	if out, err := exec.Command("cp", "--archive", "--sparse=always", "--no-target-directory", from, to).CombinedOutput(); err != nil {
		return fmt.Errorf("copy %s: %w: %s", from, err, out)
	}
	return nil
}
