// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"
)

// optOutInterval is how often the folders are looked at: they come and go with the services that they belong to.
const optOutInterval = 5 * time.Second

// optOut keeps the kernel's list of opted-out cgroups in step with folders.
type optOut struct {
	root    string
	folders []string // relative to root
	set     func(ids []uint64) error
	log     *slog.Logger

	inForce []uint64
}

// run follows the folders until ctx ends.
func (o *optOut) run(ctx context.Context) error {
	if len(o.folders) == 0 {
		return nil // apply has cleared what a predecessor may have left
	}
	ticks := time.NewTicker(optOutInterval)
	defer ticks.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticks.C:
			if err := o.apply(); err != nil {
				o.log.Warn("cannot opt cgroups out", "err", err)
			}
		}
	}
}

// apply looks once. A folder that does not exist opts nobody out.
func (o *optOut) apply() error {
	ids := []uint64{}
	for _, folder := range o.folders {
		info, err := os.Stat(filepath.Join(o.root, folder))
		if err != nil || !info.IsDir() {
			continue
		}
		ids = append(ids, info.Sys().(*syscall.Stat_t).Ino) // the kernel's cgroup id is the inode number
	}
	if o.inForce != nil && slices.Equal(ids, o.inForce) {
		return nil
	}
	if err := o.set(ids); err != nil {
		return err
	}
	if o.inForce != nil || len(ids) > 0 {
		o.log.Info("opted-out cgroups", "folders", o.folders, "found", len(ids))
	}
	o.inForce = ids
	return nil
}
