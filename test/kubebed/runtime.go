// SPDX-License-Identifier: Apache-2.0

package kubebed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
)

// runtimePackages are Debian's, apart from those of tools/packages.txt: only whoever runs a cluster needs them. What they depend on is in
// every Debian, but for iptables, which nothing here calls.
var runtimePackages = []string{"containerd", "containernetworking-plugins", "runc"}

// Runtime returns the folder below which containerd, runc and the CNI plug-ins are, at their usual paths. What the cache lacks is downloaded
// and unpacked there; nothing is installed.
func Runtime(ctx context.Context, progress io.Writer) (string, error) {
	cache, err := CacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "containerd")
	return dir, once(dir, func() error {
		fmt.Fprintf(progress, "unpacking containerd into %s (nothing is installed)\n", dir)
		part := dir + ".part"
		err := errors.Join(os.RemoveAll(part), os.MkdirAll(filepath.Join(part, "debs"), 0o755))
		if err == nil {
			err = download(ctx, filepath.Join(part, "debs"))
		}
		if err != nil {
			return err
		}
		debs, err := filepath.Glob(filepath.Join(part, "debs", "*.deb"))
		for _, deb := range debs {
			if err == nil {
				_, err = command(ctx, part, "dpkg-deb", "--extract", deb, part)
			}
		}
		if err != nil {
			return err
		}
		return errors.Join(os.RemoveAll(filepath.Join(part, "debs")), os.Rename(part, dir))
	})
}

func download(ctx context.Context, dir string) error {
	get := append([]string{"download", "--quiet=2"}, runtimePackages...)
	_, err := command(ctx, dir, "apt-get", get...)
	if err == nil {
		return nil
	}
	// Old or absent package lists are the usual reason.
	if _, err := command(ctx, dir, "apt-get", "update", "--quiet=2"); err != nil {
		return err
	}
	_, err = command(ctx, dir, "apt-get", get...)
	return err
}

func command(ctx context.Context, dir, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", name, err, out)
	}
	return string(out), err
}
