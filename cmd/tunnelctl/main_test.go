// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"go.uber.org/goleak"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
)

func TestMain(m *testing.M) {
	testscript.Main(leakChecked{m}, map[string]func(){
		"tunnelctl": main,
		"daemon":    func() { cli.Main(daemonRun) },
	})
}

// leakChecked runs the tests and fails when a goroutine outlives them.
type leakChecked struct{ m *testing.M }

func (l leakChecked) Run() int {
	status := l.m.Run()
	if err := goleak.Find(); err != nil && status == 0 {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return status
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			env.Setenv("GORACE", "atexit_sleep_ms=0") // the race detector's default is a second for each command
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"appears": appears,
			"status":  exitStatus,
			"mode":    mode,
			"retry":   retry,
		},
	})
}

// appears waits for files: the sockets of daemons that were started in the background.
func appears(ts *testscript.TestScript, _ bool, files []string) {
	deadline := time.Now().Add(20 * time.Second)
	for _, file := range files {
		for {
			if _, err := os.Lstat(ts.MkAbs(file)); err == nil {
				break
			}
			if time.Now().After(deadline) {
				ts.Fatalf("%s does not appear", file)
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
}

// retry runs a command until it succeeds.
func retry(ts *testscript.TestScript, _ bool, args []string) {
	deadline := time.Now().Add(20 * time.Second)
	for ts.Exec(args[0], args[1:]...) != nil {
		if time.Now().After(deadline) {
			ts.Fatalf("it does not succeed")
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// exitStatus runs a command and wants its exit status: status N COMMAND...
func exitStatus(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) < 2 {
		ts.Fatalf("usage: status N COMMAND...")
	}
	err := ts.Exec(args[1], args[2:]...)
	got := 0
	var exit interface{ ExitCode() int }
	if errors.As(err, &exit) {
		got = exit.ExitCode()
	} else if err != nil {
		ts.Fatalf("%v", err)
	}
	if fmt.Sprint(got) != args[0] {
		ts.Fatalf("exit status %d, want %s", got, args[0])
	}
}

// mode wants a file's permissions: mode 0600 FILE...
func mode(ts *testscript.TestScript, _ bool, args []string) {
	for _, file := range args[1:] {
		info, err := os.Lstat(ts.MkAbs(file))
		ts.Check(err)
		if got := fmt.Sprintf("%04o", info.Mode().Perm()); got != args[0] {
			ts.Fatalf("%s has mode %s, want %s", file, got, args[0])
		}
	}
}

// daemonRun has the control socket of a daemon with a known state: daemon server|agent SOCKET
func daemonRun(ctx context.Context, env cli.Env) error {
	control := admin.Control{
		Status:      func() admin.Status { return testStatus(env.Args[0]) },
		Tunnels:     testTunnels,
		Connections: testConnections,
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if env.Args[0] == admin.RoleServer {
		control.Targets = testTargets
		control.Forget = func(_ context.Context, node string) (admin.Forgotten, error) {
			if node != "edge-1" {
				return admin.Forgotten{}, fmt.Errorf("forget %s: %w", node, admin.ErrUnknownNode)
			}
			return admin.Forgotten{Node: node, Targets: 2}, nil
		}
		control.Drain = func(context.Context) error { cancel(); return nil }
	}
	ln, err := admin.ListenControl(ctx, env.Args[1])
	if err != nil {
		return err
	}
	return control.Serve(ctx, ln)
}

func testStatus(role string) admin.Status {
	s := admin.Status{
		Role: role, Name: "name-of-" + role, Version: "v1.2.3", PID: 42, Started: time.Now().Add(-3 * time.Hour),
		Conditions: []admin.Condition{{Name: "hooks", OK: true}, {Name: "canary", Reason: "it did not arrive"}},
		Tunnels:    2, Connections: 1,
		Certificate: admin.Certificate{Name: "name-of-" + role, Serial: "1f", NotAfter: time.Now().Add(100*24*time.Hour + time.Minute)},
	}
	if role == admin.RoleAgent {
		s.Agent = &admin.AgentStatus{
			Servers: []string{"cloud-1:10262", "cloud-2:10262"}, Addrs: []netip.Addr{netip.MustParseAddr("10.99.1.10")},
			LocalhostPorts: []uint16{10250}, Allow: []string{"10.5.0.0/16:443"},
		}
		return s
	}
	s.Server = &admin.ServerStatus{
		Listen: "[::]:10262", Intercept: "all", NodeAddrs: []netip.Addr{netip.MustParseAddr("192.0.2.1")},
		RedirectPorts: []uint16{10270, 10271}, TunneledPorts: []uint16{10250, 10255},
		Targets: admin.TargetCounts{Online: 1, Offline: 2, Ambiguous: 3, Refused: 4}, Pins: "/sys/fs/bpf/edge-tunnel/v1",
		Hooks:   []admin.Hook{{Name: "connect4", Attached: true, Program: 7, Link: 8, Others: []string{"cil_sock4_connect"}}, {Name: "connect6"}},
		Missing: []string{"bpf_set_retval: connects to offline nodes are reset"},
	}
	return s
}

func testTargets() []admin.Target {
	return []admin.Target{
		{Addr: netip.MustParseAddr("2001:db8::1"), Node: "edge-1", State: admin.TargetOnline},
		{Addr: netip.MustParseAddr("10.99.1.10"), Node: "edge-1", State: admin.TargetOnline},
		{Addr: netip.MustParseAddr("127.0.0.1"), Node: "edge-3\x1b[2J", State: admin.TargetRefused, Reason: "loopback"},
		{Addr: netip.MustParseAddr("10.99.1.9"), Node: "edge-2", State: admin.TargetOffline},
	}
}

func testTunnels() []admin.Tunnel {
	return []admin.Tunnel{
		{Node: "edge-1", Server: "cloud-2", State: admin.TunnelWaiting, RetrySeconds: 12.5, Error: "connection refused"},
		{
			Node: "edge-1", Server: "cloud-1", State: admin.TunnelUp, RemoteAddr: "203.0.113.7:4711", Since: time.Now().Add(-90 * time.Minute),
			RTTSeconds: 0.0213, Streams: 3, SentBytes: 5 << 20, ReceivedBytes: 700,
		},
	}
}

func testConnections() []admin.Connection {
	return []admin.Connection{{
		Trace: "00000000000000ff", Node: "edge-1", Source: "127.0.0.1:5000", Destination: "10.99.1.10:10250",
		Started: time.Now(), DurationSeconds: 75, SentBytes: 1 << 30, ReceivedBytes: 12, PID: 99, Comm: "cu\x07rl",
	}}
}
