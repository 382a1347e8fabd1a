// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"debug/elf"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"time"
)

//go:embed guest/daemons.sh
var daemonsScript []byte

// newPayload builds everything that goes into the machines.
func newPayload(ctx context.Context, work string, o options) (payload, error) {
	p := payload{files: map[string]string{}, limit: 10 * time.Minute}
	var err error
	if p.busybox, err = staticProgram("busybox"); err != nil {
		return p, err
	}
	add := map[string]func() error{
		"redirect": func() error { return p.addTests(ctx, work, "./pkg/redirect", o.run) },
		"daemons":  func() error { return p.addDaemons(ctx, work, o.bin) },
	}
	if o.job == "" {
		return p, errors.Join(add["redirect"](), add["daemons"]())
	}
	if add[o.job] == nil {
		return p, fmt.Errorf("job %q is not known\nhint: redirect and daemons are", o.job)
	}
	return p, add[o.job]()
}

// addTests adds the tests of a package. "-short" tells them that an emulated machine is ten times slower.
func (p *payload) addTests(ctx context.Context, work, pkg, run string) error {
	name := path.Base(pkg)
	binary := filepath.Join(work, name+".test")
	cmd := exec.CommandContext(ctx, "go", "test", "-c", "-trimpath", "-ldflags", "-s -w", "-o", binary, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build the tests of %s: %w\n%s", pkg, err, text)
	}
	p.files["/tests/"+name] = binary
	p.jobs = append(p.jobs, job{name, []string{"/tests/" + name, "-test.v", "-test.short", "-test.timeout=9m", "-test.run=" + run}})
	return nil
}

// addDaemons adds the programs, their certificates and the scenario.
func (p *payload) addDaemons(ctx context.Context, work, bin string) error {
	for _, name := range []string{"tunnel-server", "tunnel-agent", "tunnelctl"} {
		file, err := filepath.Abs(filepath.Join(bin, name))
		if err != nil {
			return err
		}
		if file, err = staticProgram(file); err != nil {
			return err
		}
		p.files["/tests/"+name] = file
	}
	tunnelctl := p.files["/tests/tunnelctl"]
	for _, args := range [][]string{
		{"pki", "init"},
		{"pki", "issue-server", "--name", "cloud-1", "--host", "172.16.1.1"},
		{"pki", "issue-agent", "--node", "edge-1", "--ip", "10.99.0.5,fd99::5"},
	} {
		if _, err := output(ctx, work, tunnelctl, append(args, "--dir", "pki")...); err != nil {
			return err
		}
	}
	for _, name := range []string{"ca.crt", "cloud-1.crt", "cloud-1.key", "edge-1.crt", "edge-1.key"} {
		p.files["/pki/"+name] = filepath.Join(work, "pki", name)
	}
	script := filepath.Join(work, "daemons.sh")
	if err := os.WriteFile(script, daemonsScript, 0o755); err != nil {
		return err
	}
	p.files["/tests/daemons.sh"] = script
	p.jobs = append(p.jobs, job{"daemons", []string{"/tests/daemons.sh"}})
	return nil
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
