// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// report is what performance.json holds. A suite that is not run keeps what was measured before.
type report struct {
	Datapath *datapathResult `json:"datapath,omitempty"`
	Hook     *hookResult     `json:"hook,omitempty"`
	Hop      *hopResult      `json:"hop,omitempty"`
	Longlink *longlinkResult `json:"longlink,omitempty"`
	Agents   *agentsResult   `json:"agents,omitempty"`
}

// suites measure one part of the report each.
var suites = []struct {
	name string
	run  func(ctx context.Context, o options, into *report) error
}{
	{"datapath", func(ctx context.Context, o options, into *report) (err error) {
		into.Datapath, err = runDatapath(ctx, o)
		return err
	}},
	{"hook", func(ctx context.Context, o options, into *report) (err error) {
		into.Hook, err = runHook(ctx, o)
		return err
	}},
	{"hop", func(ctx context.Context, o options, into *report) (err error) {
		into.Hop, err = runHop(ctx, o)
		return err
	}},
	{"longlink", func(ctx context.Context, o options, into *report) (err error) {
		into.Longlink, err = runLonglink(ctx, o)
		return err
	}},
	{"agents", func(ctx context.Context, o options, into *report) (err error) {
		into.Agents, err = runAgents(ctx, o)
		return err
	}},
}

func suiteNames() []string {
	var names []string
	for _, s := range suites {
		names = append(names, s.name)
	}
	return names
}

// The files of a report, in options.out.
const (
	pageFile = "PERFORMANCE.md"
	jsonFile = "performance.json"
)

// measure runs the suites, prints what came out, and puts it into the files if there is a folder for them.
func measure(ctx context.Context, out io.Writer, o options) error {
	fresh := &report{}
	for _, s := range suites {
		if !slices.Contains(o.suites, s.name) {
			continue
		}
		o.say("suite %s", s.name)
		if err := s.run(ctx, o, fresh); err != nil {
			return fmt.Errorf("suite %s: %w", s.name, err)
		}
	}
	for _, part := range fresh.parts() {
		fmt.Fprintf(out, "%s\n", part.text)
	}
	if o.out == "" {
		return nil
	}
	return fresh.write(o.out)
}

// write puts what was measured into the files, beside what other runs measured.
func (r *report) write(dir string) error {
	all := &report{}
	old, err := os.ReadFile(filepath.Join(dir, jsonFile))
	switch {
	case err == nil:
		if err := json.Unmarshal(old, all); err != nil {
			return fmt.Errorf("read %s of an earlier run: %w", jsonFile, err)
		}
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	if r.Datapath != nil {
		all.Datapath = r.Datapath
	}
	if r.Hook != nil {
		all.Hook = r.Hook
	}
	if r.Hop != nil {
		all.Hop = r.Hop
	}
	if r.Longlink != nil {
		all.Longlink = r.Longlink
	}
	if r.Agents != nil {
		all.Agents = r.Agents
	}
	content, err := json.MarshalIndent(all, "", " ")
	if err != nil {
		return err
	}
	page, err := os.ReadFile(filepath.Join(dir, pageFile))
	if err != nil {
		return err
	}
	for _, part := range r.parts() {
		if page, err = replacePart(page, part); err != nil {
			return fmt.Errorf("%s: %w", pageFile, err)
		}
	}
	return errors.Join(os.WriteFile(filepath.Join(dir, jsonFile), append(content, '\n'), 0o644),
		os.WriteFile(filepath.Join(dir, pageFile), page, 0o644))
}

// circumstances say where and when a suite ran.
type circumstances struct {
	Date   string `json:"date"`
	Commit string `json:"commit"`
	CPU    string `json:"cpu"`
	Cores  int    `json:"cores"`
	Kernel string `json:"kernel"`
	Go     string `json:"go"`
	Rounds int    `json:"rounds"`
	Quick  bool   `json:"quick"`
	Load   string `json:"load"` // average over the minute before the run
}

func look(ctx context.Context, o options) circumstances {
	c := circumstances{
		Date: time.Now().UTC().Format("2006-01-02 15:04 MST"), Commit: commit(ctx), CPU: "unknown", Cores: runtime.NumCPU(),
		Go: runtime.Version(), Rounds: o.rounds, Quick: o.quick,
	}
	var name unix.Utsname
	if unix.Uname(&name) == nil {
		c.Kernel = unix.ByteSliceToString(name.Release[:])
	}
	if info, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(info)) {
			if key, value, _ := strings.Cut(line, ":"); strings.TrimSpace(key) == "model name" {
				c.CPU = strings.TrimSpace(value)
				break
			}
		}
	}
	if load, err := os.ReadFile("/proc/loadavg"); err == nil {
		c.Load, _, _ = strings.Cut(string(load), " ")
	}
	return c
}

// commit is the one that is checked out, marked if the work tree differs from it.
func commit(ctx context.Context) string {
	id, err := exec.CommandContext(ctx, "git", "rev-parse", "--short", "HEAD").Output()
	if err != nil {
		return "unknown"
	}
	name := strings.TrimSpace(string(id))
	if changes, err := exec.CommandContext(ctx, "git", "status", "--porcelain", "--", "*.go", "*.c", "*.h", "go.mod").Output(); err != nil || len(changes) > 0 {
		name += " and uncommitted changes"
	}
	return name
}
