// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// kernel is an unpacked kernel package: image and modules.
type kernel struct {
	version string // "6.1", as asked for
	image   string
	modules string // folder
}

// distribution names the Debian release that has a version as its own kernel.
func distribution(version string) (codename string, ok bool) {
	codename, ok = map[string]string{"5.10": "bullseye", "6.1": "bookworm", "6.12": "trixie"}[version]
	return codename, ok
}

// metaPackage depends on a release's present kernel for virtual machines: small, and with everything that BPF needs built in.
const metaPackage = "linux-image-cloud-amd64"

// fetchKernel downloads and unpacks a kernel into cache/kernels/VERSION, once; delete that folder to get a newer one. It uses apt with
// package lists of its own: the machine's lists and sources are only read.
func fetchKernel(ctx context.Context, log io.Writer, cache, version string) (kernel, error) {
	folder := filepath.Join(cache, "kernels", version)
	k := kernel{version: version, image: filepath.Join(folder, "vmlinuz"), modules: filepath.Join(folder, "modules")}
	codename, ok := distribution(version)
	if !ok {
		return k, fmt.Errorf("kernel %q is not known\nhint: 5.10, 6.1 and 6.12 are", version)
	}
	if err := os.MkdirAll(filepath.Dir(folder), 0o755); err != nil {
		return k, err
	}
	unlock, err := lockFile(filepath.Join(cache, "kernels", "lock"))
	if err != nil {
		return k, err
	}
	defer unlock()
	if _, err := os.Stat(folder); err == nil {
		return k, nil
	}

	fmt.Fprintf(log, "getting the kernel of Debian's %s (once)\n", codename)
	work, err := os.MkdirTemp(filepath.Dir(folder), "new-")
	if err != nil {
		return k, err
	}
	defer os.RemoveAll(work)
	if err := unpackKernel(ctx, work, codename, version); err != nil {
		return k, fmt.Errorf("kernel %s of Debian's %s could not be had: %w", version, codename, err)
	}
	return k, os.Rename(filepath.Join(work, "kernel"), folder)
}

// unpackKernel leaves work/kernel with vmlinuz, config and modules.
func unpackKernel(ctx context.Context, work, codename, version string) error {
	a, err := newApt(ctx, work, codename)
	if err != nil {
		return err
	}
	archive, err := a.kernelPackage(ctx, version)
	if err != nil {
		return err
	}
	root := filepath.Join(work, "root")
	if _, err := output(ctx, work, "dpkg-deb", "--extract", archive, root); err != nil {
		return err
	}
	return arrange(root, filepath.Join(work, "kernel"))
}

// arrange picks what is needed out of an unpacked package: modules lie in /lib up to Debian 12 and in /usr/lib after it.
func arrange(root, folder string) error {
	if err := os.Mkdir(folder, 0o755); err != nil {
		return err
	}
	for _, want := range []struct {
		name     string
		patterns []string
	}{
		{"vmlinuz", []string{"boot/vmlinuz-*"}},
		{"config", []string{"boot/config-*"}},
		{"modules", []string{"lib/modules/*", "usr/lib/modules/*"}},
	} {
		found, err := findOne(root, want.patterns)
		if err != nil {
			return err
		}
		if err := os.Rename(found, filepath.Join(folder, want.name)); err != nil {
			return err
		}
	}
	return nil
}

// findOne returns the only file that fits one of the patterns.
func findOne(root string, patterns []string) (string, error) {
	var found []string
	for _, pattern := range patterns {
		names, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			return "", err
		}
		found = append(found, names...)
	}
	if len(found) != 1 {
		return "", fmt.Errorf("the package has %d files %s, not one", len(found), strings.Join(patterns, " or "))
	}
	return found[0], nil
}

// apt is apt-get with sources and state of its own below one folder.
type apt struct {
	folder  string
	options []string
}

func newApt(ctx context.Context, work, codename string) (*apt, error) {
	sources, err := debianSources(ctx, codename)
	if err != nil {
		return nil, err
	}
	a := &apt{folder: filepath.Join(work, "apt")}
	for _, dir := range []string{"lists/partial", "cache/archives/partial"} {
		if err := os.MkdirAll(filepath.Join(a.folder, dir), 0o755); err != nil {
			return nil, err
		}
	}
	list := filepath.Join(a.folder, "debian.sources")
	if err := os.WriteFile(list, []byte(sources), 0o644); err != nil {
		return nil, err
	}
	a.options = []string{
		"-o", "Dir::Etc::sourcelist=" + list,
		"-o", "Dir::Etc::sourceparts=/dev/null",
		"-o", "Dir::Etc::preferences=/dev/null",
		"-o", "Dir::Etc::preferencesparts=/dev/null",
		"-o", "Dir::State::lists=" + filepath.Join(a.folder, "lists"),
		"-o", "Dir::Cache=" + filepath.Join(a.folder, "cache"),
		"-o", "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false",
		"-o", "Acquire::Languages=none",
		"-o", "APT::Architecture=amd64",
		"-o", "APT::Sandbox::User=root", // its own user cannot write here
	}
	_, err = a.run(ctx, "apt-get", "--quiet=2", "--error-on=any", "update")
	return a, err
}

// kernelPackage downloads the kernel that the release's meta package stands for and returns the archive's name.
func (a *apt) kernelPackage(ctx context.Context, version string) (string, error) {
	about, err := a.run(ctx, "apt-cache", "show", "--no-all-versions", metaPackage)
	if err != nil {
		return "", err
	}
	name := ""
	for line := range strings.Lines(about) {
		if depends, ok := strings.CutPrefix(line, "Depends: "); ok {
			name = strings.Fields(depends)[0]
		}
	}
	if !strings.HasPrefix(name, "linux-image-"+version+".") {
		return "", fmt.Errorf("%s stands for %q, not for a kernel %s", metaPackage, name, version)
	}
	if _, err := a.run(ctx, "apt-get", "--quiet=2", "download", name); err != nil {
		return "", err
	}
	archives, err := filepath.Glob(filepath.Join(a.folder, name+"_*.deb"))
	if err != nil || len(archives) != 1 {
		return "", errors.Join(err, fmt.Errorf("apt-get download left %d archives of %s", len(archives), name))
	}
	return archives[0], nil
}

func (a *apt) run(ctx context.Context, command string, args ...string) (string, error) {
	return output(ctx, a.folder, command, append(append([]string{}, a.options...), args...)...)
}

// debianSources is a sources file for a release of Debian at the mirror that the machine itself uses.
func debianSources(ctx context.Context, codename string) (string, error) {
	targets, err := output(ctx, "/", "apt-get", "indextargets", "--format", "$(LABEL) $(REPO_URI)", "Created-By: Packages")
	if err != nil {
		return "", err
	}
	mirrors := map[string]string{}
	for line := range strings.Lines(targets) {
		if label, uri, ok := strings.Cut(strings.TrimSpace(line), " "); ok {
			mirrors[label] = uri
		}
	}
	main, security := mirrors["Debian"], mirrors["Debian-Security"]
	if main == "" || security == "" {
		return "", errors.New("apt has no lists of Debian and of its security updates\nhint: apt-get update")
	}
	return source(main, codename) + "\n" + source(security, codename+"-security"), nil
}

func source(uri, suite string) string {
	text := fmt.Sprintf("Types: deb\nURIs: %s\nSuites: %s\nComponents: main\n", uri, suite)
	const keys = "/usr/share/keyrings/debian-archive-keyring.gpg"
	if _, err := os.Stat(keys); err == nil {
		text += "Signed-By: " + keys + "\n"
	}
	return text
}

// output runs a command and returns what it printed; an error has the last line of its complaint.
func output(ctx context.Context, folder, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = folder
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	printed, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		lines := strings.Split(strings.TrimSpace(string(exit.Stderr)), "\n")
		return "", fmt.Errorf("%s: %w: %s", name, err, lines[len(lines)-1])
	}
	return string(printed), err
}

// lockFile waits until no other process holds the lock.
func lockFile(name string) (unlock func(), err error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", name, err)
	}
	return func() { f.Close() }, nil
}
