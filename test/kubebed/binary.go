// SPDX-License-Identifier: Apache-2.0

package kubebed

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// CacheDir also has the unpacked Debian packages; tools/packages.sh has the same rule.
func CacheDir() (string, error) {
	if dir := os.Getenv("EDGE_TUNNEL_CACHE"); dir != "" {
		return dir, nil
	}
	base, err := os.UserCacheDir() // XDG_CACHE_HOME or ~/.cache
	return filepath.Join(base, "edge-tunnel"), err
}

// binary is Build, once for this process.
var binary = sync.OnceValues(func() (string, error) { return Build(context.Background(), io.Discard) })

// Build returns the path of the all-in-one binary in the cache. If it is not there, it is built, by one process at a time: minutes,
// and 3 GB in Go's own cache. What it is about to do is told to progress.
func Build(ctx context.Context, progress io.Writer) (string, error) {
	src, err := sourceDir(ctx)
	if err != nil {
		return "", err
	}
	modfile, err := modFile(src)
	if err != nil {
		return "", err
	}
	version, name, err := identify(src, modfile)
	if err != nil {
		return "", err
	}
	cache, err := CacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "kubernetes")
	path := filepath.Join(dir, name)
	return path, once(path, func() error {
		fmt.Fprintf(progress, "building Kubernetes %s into %s (once, takes minutes)\n", version, dir)
		return build(ctx, src, modfile, version, path)
	})
}

// once calls f, which makes what is at path, unless it is there. Of several processes one does so and the others wait.
func once(path string, f func() error) error {
	exists := func() bool {
		_, err := os.Stat(path)
		return err == nil
	}
	if exists() {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	lock, err := os.OpenFile(filepath.Join(filepath.Dir(path), "kubebed.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return err
	}
	if exists() {
		return nil
	}
	return f()
}

func build(ctx context.Context, src, modfile, version, path string) error {
	// Without their version the programs call themselves v0.0.0-master, which clients refuse to talk to.
	numbers := strings.Split(strings.TrimPrefix(version, "v"), ".")
	flags := "-s -w"
	for _, p := range []string{"k8s.io/component-base/version", "k8s.io/client-go/pkg/version"} {
		flags += fmt.Sprintf(" -X %[1]s.gitVersion=%[2]s -X %[1]s.gitMajor=%[3]s -X %[1]s.gitMinor=%[4]s", p, version, numbers[0], numbers[1])
	}
	part := path + ".part"
	cmd := exec.CommandContext(ctx, "go", "build", "-modfile="+modfile, "-trimpath", "-ldflags", flags, "-o", part, ".")
	cmd.Dir = src
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-buildvcs=false", "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build Kubernetes %s: %w: %s", version, err, out)
	}
	return os.Rename(part, path)
}

// modFile is the go.mod of the version that KUBERNETES names, such as 1.35, or that of the one which is tested by default.
func modFile(src string) (string, error) {
	minor := os.Getenv("KUBERNETES")
	if minor == "" {
		return "go.mod", nil
	}
	others, err := filepath.Glob(filepath.Join(src, "go-*.mod"))
	if err != nil {
		return "", err
	}
	for i, other := range others {
		others[i] = strings.TrimSuffix(strings.TrimPrefix(filepath.Base(other), "go-"), ".mod")
		if others[i] == minor {
			return filepath.Base(other), nil
		}
	}
	return "", fmt.Errorf("there is no Kubernetes %q: KUBERNETES may be %s, or empty", minor, strings.Join(others, " or "))
}

// requirement is the line of go.mod that says which Kubernetes is built.
var requirement = regexp.MustCompile(`(?m)^\s*k8s\.io/kubernetes (v\d+\.\d+\.\d+)$`)

// identify returns the version of Kubernetes and the binary's name in the cache, which has a hash of all that goes into it.
func identify(src, modfile string) (version, name string, err error) {
	sum := sha256.New()
	fmt.Fprintln(sum, runtime.Version(), runtime.GOARCH)
	for _, file := range []string{modfile, strings.TrimSuffix(modfile, "mod") + "sum", "main.go"} {
		content, err := os.ReadFile(filepath.Join(src, file))
		if err != nil {
			return "", "", err
		}
		sum.Write(content)
		if file != modfile {
			continue
		}
		match := requirement.FindSubmatch(content)
		if match == nil {
			return "", "", fmt.Errorf("%s of the all-in-one binary does not require k8s.io/kubernetes", modfile)
		}
		version = string(match[1])
	}
	return version, fmt.Sprintf("allinone-%s-%.12x", version, sum.Sum(nil)), nil
}

// sourceDir is the folder of the nested module. It is not a package of this module, so it cannot be embedded.
func sourceDir(ctx context.Context) (string, error) {
	dir, err := moduleDir(ctx)
	return filepath.Join(dir, "test", "kubebed", "allinone"), err
}

func moduleDir(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "github.com/edge-tunnel/edge-tunnel").Output()
	if err != nil {
		return "", fmt.Errorf("find the module's folder: %w", err)
	}
	return strings.TrimSpace(string(out)), nil
}
