// SPDX-License-Identifier: Apache-2.0

package netlab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Cmd is an [exec.Cmd] that starts inside a node: in its namespaces and in its cgroup. It is killed with the lab and
// when the process that made the lab dies.
type Cmd struct {
	*exec.Cmd
	node *Node
}

// Command prepares a program of the node; a name without a slash is looked up as the node sees it. Cancelling ctx kills it.
func (n *Node) Command(ctx context.Context, name string, args ...string) *Cmd {
	c := &Cmd{node: n}
	n.thread.do(func() { c.Cmd = exec.CommandContext(ctx, name, args...) })
	c.WaitDelay = 5 * time.Second // a grandchild may hold the output open
	c.Env = environment()
	return c
}

// environment is the test's own, less what would lead a program out of the lab.
func environment() []string {
	return slices.DeleteFunc(os.Environ(), func(v string) bool {
		name, _, _ := strings.Cut(v, "=")
		return strings.HasSuffix(strings.ToLower(name), "_proxy") || name == "SSH_AUTH_SOCK"
	})
}

// Start starts the program. Its process is in the node's cgroup from its first instruction on.
func (c *Cmd) Start() error {
	group, err := os.Open(filepath.Join(c.node.cgroup, c.node.within))
	if err != nil {
		return fmt.Errorf("start in %s: %w", c.node.Name, err)
	}
	defer group.Close()
	if c.SysProcAttr == nil {
		c.SysProcAttr = &syscall.SysProcAttr{}
	}
	c.SysProcAttr.UseCgroupFD = true
	c.SysProcAttr.CgroupFD = int(group.Fd())
	c.SysProcAttr.Pdeathsig = syscall.SIGKILL
	// Ctrl-C in a terminal is for whoever made the lab, who ends the processes in order.
	c.SysProcAttr.Setpgid = true
	c.node.thread.do(func() { err = c.Cmd.Start() })
	if err != nil {
		return fmt.Errorf("start in %s: %w", c.node.Name, err)
	}
	return nil
}

// Run starts the program and waits for it.
func (c *Cmd) Run() error {
	if err := c.Start(); err != nil {
		return err
	}
	return c.Wait()
}

// Output runs the program and returns its standard output; see [exec.Cmd.Output].
func (c *Cmd) Output() ([]byte, error) {
	var out bytes.Buffer
	c.Stdout = &out
	err := c.Run()
	return out.Bytes(), err
}

// CombinedOutput runs the program and returns standard output and standard error.
func (c *Cmd) CombinedOutput() ([]byte, error) {
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	err := c.Run()
	return out.Bytes(), err
}

// output is CombinedOutput with the output in the error.
func (c *Cmd) output() (string, error) {
	out, err := c.CombinedOutput()
	text := strings.TrimSpace(string(out))
	if err != nil {
		return text, fmt.Errorf("%s: %w: %s", strings.Join(c.Args, " "), err, text)
	}
	return text, nil
}

// Run runs a program for at most a minute and returns what it wrote, trimmed. The error has it too.
func (n *Node) Run(name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return n.Command(ctx, name, args...).output()
}

// Process is a program that runs until it is stopped, with its output in a file.
type Process struct {
	cmd    *Cmd
	log    string
	exited chan struct{} // closed when err is set
	err    error

	killOnce sync.Once
}

// Start starts a daemon. What it writes goes into [Process.Log], and into the test's log if the test fails.
func (n *Node) Start(name string, args ...string) (*Process, error) {
	return n.StartCmd(n.Command(context.Background(), name, args...))
}

// StartCmd is Start for a command that was prepared with [Node.Command] or [Node.Helper]; its outputs must be unset.
func (n *Node) StartCmd(cmd *Cmd) (*Process, error) {
	log, err := os.CreateTemp(n.Path("logs"), baseName(cmd.Path)+"-")
	if err != nil {
		return nil, err
	}
	defer log.Close() // the child has its own
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &Process{cmd: cmd, log: log.Name(), exited: make(chan struct{})}
	go func() {
		defer close(p.exited)
		p.err = cmd.Wait()
	}()
	n.mu.Lock()
	n.processes = append(n.processes, p)
	n.mu.Unlock()
	return p, nil
}

func baseName(path string) string { return path[strings.LastIndexByte(path, '/')+1:] }

// PID is the process's id, which is the same inside and outside of the node.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Exited is closed when the process has ended and was waited for.
func (p *Process) Exited() <-chan struct{} { return p.exited }

// Wait returns how the process ended, as [exec.Cmd.Wait] does; ctx bounds the waiting only.
func (p *Process) Wait(ctx context.Context) error {
	select {
	case <-p.exited:
		return p.err
	case <-ctx.Done():
		return fmt.Errorf("wait for process %d: %w", p.PID(), ctx.Err())
	}
}

// Signal sends a signal; a process that has ended is not an error.
func (p *Process) Signal(sig os.Signal) error {
	if err := p.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return nil
}

// Stop sends SIGTERM and waits for the end; after the grace period it kills and says so. A clean exit is nil.
func (p *Process) Stop(grace time.Duration) error {
	if err := p.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	select {
	case <-p.exited:
		return p.err
	case <-time.After(grace):
		p.Kill()
		return fmt.Errorf("%s did not end within %v of SIGTERM", p.cmd.Args[0], grace)
	}
}

// Kill sends SIGKILL and waits for the end.
func (p *Process) Kill() {
	p.killOnce.Do(func() { _ = p.cmd.Process.Kill() }) // it may have ended
	<-p.exited
}

// Log is everything that the process has written so far.
func (p *Process) Log() string {
	content, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	return string(content)
}

// WaitFor waits until the log contains text, and fails when ctx ends or the process does.
func (p *Process) WaitFor(ctx context.Context, text string) error {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		if strings.Contains(p.Log(), text) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %q from %s: %w; it wrote:\n%s", text, p.cmd.Args[0], ctx.Err(), p.Log())
		case <-p.exited:
			if strings.Contains(p.Log(), text) {
				return nil
			}
			return fmt.Errorf("%s ended (%s) before it wrote %q; it wrote:\n%s", p.cmd.Args[0], p.cmd.ProcessState, text, p.Log())
		case <-tick.C:
		}
	}
}

// logProcesses shows what the daemons of the node wrote.
func (n *Node) logProcesses(t T) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, p := range n.processes {
		t.Logf("%s: %s\n%s", n.Name, strings.Join(p.cmd.Args, " "), p.Log())
	}
}
