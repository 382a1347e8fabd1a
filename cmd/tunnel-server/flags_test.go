// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/edge-tunnel/edge-tunnel/cmd/internal/cli"
)

// parsed gives parse these arguments beside the required ones.
func parsed(t *testing.T, args ...string) (o options, status int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	env := cli.Env{Name: "tunnel-server", Stdout: &out, Stderr: &errs, Stdin: strings.NewReader(""), Getenv: func(string) string { return "" },
		Args: append([]string{"--ca-cert", "ca", "--cert", "c", "--key", "k"}, args...)}
	status = cli.Run(t.Context(), env, func(_ context.Context, env cli.Env) (err error) {
		o, err = parse(env)
		return err
	})
	return o, status, out.String(), errs.String()
}

func TestFlags(t *testing.T) {
	o, status, _, stderr := parsed(t)
	if status != cli.StatusOK {
		t.Fatal(stderr)
	}
	if o.listenTunnel != ":10262" || o.admin != "127.0.0.1:10265" || o.control != "/run/edge-tunnel/server.sock" || o.bpffs != "/sys/fs/bpf" ||
		o.redirectPort != 10270 || o.drainTimeout != 10*time.Second || o.stateDir != "" || o.cgroupRoot != "" || o.hostOnly || o.pprof || o.maxPerPod != 0 ||
		!slices.Equal(o.ports, []uint16{10250, 10255}) {
		t.Errorf("defaults are not those of the contract: %+v", o)
	}
	if n := o.connections(); n < 16 || n > 65536 {
		t.Errorf("%d connections", n)
	}

	o, status, _, stderr = parsed(t, "--tunneled-ports", "9100,10250", "--tunneled-ports=22", "--target-cidr", "10.0.0.0/8", "--redirect-port", "65528",
		"--node-ip", "10.0.0.1,fd00::1", "--intercept", "host", "--opt-out-cgroup", "/a,b/c", "--opt-out-cgroup", "d", "--max-connections", "70000",
		"--max-connections-per-pod", "60000",
		"--drain-timeout", "0s", "--state-dir", "here", "--cgroup-root", "/cg", "--bpffs", "/b", "--listen-tunnel", "127.0.0.1:0", "--pprof", "--deny-file", "f")
	if status != cli.StatusOK {
		t.Fatal(stderr)
	}
	if !slices.Equal(o.ports, []uint16{22, 9100, 10250, 10255}) || fmt.Sprint(o.cidrs, o.nodeIPs, o.optOut) != "[10.0.0.0/8] [10.0.0.1 fd00::1] [/a b/c d]" ||
		!o.hostOnly || o.connections() != 70000 || o.maxPerPod != 60000 || o.drainTimeout != 0 || o.redirectPort != 65528 || o.files.Deny != "f" || !o.pprof {
		t.Errorf("%+v", o)
	}
	if _, status, out, _ := parsed(t, "--help"); status != cli.StatusOK || !strings.Contains(out, "USAGE\n  tunnel-server --ca-cert FILE") ||
		!strings.Contains(out, "--max-connections-per-pod") {
		t.Errorf("help: %d %s", status, out)
	}
}

func TestBadFlags(t *testing.T) {
	for _, c := range []struct{ args, want string }{
		{"--tunnel-ports 1", "error: unknown flag --tunnel-ports\nhint: did you mean --tunneled-ports?\n"},
		{"--cert=", "error: --cert is empty\n"},
		{"--redirect-port 65529", "error: --redirect-port: 65529 leaves no room for 8 ports\n"},
		{"--tunneled-ports 10277", "error: --tunneled-ports: 10277 is one of the redirect ports 10270-10277\nhint: choose other redirect ports with --redirect-port\n"},
		{"--redirect-port 10248", "error: --tunneled-ports: 10250 is one of the redirect ports 10248-10255\nerror: --tunneled-ports: 10255 is"},
		{"--redirect-port 10256", "error: --listen-tunnel: 10262 is one of the redirect ports 10256-10263\nhint: choose other"},
		{"--metrics :10271", "error: --metrics: 10271 is one of the redirect ports 10270-10277\n"},
		{"--redirect-port 10265", "error: --admin: 10265 is one of the redirect ports 10265-10272\n"},
		{"--node-ip 10.0.0.1,10.0.0.2", "error: --node-ip: at most one address for each family\n"},
		{"--node-ip 127.0.0.1", "error: --node-ip: pods cannot reach 127.0.0.1\n"},
		{"--node-ip fe80::1", "error: --node-ip: pods cannot reach fe80::1\n"},
		{"--node-ip 0.0.0.0", "pods cannot reach 0.0.0.0"},
		{"--opt-out-cgroup ../x", "error: --opt-out-cgroup: \"../x\" is not a folder below --cgroup-root\nhint: expected DIR"},
		{"--opt-out-cgroup /", "\"/\" is not a folder below"},
		{"--opt-out-cgroup a/..", "\"a/..\" is not a folder below"},
		{"--bpffs sys/fs/bpf", "error: --bpffs: \"sys/fs/bpf\" is relative\nhint: expected a path that begins with /\n"},
		{"--cgroup-root .", "error: --cgroup-root: \".\" is relative\n"},
		{"--drain-timeout -1s", "error: --drain-timeout: -1s is negative\nhint: tunnel-server --help shows what is possible\n"},
		{"--max-connections -1", "error: --max-connections: -1 is negative\n"},
		{"--max-connections-per-pod -1", "error: --max-connections-per-pod: -1 is negative\n"},
		{"--max-connections 9 --max-connections-per-pod 10", "error: --max-connections-per-pod: 10 is more than --max-connections, 9\n"},
		{"--intercept pods", "error: --intercept: \"pods\" is not one of the choices\nhint: expected all or host\n"},
		{"--drain-timeout -1s --max-connections -1", "error: --max-connections: -1 is negative\n"}, // all of it
		{"extra", "error: unexpected argument \"extra\"\n"},
	} {
		_, status, stdout, stderr := parsed(t, strings.Fields(c.args)...)
		if status != cli.StatusUsage || !strings.Contains(stderr, c.want) || !strings.Contains(stderr, "\nhint: ") || stdout != "" {
			t.Errorf("%s: status %d and\n%swant\n%s", c.args, status, stderr, c.want)
		}
	}
	var stderr bytes.Buffer
	env := cli.Env{Name: "tunnel-server", Stdout: io.Discard, Stderr: &stderr, Getenv: func(string) string { return "" }}
	if status := cli.Run(t.Context(), env, run); status != cli.StatusUsage || strings.Count(stderr.String(), " is required\n") != 3 {
		t.Errorf("without flags: %d and\n%s", status, &stderr)
	}
}
