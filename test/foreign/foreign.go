// SPDX-License-Identifier: Apache-2.0

// Package foreign prepares programs that nobody here wrote to run in a node, for tests and for the demo: OpenSSH, Prometheus and
// its node exporter, rsync, nghttp2's server.
//
// Each function writes what its program needs into a folder, and returns the command line to run in that folder: its paths are
// relative, since the demo shows the commands. They read no file of the machine's, add no user, and leave nothing outside
// of the folder. Starting, waiting and stopping are the caller's.
package foreign

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/edge-tunnel/edge-tunnel/test/netlab"
)

// SSHPort is OpenSSH's.
const SSHPort = 22

// SSHD makes ssh/ in the folder: a host key, a login key for root, and the server's configuration. The files known_hosts and login
// are for [SSHOptions]: the client knows the host key for the node's own addresses, so nobody on the way could answer in its place.
func SSHD(node *netlab.Node, dir string) ([]string, error) {
	in := func(file string) string { return filepath.Join(dir, "ssh", file) }
	if err := os.MkdirAll(in(""), 0o700); err != nil {
		return nil, err
	}
	for _, key := range []string{"host", "login"} {
		if _, err := node.Run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", key+"-key", "-f", in(key)); err != nil {
			return nil, err
		}
	}
	public, err := os.ReadFile(in("host.pub"))
	if err != nil {
		return nil, err
	}
	known := fmt.Sprintf("%s,%s %s", node.V4, node.V6, public)
	config := strings.Join([]string{
		fmt.Sprint("Port ", SSHPort), "HostKey " + in("host"), "AuthorizedKeysFile " + in("login.pub"), "Subsystem sftp internal-sftp",
		"PidFile none", "UsePAM no", "UseDNS no", "StrictModes no", "PasswordAuthentication no", "KbdInteractiveAuthentication no",
		"PermitRootLogin prohibit-password", "PrintLastLog no", "PrintMotd no", "",
	}, "\n")
	err = errors.Join(os.WriteFile(in("known_hosts"), []byte(known), 0o600), os.WriteFile(in("sshd_config"), []byte(config), 0o600))
	return []string{"/usr/sbin/sshd", "-D", "-e", "-f", "ssh/sshd_config"}, err
}

// SSHOptions make ssh and scp use the files of [SSHD] and none of the user's.
func SSHOptions() []string {
	return []string{"-F", "none", "-i", "ssh/login", "-o", "UserKnownHostsFile=ssh/known_hosts", "-o", "StrictHostKeyChecking=yes"}
}

// RSYNCD makes rsync/files in the folder, which an rsync daemon at the port serves as the module "files": readable and writable, with no
// password.
func RSYNCD(dir string, port uint16) ([]string, error) {
	files := filepath.Join(dir, "rsync", "files")
	config := strings.Join([]string{
		"use chroot = no", "uid = root", "gid = root", "reverse lookup = no", "[files]", "path = " + files, "read only = no", "",
	}, "\n")
	err := errors.Join(os.MkdirAll(files, 0o755), os.WriteFile(filepath.Join(dir, "rsync", "rsyncd.conf"), []byte(config), 0o600))
	return []string{"rsync", "--daemon", "--no-detach", "--config=rsync/rsyncd.conf", fmt.Sprint("--port=", port), "--log-file=/dev/stderr"}, err
}

// NodeExporter serves a few metrics at the port, of both families.
func NodeExporter(port uint16) []string {
	return []string{"prometheus-node-exporter", "--collector.disable-defaults", "--collector.uname",
		"--collector.sockstat", "--web.disable-exporter-metrics", fmt.Sprintf("--web.listen-address=:%d", port)}
}

// Prometheus scrapes the targets and answers at 127.0.0.1 and the port.
func Prometheus(dir string, port uint16, every time.Duration, targets ...netip.AddrPort) ([]string, error) {
	quoted := make([]string, len(targets))
	for i, t := range targets {
		quoted[i] = "'" + t.String() + "'"
	}
	config := fmt.Sprintf(`global:
  scrape_interval: %[1]dms
  scrape_timeout: %[1]dms
scrape_configs:
  - job_name: edge
    static_configs:
      - targets: [%[2]s]
`, every.Milliseconds(), strings.Join(quoted, ", "))
	err := os.WriteFile(filepath.Join(dir, "prometheus.yml"), []byte(config), 0o600)
	return []string{"prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=prometheus",
		fmt.Sprintf("--web.listen-address=127.0.0.1:%d", port), "--log.level=warn"}, err
}

// HTTP2 serves the folder's www/ at the port, over HTTP/2 only, and sends uploads back. cert and key are PEM files, relative to the
// folder; without them it speaks HTTP/2 with prior knowledge.
func HTTP2(dir string, port uint16, cert, key string) ([]string, error) {
	args := []string{"nghttpd", "--htdocs=www", "--echo-upload", "--max-concurrent-streams=256"}
	if cert == "" {
		args = append(args, "--no-tls", fmt.Sprint(port))
	} else {
		args = append(args, fmt.Sprint(port), key, cert)
	}
	return args, os.MkdirAll(filepath.Join(dir, "www"), 0o755)
}
