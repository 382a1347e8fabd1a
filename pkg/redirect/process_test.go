// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"github.com/vishvananda/netns"
	"go.uber.org/goleak"
)

const roleVariable = "EDGE_TUNNEL_TEST_ROLE"

func TestMain(m *testing.M) {
	if role := os.Getenv(roleVariable); role != "" {
		if err := play(role); err != nil {
			fmt.Fprintln(os.Stderr, role+":", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// play is what this program does where a test starts it again, to have a process with descriptors and a cgroup of its own.
func play(role string) error {
	in, out := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	switch role {
	case "flood":
		return flood(in, out)
	case "accept":
		return acceptAndHold(in, out)
	case "visit":
		return visitAndHold(in, out)
	case "find cgroup":
		return findPrivateCgroup(out)
	}
	return errors.New("no such role")
}

// process is this program in a role. It is told what to do in JSON, and answers in JSON; it ends when it is told nothing more.
type process struct {
	t    *testing.T
	role string
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  *json.Decoder
}

// startRole starts a role in a namespace and a cgroup (nil: this process's), with files as its descriptors from 3.
func startRole(t *testing.T, role string, ns netns.NsHandle, cgroup *os.File, files ...*os.File) *process {
	t.Helper()
	self, err := os.Executable()
	must(t, err)
	p := &process{t: t, role: role, cmd: exec.Command(self)}
	p.cmd.Env = append(os.Environ(), roleVariable+"="+role)
	p.cmd.Stderr = os.Stderr
	p.cmd.ExtraFiles = files
	if cgroup != nil {
		p.cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(cgroup.Fd())}
	}
	p.in, err = p.cmd.StdinPipe()
	must(t, err)
	out, err := p.cmd.StdoutPipe()
	must(t, err)
	p.out = json.NewDecoder(out)
	in(ns, func() { err = p.cmd.Start() }) // a child inherits the thread's namespace
	must(t, err)
	t.Cleanup(p.kill)
	return p
}

func (p *process) tell(message any) {
	p.t.Helper()
	must(p.t, json.NewEncoder(p.in).Encode(message))
}

// hear reads the next answer.
func (p *process) hear(answer any) {
	p.t.Helper()
	if err := p.out.Decode(answer); err != nil {
		p.t.Fatalf("%s: %v", p.role, err)
	}
}

// end closes its input and waits for it.
func (p *process) end() {
	p.t.Helper()
	_ = p.in.Close()
	if err := p.cmd.Wait(); err != nil {
		p.t.Errorf("%s: %v", p.role, err)
	}
}

func (p *process) kill() {
	if p.cmd.ProcessState == nil {
		_ = p.cmd.Process.Kill()
		_ = p.cmd.Wait()
	}
}
