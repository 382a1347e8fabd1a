// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/edge-tunnel/edge-tunnel/pkg/identity"
	"github.com/edge-tunnel/edge-tunnel/test/linkemu"
	"github.com/edge-tunnel/edge-tunnel/test/netlab"
)

// Names in certificates. The relay at the far end has a server's certificate beside the agent's, as one of the paths dials it.
const (
	nearName = "cloud"
	farName  = "edge-relay"
)

// Ports: 10250 is tunneled, the other one of the service is not.
const (
	tunneledPort = 10250
	directPort   = 9000
	tlsPort      = 7001 // of the near relay, for clients
	muxPort      = 7002
	tlsFarPort   = 7003 // between the relays
	muxFarPort   = 7004
	tunnelPort   = 10262
	serverAdmin  = 10265
	agentAdmin   = 10266
)

// path is one way from the client to the service.
type path struct {
	name      string
	addr      string // what the client dials
	near, far *netlab.Process
	between   *netlab.Process // another server, if it goes by one
}

// Names of the paths, in the order of the tables.
const (
	directPath = "direct"
	tlsPath    = "tls"
	muxPath    = "yamux"
	tunnelPath = "edge-tunnel"
)

// site is two nodes on one network, with everything running that the data path suite needs.
type site struct {
	cloud, edge *netlab.Node
	dir         string // certificates
	bin         string
	paths       []*path
	profiled    []profiled
	client      *client
	link        *linkemu.Link // between the two, if there is an emulated one
}

// newSite starts everything; a link that is not nil lies between the nodes from the beginning. flags are added to both daemons.
func newSite(ctx context.Context, t *stage, bin string, link *linkemu.Settings, flags ...string) (*site, error) {
	bin, err := filepath.Abs(bin)
	if err != nil {
		return nil, err
	}
	for _, program := range []string{"tunnel-server", "tunnel-agent"} {
		if _, err := os.Stat(filepath.Join(bin, program)); err != nil {
			return nil, fmt.Errorf("%w\nhint: make build", err)
		}
	}
	lab := netlab.New(t)
	s := &site{cloud: lab.Cloud("cloud"), edge: lab.Cloud("edge"), dir: filepath.Join(lab.Dir(), "pki"), bin: bin}
	for _, n := range []*netlab.Node{s.cloud, s.edge} {
		if err := n.Do(sparePorts); err != nil {
			return nil, err
		}
	}
	if link != nil {
		s.link = s.edge.Emulate(*link)
	}
	if err := s.issue(); err != nil {
		return nil, err
	}
	if err := s.startPaths(ctx, flags); err != nil {
		return nil, err
	}
	if s.client, err = startClient(ctx, s.cloud); err != nil {
		return nil, err
	}
	t.Cleanup(s.client.stop)
	return s, nil
}

// sparePorts keeps tens of thousands of short connections from running out of local ports: a benchmark of the port
// search is not what is wanted. Nor is what the kernel remembers of one connection's losses for the next.
func sparePorts() error {
	return errors.Join(
		os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", []byte("15000 65000"), 0o644),
		os.WriteFile("/proc/sys/net/ipv4/tcp_tw_reuse", []byte("1"), 0o644),
		os.WriteFile("/proc/sys/net/ipv4/tcp_no_metrics_save", []byte("1"), 0o644))
}

func (s *site) issue() error {
	ca, err := identity.InitCA(s.dir, identity.CAOptions{})
	if err != nil {
		return err
	}
	_, err1 := ca.IssueServer(nearName, []string{nearName, s.cloud.V4.String()})
	_, err2 := ca.IssueServer(farName, []string{farName, s.edge.V4.String()})
	_, err3 := ca.IssueAgent("edge", []netip.Addr{s.edge.V4}, false)
	return errors.Join(err1, err2, err3)
}

func (s *site) startPaths(ctx context.Context, flags []string) error {
	far := func(port uint16) string { return netip.AddrPortFrom(s.edge.V4, port).String() }
	cloud := func(port uint16) string { return netip.AddrPortFrom(s.cloud.V4, port).String() }
	local := func(port uint16) string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(int(port))) }

	if _, err := startRole(ctx, s.edge, "service", ":"+strconv.Itoa(directPort), ":"+strconv.Itoa(tunneledPort)); err != nil {
		return err
	}
	tls, mux := &path{name: tlsPath, addr: local(tlsPort)}, &path{name: muxPath, addr: local(muxPort)}
	tunnel := &path{name: tunnelPath, addr: far(tunneledPort)}
	s.paths = []*path{{name: directPath, addr: far(directPort)}, tls, mux, tunnel}
	for _, r := range []struct {
		process **netlab.Process
		node    *netlab.Node
		role    string
		args    []string
	}{
		{&tls.far, s.edge, "tls-far", []string{far(tlsFarPort), local(directPort), s.dir}},
		{&tls.near, s.cloud, "tls-near", []string{local(tlsPort), far(tlsFarPort), s.dir}},
		{&mux.near, s.cloud, "yamux-near", []string{local(muxPort), cloud(muxFarPort), s.dir}},
		{&mux.far, s.edge, "yamux-far", []string{cloud(muxFarPort), local(directPort), s.dir}},
	} {
		var err error
		if *r.process, err = startRole(ctx, r.node, r.role, r.args...); err != nil {
			return err
		}
	}

	s.profiled = []profiled{{"server", s.cloud, serverAdmin}, {"agent", s.edge, agentAdmin}}
	var err error
	tunnel.near, err = s.cloud.Start(filepath.Join(s.bin, "tunnel-server"),
		append(s.daemon(nearName, flags), "--listen-tunnel", cloud(tunnelPort), "--cgroup-root", s.cloud.Cgroup())...)
	if err != nil {
		return err
	}
	if err := waitReady(ctx, s.cloud, tunnel.near, adminURL(serverAdmin, "healthz")); err != nil {
		return err
	}
	tunnel.far, err = s.edge.Start(filepath.Join(s.bin, "tunnel-agent"), append(s.daemon("edge", flags), "--server", cloud(tunnelPort))...)
	if err != nil {
		return err
	}
	return errors.Join(waitReady(ctx, s.edge, tunnel.far, adminURL(agentAdmin, "readyz")),
		waitReady(ctx, s.cloud, tunnel.near, adminURL(serverAdmin, "readyz")))
}

// daemon is the beginning of a daemon's command line.
func (s *site) daemon(name string, flags []string) []string {
	in := func(file string) string { return filepath.Join(s.dir, file) }
	return append([]string{"--ca-cert", in("ca.crt"), "--cert", in(name + ".crt"), "--key", in(name + ".key")}, flags...)
}

func adminURL(port int, path string) string { return fmt.Sprintf("http://127.0.0.1:%d/%s", port, path) }

// startRole starts a process of this program in a node and waits until it can be used.
func startRole(ctx context.Context, node *netlab.Node, role string, args ...string) (*netlab.Process, error) {
	p, err := node.StartCmd(node.Helper(context.WithoutCancel(ctx), role, args...))
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	return p, p.WaitFor(ctx, readyLine)
}

// get asks an address inside a node.
func get(ctx context.Context, node *netlab.Node, url string) ([]byte, error) {
	transport := &http.Transport{DisableKeepAlives: true, DialContext: node.Dial}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return nil, err
	}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", url, resp.Status, strings.TrimSpace(string(body)))
	}
	return body, err
}

// waitReady waits until a daemon answers that it is.
func waitReady(ctx context.Context, node *netlab.Node, p *netlab.Process, url string) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		_, err := get(ctx, node, url)
		if err == nil {
			return nil
		}
		select {
		case <-p.Exited():
			return fmt.Errorf("%s: a daemon ended:\n%s", node.Name, p.Log())
		case <-ctx.Done():
			return fmt.Errorf("%s: %w; the daemon wrote:\n%s", node.Name, err, p.Log())
		case <-tick.C:
		}
	}
}

// servant is a process of this program that is spoken to in lines of JSON, one question and one answer at a time.
type servant struct {
	cmd     *netlab.Cmd
	asks    *json.Encoder
	answers *json.Decoder
	in      io.Closer
}

func startServant(ctx context.Context, node *netlab.Node, role string, args ...string) (*servant, error) {
	cmd := node.Helper(ctx, role, args...)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return &servant{cmd, json.NewEncoder(in), json.NewDecoder(out), in}, nil
}

func (s *servant) ask(question, answer any) error {
	if err := s.asks.Encode(question); err != nil {
		return err
	}
	if err := s.answers.Decode(answer); err != nil {
		return fmt.Errorf("%s is gone: %w", s.cmd.Args[0], err)
	}
	return nil
}

func (s *servant) stop() {
	s.in.Close()
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait()
}

// client is the servant that does the tasks.
type client struct{ *servant }

func startClient(ctx context.Context, node *netlab.Node) (*client, error) {
	s, err := startServant(ctx, node, "client")
	return &client{s}, err
}

// do has a task done. Several at a time are not possible.
func (c *client) do(t task) (sample, error) {
	var s sample
	if err := c.ask(t, &s); err != nil {
		return s, err
	}
	if s.Error != "" {
		return s, fmt.Errorf("%s over %s: %s", t.Work, t.Addr, s.Error)
	}
	return s, nil
}
