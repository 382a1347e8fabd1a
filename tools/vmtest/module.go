// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"debug/elf"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// module is a kernel module, uncompressed.
type module struct {
	name    string
	content []byte
}

// modules returns the named kernel modules and those they need, in the order of loading. A name that the kernel's package does not
// have is left out: it is built in there, or the tests will say that it is missing.
func modules(ctx context.Context, folder, busybox string, names ...string) ([]module, error) {
	files := map[string]string{}
	err := filepath.WalkDir(folder, func(file string, _ fs.DirEntry, err error) error {
		if name, _, ok := strings.Cut(filepath.Base(file), ".ko"); ok {
			files[moduleName(name)] = file
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list kernel modules: %w", err)
	}

	var order []module
	taken := map[string]bool{}
	var take func(name string) error
	take = func(name string) error {
		file, known := files[name]
		if taken[name] || !known {
			return nil
		}
		taken[name] = true
		content, err := readModule(ctx, file, busybox)
		if err != nil {
			return err
		}
		needs, err := moduleNeeds(content)
		if err != nil {
			return fmt.Errorf("read %s: %w", file, err)
		}
		for _, need := range needs {
			if err := take(need); err != nil {
				return err
			}
		}
		order = append(order, module{name, content})
		return nil
	}
	for _, name := range names {
		if err := take(moduleName(name)); err != nil {
			return nil, err
		}
	}
	return order, nil
}

// moduleName: the kernel treats "-" and "_" alike, file names do not.
func moduleName(s string) string { return strings.ReplaceAll(s, "-", "_") }

func readModule(ctx context.Context, file, busybox string) ([]byte, error) {
	if !strings.HasSuffix(file, ".xz") {
		return os.ReadFile(file)
	}
	content, err := exec.CommandContext(ctx, busybox, "unxz", "-c", file).Output()
	if err != nil {
		return nil, fmt.Errorf("unpack %s: %w", file, err)
	}
	return content, nil
}

// moduleNeeds reads the line "depends=a,b" of a module's information. The package has no modules.dep: that is
// made on installation.
func moduleNeeds(content []byte) ([]string, error) {
	object, err := elf.NewFile(bytes.NewReader(content))
	if err != nil {
		return nil, err
	}
	section := object.Section(".modinfo")
	if section == nil {
		return nil, fmt.Errorf("no .modinfo section")
	}
	data, err := section.Data()
	if err != nil {
		return nil, err
	}
	for field := range bytes.SplitSeq(data, []byte{0}) {
		if list, ok := bytes.CutPrefix(field, []byte("depends=")); ok && len(list) > 0 {
			return strings.Split(moduleName(string(list)), ","), nil
		}
	}
	return nil, nil
}
