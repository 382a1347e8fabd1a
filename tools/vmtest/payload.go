// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"debug/elf"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"time"
)

// testedPackages are those whose tests depend on the kernel that they run on.
func testedPackages() []string { return []string{"./pkg/redirect"} }

// newPayload builds everything that goes into the machines.
func newPayload(ctx context.Context, work string, o options) (payload, error) {
	p := payload{files: map[string]string{}, limit: 6 * time.Minute}
	var err error
	if p.busybox, err = staticProgram("busybox"); err != nil {
		return p, err
	}
	for _, pkg := range testedPackages() {
		name := path.Base(pkg)
		binary := filepath.Join(work, name+".test")
		cmd := exec.CommandContext(ctx, "go", "test", "-c", "-trimpath", "-ldflags", "-s -w", "-o", binary, pkg)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if text, err := cmd.CombinedOutput(); err != nil {
			return p, fmt.Errorf("build the tests of %s: %w\n%s", pkg, err, text)
		}
		p.files["/tests/"+name] = binary
		p.jobs = append(p.jobs, job{name, []string{"/tests/" + name, "-test.v", "-test.timeout=5m", "-test.run=" + o.run}})
	}
	return p, nil
}

// staticProgram finds a program of the machine that runs where there are no libraries.
func staticProgram(name string) (string, error) {
	file, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("%w\nhint: make deps", err)
	}
	object, err := elf.Open(file)
	if err != nil {
		return "", fmt.Errorf("read %s: %w", file, err)
	}
	defer object.Close()
	for _, part := range object.Progs {
		if part.Type == elf.PT_INTERP {
			return "", fmt.Errorf("%s is not linked statically\nhint: Debian's package busybox-static has the right one", file)
		}
	}
	return file, nil
}
