// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/edge-tunnel/edge-tunnel/pkg/admin"
	"github.com/edge-tunnel/edge-tunnel/pkg/redirect"
)

// kernel is what a server leaves in the kernel, for commands that work without one.
type kernel struct{ bpffs string }

func (k *kernel) flag(cmd *cobra.Command) {
	cmd.Flags().StringVar(&k.bpffs, "bpffs", "/sys/fs/bpf", "Folder `DIR` where the bpf filesystem is mounted.")
	_ = cmd.MarkFlagDirname("bpffs") // for completion only
}

// targets reads the pinned targets, and says in a sentence what is done with connections to them.
func (k *kernel) targets() (targets []admin.Target, note string, err error) {
	pinned, err := redirect.ReadPinned(k.bpffs)
	if err != nil {
		return nil, "", err
	}
	targets = []admin.Target{}
	for _, t := range pinned.Targets {
		targets = append(targets, admin.Target{Addr: t.Addr, Node: t.Node, State: stateOf(t.State)})
	}
	note = "no tunnel-server is running; these targets are in force in the kernel, and connections to them are refused"
	if len(pinned.Detached) > 0 {
		note = fmt.Sprintf("no tunnel-server is running; these targets are in the kernel, but not in force: nothing is attached at %s",
			strings.Join(pinned.Detached, ", "))
	}
	return targets, note, nil
}

func stateOf(s redirect.State) string {
	switch s {
	case redirect.Online:
		return admin.TargetOnline
	case redirect.Ambiguous:
		return admin.TargetAmbiguous
	case redirect.Offline:
	}
	return admin.TargetOffline
}
