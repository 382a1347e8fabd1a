// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// programs makes a folder with two programs of that content.
func programs(t *testing.T, content string) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"tunnel-agent", "tunnel-server"} {
		must(t, os.WriteFile(filepath.Join(dir, name), []byte(name+content), 0o755))
	}
	return dir
}

// unpacked is what a container runtime makes of the archive.
func unpacked(t *testing.T, archive string) layout.Path {
	t.Helper()
	raw, err := os.ReadFile(archive)
	must(t, err)
	dir := t.TempDir()
	for r := tar.NewReader(bytes.NewReader(raw)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		must(t, err)
		must(t, os.MkdirAll(filepath.Dir(filepath.Join(dir, h.Name)), 0o755))
		content, err := io.ReadAll(r)
		must(t, err)
		must(t, os.WriteFile(filepath.Join(dir, h.Name), content, 0o644))
	}
	p, err := layout.FromPath(dir)
	must(t, err)
	return p
}

func TestImage(t *testing.T) {
	amd64, arm64 := programs(t, " for amd64"), programs(t, " for arm64")
	out := filepath.Join(t.TempDir(), "image.tar")
	const ref = "example.test:5000/edge-tunnel:v1"
	must(t, run(ref, "v1", out, []string{"amd64=" + amd64, "arm64=" + arm64}))

	index, err := unpacked(t, out).ImageIndex()
	must(t, err)
	must(t, validate.Index(index))
	top, err := index.IndexManifest()
	must(t, err)
	if len(top.Manifests) != 1 || top.Manifests[0].Annotations["io.containerd.image.name"] != ref || top.Manifests[0].Annotations["org.opencontainers.image.ref.name"] != "v1" {
		t.Fatalf("%+v, want one image by its name", top.Manifests)
	}
	both, err := index.ImageIndex(top.Manifests[0].Digest)
	must(t, err)
	images, err := both.IndexManifest()
	must(t, err)
	var machines []string
	for _, m := range images.Manifests {
		machines = append(machines, m.Platform.String())
		image, err := both.Image(m.Digest)
		must(t, err)
		config, err := image.ConfigFile()
		must(t, err)
		if config.Platform().String() != m.Platform.String() || config.Config.User != nobody {
			t.Errorf("%v: made for %v, user %q", m.Platform, config.Platform(), config.Config.User)
		}
		layers, err := image.Layers()
		must(t, err)
		raw, err := layers[0].Uncompressed()
		must(t, err)
		var names []string
		for r := tar.NewReader(raw); ; {
			h, err := r.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			must(t, err)
			names = append(names, h.Name)
			if h.Name == "tunnel-agent" {
				content, err := io.ReadAll(r)
				must(t, err)
				if want := "tunnel-agent for " + m.Platform.Architecture; string(content) != want || h.Mode != 0o755 {
					t.Errorf("%v: %q, mode %o, want %q", m.Platform, content, h.Mode, want)
				}
			}
		}
		if want := []string{"tmp/", "etc/", "etc/passwd", "tunnel-agent", "tunnel-server"}; !slices.Equal(names, want) {
			t.Errorf("%v: %v, want %v", m.Platform, names, want)
		}
	}
	if want := []string{"linux/amd64", "linux/arm64"}; !slices.Equal(machines, want) {
		t.Errorf("for %v, want %v", machines, want)
	}

	again := filepath.Join(t.TempDir(), "image.tar")
	must(t, run(ref, "v1", again, []string{"amd64=" + amd64, "arm64=" + arm64}))
	one, err := os.ReadFile(out)
	must(t, err)
	two, err := os.ReadFile(again)
	must(t, err)
	if !bytes.Equal(one, two) {
		t.Error("the same programs give another archive")
	}
}

func TestNothingToPack(t *testing.T) {
	for arg, want := range map[string]string{"amd64": "want ARCH=FOLDER", "amd64=" + t.TempDir(): "make build", "amd64=/absent/folder": "no such file"} {
		if err := run("a:b", "", filepath.Join(t.TempDir(), "x.tar"), []string{arg}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", arg, err, want)
		}
	}
}
