// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
)

// Ports is the number of redirect ports. Eight, because all redirected connections of one client address share one destination
// address: with one port that client would run out of source ports at 28,000 connections.
const Ports = 8

// DefaultPort is the first of the redirect ports.
const DefaultPort = 10270

const (
	defaultBPFFS      = "/sys/fs/bpf"
	defaultCapacity   = 4096
	defaultMaxTargets = 1 << 18
)

// Options of [Open]. The zero value works on a host with the usual mounts.
type Options struct {
	BPFFS        string // a mounted bpf filesystem; default /sys/fs/bpf
	CgroupRoot   string // the folder to attach to; default: the mount of type cgroup2, which has to show the whole hierarchy
	RedirectPort uint16 // the first of eight; default 10270
	HostOnly     bool   // leave other network namespaces (pods) alone

	Capacity   int // targets that there is room for at first; default 4096, grows by itself
	MaxTargets int // more are refused; default 262,144 (400 bytes of kernel memory each)

	// OnWait is called once if another process holds the pinned state and Open has to wait for it.
	OnWait func(path string)
	Log    *slog.Logger // nil: silent

	// Tests of what older kernels do.
	noSetRetval, noNetnsCookie bool
}

// Validate reports everything that is wrong with the options. Empty ones are not: they have defaults.
func (o Options) Validate() error {
	var all []error
	if o.BPFFS != "" && !filepath.IsAbs(o.BPFFS) {
		all = append(all, fmt.Errorf("bpf filesystem %q is not an absolute path", o.BPFFS))
	}
	if o.CgroupRoot != "" && !filepath.IsAbs(o.CgroupRoot) {
		all = append(all, fmt.Errorf("cgroup root %q is not an absolute path", o.CgroupRoot))
	}
	if int(o.RedirectPort)+Ports-1 > 65535 {
		all = append(all, fmt.Errorf("redirect port %d leaves no room for %d ports", o.RedirectPort, Ports))
	}
	if o.Capacity < 0 {
		all = append(all, fmt.Errorf("capacity %d is negative", o.Capacity))
	}
	if o.MaxTargets < 0 || (o.MaxTargets != 0 && o.MaxTargets < o.Capacity) {
		all = append(all, fmt.Errorf("at most %d targets is less than the capacity of %d", o.MaxTargets, o.Capacity))
	}
	return errors.Join(all...)
}

func (o Options) withDefaults() Options {
	if o.BPFFS == "" {
		o.BPFFS = defaultBPFFS
	}
	if o.RedirectPort == 0 {
		o.RedirectPort = DefaultPort
	}
	if o.MaxTargets == 0 {
		o.MaxTargets = defaultMaxTargets
	}
	if o.Capacity == 0 {
		o.Capacity = min(defaultCapacity, o.MaxTargets)
	}
	if o.OnWait == nil {
		o.OnWait = func(string) {}
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return o
}
