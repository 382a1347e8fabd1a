// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/edge-tunnel/edge-tunnel/test/foreign"
	"github.com/edge-tunnel/edge-tunnel/test/netlab"
)

const (
	exporterPort   = 9100
	prometheusPort = 9090
)

// program is the path of one of ours, or the name of somebody else's.
func (s *story) program(name string) string {
	if slices.Contains([]string{"tunnel-server", "tunnel-agent", "tunnelctl"}, name) {
		return filepath.Join(s.bin, name)
	}
	return name
}

// start starts a daemon and prints the command.
func (s *story) start(node *netlab.Node, args ...string) (*netlab.Process, error) {
	fmt.Fprintf(s.out, "\n%s$ %s &\n", node.Name, shellLine(args))
	cmd := node.Command(context.Background(), s.program(args[0]), args[1:]...)
	cmd.Dir = s.lab.Dir()
	return node.StartCmd(cmd)
}

// ready waits until a URL on the node answers 200.
func (s *story) ready(node *netlab.Node, p *netlab.Process, url string) error {
	transport := &http.Transport{DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		return node.Dial(ctx, network, addr)
	}}
	defer transport.CloseIdleConnections()
	client := http.Client{Transport: transport, Timeout: 5 * time.Second}
	return s.until(30*time.Second, func(ctx context.Context) error {
		select {
		case <-p.Exited():
			return s.fatal(fmt.Errorf("%s: the daemon ended; it wrote:\n%s", node.Name, p.Log()))
		default:
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("%s on %s: %s", url, node.Name, resp.Status)
		}
		return nil
	})
}

// listening waits until something accepts connections at the node's own port.
func (s *story) listening(node *netlab.Node, p *netlab.Process, port uint16) error {
	return s.until(20*time.Second, func(ctx context.Context) error {
		select {
		case <-p.Exited():
			return s.fatal(fmt.Errorf("%s: the daemon ended; it wrote:\n%s", node.Name, p.Log()))
		default:
		}
		conn, err := node.Dial(ctx, "tcp", netip.AddrPortFrom(node.V4, port).String())
		if err != nil {
			return err
		}
		return conn.Close()
	})
}

// startSSHD runs OpenSSH's server on the edge, with a host key and a login key of its own.
func (s *story) startSSHD() error {
	args, err := foreign.SSHD(s.edge, s.path())
	if err != nil {
		return err
	}
	p, err := s.start(s.edge, args...)
	if err != nil {
		return err
	}
	return s.listening(s.edge, p, foreign.SSHPort)
}

func (s *story) startExporter() error {
	p, err := s.start(s.edge, foreign.NodeExporter(exporterPort)...)
	if err != nil {
		return err
	}
	return s.listening(s.edge, p, exporterPort)
}

// startPrometheus runs Prometheus in the pod. Its configuration names the edge's addresses and nothing else.
func (s *story) startPrometheus() error {
	args, err := foreign.Prometheus(s.path(), prometheusPort, 500*time.Millisecond,
		netip.AddrPortFrom(s.edge.V4, exporterPort), netip.AddrPortFrom(s.edge.V6, exporterPort))
	if err != nil {
		return err
	}
	p, err := s.start(s.pod, args...)
	if err != nil {
		return err
	}
	return s.ready(s.pod, p, fmt.Sprintf("http://127.0.0.1:%d/-/ready", prometheusPort))
}

func (s *story) startServer() error {
	if err := os.MkdirAll(s.path("server-state"), 0o700); err != nil {
		return err
	}
	p, err := s.start(s.cloud, "tunnel-server", "--listen-tunnel", netip.AddrPortFrom(s.cloud.V4, 10262).String(),
		"--ca-cert", "pki/ca.crt", "--cert", "pki/cloud-1.crt", "--key", "pki/cloud-1.key",
		"--tunneled-ports", fmt.Sprintf("%d,%d", foreign.SSHPort, exporterPort), "--cgroup-root", s.cloud.Cgroup(), "--state-dir", "server-state")
	if err != nil {
		return err
	}
	s.server = p
	return s.ready(s.cloud, p, "http://127.0.0.1:10265/healthz")
}

// startAgent returns when the tunnel is up and the cloud node knows it.
func (s *story) startAgent() error {
	p, err := s.start(s.edge, "tunnel-agent", "--server", netip.AddrPortFrom(s.cloud.V4, 10262).String(),
		"--ca-cert", "pki/ca.crt", "--cert", "pki/edge-1.crt", "--key", "pki/edge-1.key")
	if err != nil {
		return err
	}
	s.agent = p
	if err := s.ready(s.edge, p, "http://127.0.0.1:10266/readyz"); err != nil {
		return err
	}
	return s.ready(s.cloud, s.server, "http://127.0.0.1:10265/readyz")
}

// path is a path in the folder that all of the nodes share; commands run there, so that what is shown is short.
func (s *story) path(elem ...string) string {
	return filepath.Join(append([]string{s.lab.Dir()}, elem...)...)
}

func exporterAt(addr netip.Addr) string {
	return netip.AddrPortFrom(addr, exporterPort).String()
}
