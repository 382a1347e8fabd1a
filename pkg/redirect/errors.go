// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"errors"
	"fmt"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// ErrNotIntercepted says that an accepted connection was not redirected by the programs: somebody connected to the listener itself,
// or the connection's addresses were changed on the way (SNAT). Reset it.
var ErrNotIntercepted = errors.New("connection was not intercepted")

// ErrNotInstalled says that nothing of edge-tunnel is pinned.
var ErrNotInstalled = errors.New("edge-tunnel is not installed in this kernel")

// ErrInUse says that a daemon holds the pinned state.
var ErrInUse = errors.New("a tunnel-server holds the pinned programs")

// An Error names what failed and, with Hint, what to do about it.
type Error struct {
	Op   string // "attach connect4"
	Err  error
	hint string
}

func (e *Error) Error() string { return e.Op + ": " + e.Err.Error() }
func (e *Error) Unwrap() error { return e.Err }

// Hint is one sentence for the user, or empty.
func (e *Error) Hint() string { return e.hint }

func fail(op string, err error, hint string) error {
	return &Error{Op: op, Err: err, hint: hint}
}

// explain adds the hint that an error of the kernel calls for.
func explain(op string, err error) error {
	return fail(op, err, hintFor(err))
}

func hintFor(err error) string {
	var hinted interface{ Hint() string }
	switch {
	case errors.As(err, &hinted):
		return hinted.Hint()
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		if missing := missingCapabilities(); len(missing) > 0 {
			return "this needs " + strings.Join(missing, ", ") + ": run as root, or add the capabilities to the container"
		}
		return "the process has the capabilities; look for a security module, kernel lockdown or a seccomp profile that forbids bpf()"
	case errors.Is(err, unix.ENOSYS):
		return "the kernel is built without CONFIG_BPF_SYSCALL and CONFIG_CGROUP_BPF, or a seccomp profile forbids bpf()"
	case errors.Is(err, ebpf.ErrNotSupported), errors.Is(err, unix.EINVAL):
		return fmt.Sprintf("Linux %s runs here; 5.10 or newer with CONFIG_CGROUP_BPF, CONFIG_BPF_SYSCALL and CONFIG_INET is needed", kernelRelease())
	case errors.Is(err, unix.ENOMEM):
		return "the kernel had no memory for the maps; on kernels before 5.11 raise the limit on locked memory (ulimit -l unlimited)"
	case errors.Is(err, unix.ENOSPC):
		return "the bpf filesystem or the map is full"
	}
	return ""
}

// missingCapabilities names what this process lacks of what loading and attaching need.
func missingCapabilities() []string {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return nil
	}
	has := func(capability int) bool {
		return data[capability/32].Effective&(1<<(capability%32)) != 0
	}
	var missing []string
	if !has(unix.CAP_NET_ADMIN) {
		missing = append(missing, "CAP_NET_ADMIN")
	}
	// Running programs are looked up by id, which CAP_BPF alone does not allow; CAP_SYS_ADMIN includes it.
	if !has(unix.CAP_SYS_ADMIN) {
		missing = append(missing, "CAP_SYS_ADMIN")
	}
	return missing
}

func kernelRelease() string {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return "(unknown)"
	}
	return unix.ByteSliceToString(name.Release[:])
}
