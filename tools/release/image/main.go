// SPDX-License-Identifier: Apache-2.0

// Command image packs static programs into one OCI image for several machines: nothing but the programs, a folder for
// temporary files and the users' names. The archive that it writes is what "ctr images import", "skopeo copy oci-archive:" and "podman
// load" read. The same programs give the same bytes.
//
//	image -ref REF -version VERSION -out FILE ARCH=FOLDER...
package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// nobody is the user of what needs no rights, by its number, because Kubernetes' runAsNonRoot looks at nothing else.
const nobody = "65532:65532"

func main() {
	ref := flag.String("ref", "", "the image's whole name, REGISTRY/NAME:TAG")
	version := flag.String("version", "", "what its labels say")
	out := flag.String("out", "", "the archive to write")
	flag.Parse()
	if *ref == "" || *out == "" || flag.NArg() == 0 {
		fmt.Fprintln(os.Stderr, "usage: image -ref REF -version VERSION -out FILE ARCH=FOLDER...")
		os.Exit(2)
	}
	if err := run(*ref, *version, *out, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

func run(ref, version, out string, folders []string) error {
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, arg := range folders {
		arch, folder, ok := strings.Cut(arg, "=")
		if !ok {
			return fmt.Errorf("%s: want ARCH=FOLDER", arg)
		}
		image, err := build(arch, version, folder)
		if err != nil {
			return err
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{
			Add: image, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}},
		})
	}
	dir, err := os.MkdirTemp(filepath.Dir(out), ".image-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	// A layout is a list of images: ours is the only one, by its name. containerd reads the one annotation, others the other.
	path, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	tag := ref[strings.LastIndex(ref, ":")+1:]
	names := map[string]string{"io.containerd.image.name": ref, "org.opencontainers.image.ref.name": tag}
	if err := path.AppendIndex(index, layout.WithAnnotations(names)); err != nil {
		return err
	}
	return archive(dir, out)
}

// build makes the image for one machine.
func build(arch, version, folder string) (v1.Image, error) {
	files, err := layer(folder)
	if err != nil {
		return nil, err
	}
	programs, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(files)), nil }, tarball.WithMediaType(types.OCILayer))
	if err != nil {
		return nil, err
	}
	image := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	image, err = mutate.AppendLayers(image, programs)
	if err != nil {
		return nil, err
	}
	config, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.Architecture, config.OS = arch, "linux"
	config.Created = v1.Time{Time: time.Unix(0, 0).UTC()}
	config.Config = v1.Config{
		Env: []string{"PATH=/"}, User: nobody, WorkingDir: "/",
		Labels: map[string]string{
			"org.opencontainers.image.title": "edge-tunnel", "org.opencontainers.image.version": version,
			"org.opencontainers.image.licenses": "Apache-2.0", "org.opencontainers.image.source": "https://github.com/edge-tunnel/edge-tunnel",
		},
	}
	return mutate.ConfigFile(image, config)
}

// layer is a tar of the programs, which "path" finds at the root.
func layer(folder string) ([]byte, error) {
	entries, err := os.ReadDir(folder)
	if err != nil {
		return nil, err
	}
	if len(entries) == 0 {
		return nil, fmt.Errorf("%s has no programs: make build", folder)
	}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	add := func(header tar.Header, content []byte) error {
		header.ModTime, header.Size = time.Unix(0, 0), int64(len(content))
		if err := w.WriteHeader(&header); err != nil {
			return err
		}
		_, err := w.Write(content)
		return err
	}
	err = errors.Join(
		add(tar.Header{Typeflag: tar.TypeDir, Name: "tmp/", Mode: 0o1777}, nil),
		add(tar.Header{Typeflag: tar.TypeDir, Name: "etc/", Mode: 0o755}, nil),
		add(tar.Header{Typeflag: tar.TypeReg, Name: "etc/passwd", Mode: 0o644},
			[]byte("root:x:0:0::/:/\nnonroot:x:65532:65532::/:/\n")),
	)
	for _, e := range entries {
		content, readErr := os.ReadFile(filepath.Join(folder, e.Name()))
		err = errors.Join(err, readErr, add(tar.Header{Typeflag: tar.TypeReg, Name: e.Name(), Mode: 0o755}, content))
	}
	return out.Bytes(), errors.Join(err, w.Close())
}

// archive packs a folder into a tar, with no trace of when or by whom.
func archive(dir, out string) (err error) {
	f, err := os.Create(out)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := tar.NewWriter(f)
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		header := tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(content)), ModTime: time.Unix(0, 0)}
		if err := w.WriteHeader(&header); err != nil {
			return err
		}
		_, err = w.Write(content)
		return err
	})
	return errors.Join(err, w.Close())
}
