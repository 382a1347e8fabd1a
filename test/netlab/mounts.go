// SPDX-License-Identifier: Apache-2.0

package netlab

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// manifest exists where unpacked packages lie over /usr; tools/packages.sh writes it.
const manifest = "usr/share/edge-tunnel/packages"

// packagesRoot is where "make deps" unpacks Debian packages; tools/packages.sh has the same rule.
func packagesRoot() string {
	cache := os.Getenv("EDGE_TUNNEL_CACHE")
	if cache == "" {
		base, err := os.UserCacheDir() // XDG_CACHE_HOME or ~/.cache
		if err != nil {
			base = "/root/.cache"
		}
		cache = filepath.Join(base, "edge-tunnel")
	}
	return filepath.Join(cache, "packages")
}

// enterMounts gives the calling thread a mount namespace in which a node's processes find the unpacked programs at
// their usual paths, and a /run, /sys/fs/bpf, /etc/passwd and /etc/shadow of their own. dir is the node's folder.
func enterMounts(dir string) error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("make a mount namespace: %w", err)
	}
	// What is mounted outside later (another bpffs) arrives here, nothing goes the other way.
	if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("detach the mount namespace: %w", err)
	}
	if err := overlayPackages(); err != nil {
		return err
	}
	binds := []struct{ from, to string }{{"run", "/run"}, {"passwd", "/etc/passwd"}, {"shadow", "/etc/shadow"}}
	if exists(filepath.Join(dir, "bpf")) {
		binds = append(binds, struct{ from, to string }{"bpf", "/sys/fs/bpf"})
	}
	for _, b := range binds {
		if err := unix.Mount(filepath.Join(dir, b.from), b.to, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("bind %s: %w", b.to, err)
		}
	}
	return nil
}

func overlayPackages() error {
	root := packagesRoot()
	if exists("/"+manifest) || !exists(filepath.Join(root, manifest)) {
		return nil // laid over already, or nothing was unpacked since the machine has everything
	}
	for _, dir := range []string{"/usr", "/etc"} {
		options := fmt.Sprintf("lowerdir=%s:%s", filepath.Join(root, dir), dir)
		if err := unix.Mount("edge-tunnel", dir, "overlay", unix.MS_RDONLY, options); err != nil {
			return fmt.Errorf("lay unpacked packages over %s: %w", dir, err)
		}
	}
	return nil
}

// fillDir makes what enterMounts binds.
func fillDir(dir string, bpffs bool) error {
	for _, d := range []string{"run/sshd", "run/lock", "logs"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return err
		}
	}
	passwd, err := os.ReadFile("/etc/passwd")
	if err != nil {
		return err
	}
	// sshd wants this user and no package was installed that would add it.
	if !bytes.Contains(passwd, []byte("\nsshd:")) {
		passwd = append(passwd, "sshd:x:65533:65534::/run/sshd:/usr/sbin/nologin\n"...)
	}
	if err := os.WriteFile(filepath.Join(dir, "passwd"), passwd, 0o644); err != nil {
		return err
	}
	// No passwords, and a root account that is not locked: sshd refuses a locked one even with a key.
	if err := os.WriteFile(filepath.Join(dir, "shadow"), []byte("root:*:20000:0:99999:7:::\n"), 0o600); err != nil {
		return err
	}
	if !bpffs {
		return nil
	}
	mount := filepath.Join(dir, "bpf")
	if err := os.Mkdir(mount, 0o700); err != nil {
		return err
	}
	if err := unix.Mount("bpf", mount, "bpf", 0, ""); err != nil {
		return fmt.Errorf("mount bpffs: %w", err)
	}
	return nil
}
