// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

type hintedError struct{ error }

func (hintedError) Hint() string   { return "wait a little" }
func (hintedError) Reason() string { return "busy" }

func testControl() Control {
	return Control{
		Status: func() Status {
			return Status{Role: RoleServer, Name: "cloud-1", Server: &ServerStatus{Intercept: "all"}}
		},
		Targets: func() []Target {
			return []Target{{Addr: netip.MustParseAddr("10.99.1.10"), Node: "edge-1", State: TargetOffline}}
		},
		Tunnels:     func() []Tunnel { return nil },
		Connections: func() []Connection { return []Connection{{Trace: "1f", Node: "edge-1", SentBytes: 1 << 40}} },
		Forget: func(_ context.Context, node string) (Forgotten, error) {
			switch node {
			case "edge-1":
				return Forgotten{Node: node, Targets: 1}, nil
			case "busy":
				return Forgotten{}, fmt.Errorf("forget %s: %w", node, hintedError{errors.New("not now")})
			}
			return Forgotten{}, fmt.Errorf("%w: %s", ErrUnknownNode, node)
		},
	}
}

// controlled serves c on a socket in a folder that does not exist yet.
func controlled(t *testing.T, c Control) (path string, stop func()) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "run", "server.sock")
	ln, err := ListenControl(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	return path, running(t, ln, c.Serve)
}

func TestControl(t *testing.T) {
	control := testControl()
	var drained atomic.Bool
	control.Drain = func(context.Context) error { drained.Store(true); return nil }
	path, stop := controlled(t, control)
	client, ctx := NewClient(path), t.Context()

	if s, err := client.Status(ctx); err != nil || s.Name != "cloud-1" || s.Server == nil || s.Server.Intercept != "all" || s.Agent != nil {
		t.Errorf("status %+v, %v", s, err)
	}
	if l, err := client.Targets(ctx); err != nil || l.Source != SourceDaemon || len(l.Targets) != 1 || l.Targets[0].Node != "edge-1" {
		t.Errorf("targets %+v, %v", l, err)
	}
	if l, err := client.Tunnels(ctx); err != nil || l.Tunnels == nil || len(l.Tunnels) != 0 {
		t.Errorf("tunnels %#v, %v: want a list without entries", l, err)
	}
	if l, err := client.Connections(ctx); err != nil || len(l.Connections) != 1 || l.Connections[0].SentBytes != 1<<40 {
		t.Errorf("connections %+v, %v", l, err)
	}
	if f, err := client.Forget(ctx, "edge-1"); err != nil || f.Targets != 1 {
		t.Errorf("forget %+v, %v", f, err)
	}
	if _, err := client.Forget(ctx, "edge-9"); !errors.Is(err, ErrUnknownNode) || err.Error() != "unknown node: edge-9" {
		t.Errorf("forget: %v", err)
	}
	var refused *Refusal
	if _, err := client.Forget(ctx, "busy"); !errors.As(err, &refused) || refused.Reason() != "busy" || refused.Hint() != "wait a little" ||
		refused.Status != http.StatusConflict || errors.Is(err, ErrUnknownNode) {
		t.Errorf("forget: %v", err)
	}
	if _, err := client.Forget(ctx, strings.Repeat("x", 5000)); !errors.As(err, &refused) || refused.Status != http.StatusBadRequest {
		t.Errorf("forget: %v", err)
	}
	if err := client.Drain(ctx); err != nil || !drained.Load() {
		t.Errorf("drain: %v, begun: %v", err, drained.Load())
	}
	stop()
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket is left behind: %v", err)
	}
}

func TestControlOfADaemonThatCannot(t *testing.T) {
	path, _ := controlled(t, Control{Status: func() Status { return Status{Role: RoleAgent} }})
	_, err := NewClient(path).Targets(t.Context())
	var refused *Refusal
	if !errors.As(err, &refused) || refused.Reason() != "not_supported" {
		t.Errorf("targets: %v", err)
	}
}

func TestClientErrors(t *testing.T) {
	dir := t.TempDir()
	ask := func(path string) (hint string, err error) {
		_, err = NewClient(path).Status(t.Context())
		var unreachable *UnreachableError
		if !errors.As(err, &unreachable) {
			t.Fatalf("%s: %T %v", path, err, err)
		}
		return unreachable.Hint(), err
	}
	if hint, err := ask(filepath.Join(dir, "absent.sock")); !errors.Is(err, ErrNotRunning) || !strings.Contains(hint, "--control") {
		t.Errorf("%v, %s", err, hint)
	}
	if hint, err := ask(stale(t, filepath.Join(dir, "stale.sock"))); !errors.Is(err, ErrNotRunning) || !strings.Contains(hint, "log") {
		t.Errorf("%v, %s", err, hint)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ask(file); err == nil {
		t.Error("a file answered")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := NewClient(file).Status(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

func TestClientMistrustsAnswers(t *testing.T) {
	for body, want := range map[string]string{
		"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{\"na":              "read answer of the daemon",
		"HTTP/1.1 500 Oh\r\nContent-Length: 4\r\n\r\noops":               "the daemon answered 500 Oh",
		"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\n{}":          "the daemon answered 404 Not Found",
		"SSH-2.0-OpenSSH_9.2\r\n":                                        "ask the daemon at",
		"HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n{\"pid\": \"no\"}": "read answer of the daemon",
	} {
		path := filepath.Join(t.TempDir(), "s")
		ln, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			defer conn.Close()
			_, _ = conn.Read(make([]byte, 4096))
			_, _ = conn.Write([]byte(body))
		})
		if _, err := NewClient(path).Status(t.Context()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.30q: %v, want %q", body, err, want)
		}
		ln.Close()
		wg.Wait()
	}
}

// stale makes a socket file on which nobody listens.
func stale(t *testing.T, path string) string {
	t.Helper()
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	ln.Close()
	return path
}

func TestSocketIsPrivateFromTheStart(t *testing.T) {
	old := syscall.Umask(0) // the worst one
	defer syscall.Umask(old)
	path := filepath.Join(t.TempDir(), "a", "b", "server.sock")
	ln, err := ListenControl(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if info, err := os.Lstat(path); err != nil || info.Mode() != fs.ModeSocket|0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if info, err := os.Lstat(filepath.Dir(path)); err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("folder has mode %v, %v", info.Mode(), err)
	}
}

func TestOthersMayNotConnect(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to become somebody else")
	}
	dir, err := os.MkdirTemp("/tmp", "") // t.TempDir's parents keep others out already
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "s")
	ln, err := ListenControl(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	got := make(chan error)
	go func() {
		// Raw system calls change this thread only; it ends with the goroutine that never unlocks it.
		runtime.LockOSThread()
		if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESUID, 65534, 65534, 65534); errno != 0 {
			got <- errno
			return
		}
		fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
		if err == nil {
			err = syscall.Connect(fd, &syscall.SockaddrUnix{Name: path})
			_ = syscall.Close(fd)
		}
		got <- err
	}()
	err = <-got
	if !errors.Is(err, fs.ErrPermission) {
		t.Errorf("got %v", err)
	}
}

func TestListenControlReplacesOnlyWhatIsDead(t *testing.T) {
	dir := t.TempDir()
	reasonOf := func(err error) string {
		var socket *SocketError
		if !errors.As(err, &socket) {
			t.Fatalf("%T %v", err, err)
		}
		if socket.Hint() == "" && socket.Reason() != "unusable" {
			t.Errorf("%v has no hint", err)
		}
		return socket.Reason()
	}

	path := stale(t, filepath.Join(dir, "stale"))
	ln, err := ListenControl(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ListenControl(t.Context(), path); reasonOf(err) != "in_use" {
		t.Error(err)
	}
	ln.Close()

	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ListenControl(t.Context(), file); reasonOf(err) != "not_a_socket" {
		t.Error(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	if _, err := ListenControl(t.Context(), link); reasonOf(err) != "not_a_socket" {
		t.Error(err)
	}
	if content, _ := os.ReadFile(file); string(content) != "precious" {
		t.Error("the file was touched")
	}
	if _, err := ListenControl(t.Context(), filepath.Join(file, "s")); reasonOf(err) != "unusable" {
		t.Error(err)
	}
	if _, err := ListenControl(t.Context(), filepath.Join(dir, strings.Repeat("x", 108))); reasonOf(err) != "unusable" {
		t.Error(err)
	}
}

// A daemon whose backlog is full is alive, although nobody gets through to it.
func TestListenControlLeavesABusyDaemonAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(fd)
	if err := errors.Join(syscall.Bind(fd, &syscall.SockaddrUnix{Name: path}), syscall.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	for range 8 {
		conn, err := net.DialTimeout("unix", path, 100*time.Millisecond)
		if err != nil {
			break
		}
		defer conn.Close()
	}
	var socket *SocketError
	if _, err := ListenControl(t.Context(), path); !errors.As(err, &socket) || socket.Reason() != "in_use" {
		t.Errorf("got %v", err)
	}
}

func TestOneOfManyGetsTheSocket(t *testing.T) {
	path := stale(t, filepath.Join(t.TempDir(), "s"))
	var wg sync.WaitGroup
	got := make(chan net.Listener, 16)
	for range cap(got) {
		wg.Go(func() {
			if ln, err := ListenControl(t.Context(), path); err == nil {
				got <- ln
			}
		})
	}
	wg.Wait()
	close(got)
	n := 0
	for ln := range got {
		n++
		ln.Close()
	}
	if n != 1 {
		t.Errorf("%d have it", n)
	}
}

// Whatever comes in, the answer is JSON, and a refusal says why.
func FuzzControl(f *testing.F) {
	for _, s := range [][3]string{
		{"GET", "/v1/status", ""}, {"POST", "/v1/forget", `{"node":"edge-1"}`}, {"POST", "/v1/forget", `{"node":"edge-1"}{}`},
		{"POST", "/v1/forget", `{"node":1}`}, {"POST", "/v1/forget", `{"nodes":"a"}`}, {"POST", "/v1/drain", "{}"}, {"PUT", "/v1/status", ""}, {"GET", "/", ""},
		{"POST", "/v1/forget", `{"node":"` + strings.Repeat("x", 9000) + `"}`},
	} {
		f.Add(s[0], s[1], []byte(s[2]))
	}
	handler := testControl().Handler()
	f.Fuzz(func(t *testing.T, method, path string, body []byte) {
		r, err := http.NewRequest(method, "http://x"+path, bytes.NewReader(body))
		if err != nil || !strings.HasPrefix(path, "/") {
			return
		}
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, r)
		if w.Code/100 == 3 || method == http.MethodConnect { // the mux cleans paths
			return
		}
		var answer map[string]any
		if err := json.Unmarshal(w.Body.Bytes(), &answer); err != nil {
			t.Fatalf("%d, no JSON: %q", w.Code, w.Body)
		}
		if _, refused := answer["error"]; refused == (w.Code == http.StatusOK) {
			t.Errorf("status %d with %s", w.Code, w.Body)
		}
	})
}
