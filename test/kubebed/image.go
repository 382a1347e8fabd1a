// SPDX-License-Identifier: Apache-2.0

package kubebed

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"path"
	"runtime"
	"time"
)

// image is a container image made from scratch: one layer with programs that need nothing else.
type image struct {
	name    string            // REPOSITORY:TAG
	files   map[string]string // path in the image to file here; mode 0755
	links   map[string]string // path in the image to what it points to
	command []string          // entry point
}

// write writes an OCI archive, as "ctr images import" reads it.
func (i *image) write(file string) error {
	layer, err := i.layer()
	if err != nil {
		return fmt.Errorf("image %s: %w", i.name, err)
	}
	archive := newArchive()
	layerRef := archive.blob("application/vnd.oci.image.layer.v1.tar", layer)
	config := archive.blob("application/vnd.oci.image.config.v1+json", Object{
		"architecture": runtime.GOARCH, "os": "linux",
		"config": Object{"Entrypoint": i.command, "Env": []string{"PATH=/bin"}},
		"rootfs": Object{"type": "layers", "diff_ids": []any{layerRef["digest"]}},
	})
	manifest := archive.blob("application/vnd.oci.image.manifest.v1+json", Object{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": []Object{layerRef},
	})
	manifest["annotations"] = Object{"io.containerd.image.name": i.name}
	archive.json("index.json", Object{"schemaVersion": 2, "manifests": []Object{manifest}})
	archive.json("oci-layout", Object{"imageLayoutVersion": "1.0.0"})
	content, err := archive.close()
	if err != nil {
		return fmt.Errorf("image %s: %w", i.name, err)
	}
	return os.WriteFile(file, content, 0o644)
}

func (i *image) layer() ([]byte, error) {
	a := newArchive()
	for _, dir := range []string{"etc", "tmp"} {
		a.header(&tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o1777})
	}
	a.file("etc/passwd", 0o644, []byte("root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n"))
	for to, from := range i.files {
		content, err := os.ReadFile(from)
		if err != nil {
			return nil, err
		}
		a.file(path.Clean(to)[1:], 0o755, content)
	}
	for at, to := range i.links {
		a.header(&tar.Header{Typeflag: tar.TypeSymlink, Name: path.Clean(at)[1:], Linkname: to, Mode: 0o777})
	}
	return a.close()
}

// archive is a tar file in memory. The first error is kept for close.
type archive struct {
	buf bytes.Buffer
	tar *tar.Writer
	err error
}

func newArchive() *archive {
	a := &archive{}
	a.tar = tar.NewWriter(&a.buf)
	return a
}

func (a *archive) header(h *tar.Header) {
	h.ModTime = time.Unix(0, 0)
	if a.err == nil {
		a.err = a.tar.WriteHeader(h)
	}
}

func (a *archive) file(name string, mode int64, content []byte) {
	a.header(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(content))})
	if a.err == nil {
		_, a.err = a.tar.Write(content)
	}
}

func (a *archive) json(name string, v any) {
	content, err := json.Marshal(v)
	if a.err == nil {
		a.err = err
	}
	a.file(name, 0o644, content)
}

// blob adds bytes, or JSON of anything else, under its hash and returns what refers to it.
func (a *archive) blob(mediaType string, v any) Object {
	content, ok := v.([]byte)
	if !ok {
		var err error
		if content, err = json.Marshal(v); a.err == nil {
			a.err = err
		}
	}
	hash := fmt.Sprintf("%x", sha256.Sum256(content))
	a.file("blobs/sha256/"+hash, 0o644, content)
	return Object{"mediaType": mediaType, "digest": "sha256:" + hash, "size": len(content)}
}

func (a *archive) close() ([]byte, error) {
	if a.err != nil {
		return nil, a.err
	}
	err := a.tar.Close()
	return a.buf.Bytes(), err
}
