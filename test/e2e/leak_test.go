// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/cilium/ebpf/link"
)

// noteLinks remembers what is pinned on a node, to look for it at the end.
func (w *world) noteLinks(h *host) {
	for name, id := range h.linkIDs() {
		w.links[id] = h.Name + "/" + name
	}
}

// checkDaemons fails the test for a daemon that crashed or that the race detector stopped, whatever else the test saw.
func (w *world) checkDaemons() {
	for _, d := range w.daemons {
		select {
		case <-d.Exited():
			if err := exitStatus(d); err == raceStatus {
				w.t.Errorf("%s on %s: stopped by the race detector", d.name, d.host.Name)
			}
		default:
		}
		log := d.Log()
		for _, bad := range []string{"WARNING: DATA RACE", "panic: ", "fatal error: "} {
			if at := strings.Index(log, bad); at >= 0 {
				w.t.Errorf("%s on %s:\n%s", d.name, d.host.Name, log[at:min(len(log), at+8192)])
			}
		}
	}
}

// exitStatus of a daemon that has ended; -1 after a signal.
func exitStatus(d *daemon) int {
	var exit *exec.ExitError
	if errors.As(d.Wait(context.Background()), &exit) {
		return exit.ExitCode()
	}
	return 0
}

// checkLeaks looks for what the world has left, after the lab was closed.
func (w *world) checkLeaks() {
	if w.lab == nil || len(w.hosts) == 0 {
		return
	}
	defer func() {
		for _, h := range w.hosts {
			h.hands.netns.Close()
		}
	}()
	deadline := time.Now().Add(5 * time.Second) // the kernel frees some things a moment later
	for {
		left := w.leaks()
		if len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			w.t.Errorf("left behind:\n%s", strings.Join(left, "\n"))
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (w *world) leaks() []string {
	var left []string
	dir := filepath.Dir(w.lab.Dir())
	if _, err := os.Stat(dir); err == nil {
		left = append(left, "folder "+dir)
	}
	for _, h := range w.hosts {
		if _, err := os.Stat(h.Cgroup()); err == nil {
			left = append(left, "cgroup "+h.Cgroup())
		}
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err == nil && strings.Contains(string(mounts), dir) {
		left = append(left, "a mount in "+dir)
	}
	// As the links in /proc show them. Labs beside this one cannot have the same: our own files keep them.
	namespaces, kept := make(map[string]string), make(map[string]bool)
	for _, h := range w.hosts {
		file := fmt.Sprintf("/proc/self/fd/%d", h.hands.netns.Fd())
		if ns, err := os.Readlink(file); err == nil {
			namespaces[ns], kept[file] = h.Name, true
		}
	}
	for pid, ns := range processes() {
		if name, ours := namespaces[ns]; ours {
			left = append(left, fmt.Sprintf("process %s in the namespace of %s", pid, name))
		}
	}
	files, _ := filepath.Glob("/proc/self/fd/*")
	for _, file := range files {
		ns, _ := os.Readlink(file)
		if name, ours := namespaces[ns]; ours && !kept[file] {
			left = append(left, "a file that keeps the namespace of "+name)
		}
	}
	for id, name := range w.links {
		if l, err := link.NewFromID(link.ID(id)); err == nil {
			l.Close()
			left = append(left, fmt.Sprintf("BPF link %d, %s", id, name))
		}
	}
	return left
}

// processes are the network namespaces of all threads of the machine.
func processes() map[string]string {
	all := make(map[string]string)
	links, _ := filepath.Glob("/proc/[0-9]*/task/[0-9]*/ns/net")
	for _, l := range links {
		if ns, err := os.Readlink(l); err == nil {
			all[strings.Split(l, "/")[4]] = ns
		}
	}
	return all
}
