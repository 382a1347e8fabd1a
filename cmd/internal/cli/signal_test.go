// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bufio"
	"bytes"
	"os/exec"
	"syscall"
	"testing"
)

// started runs the waiter as a process of its own and returns a function that reads its next line.
func started(t *testing.T, args ...string) (cmd *exec.Cmd, next func() string, stderr *bytes.Buffer) {
	t.Helper()
	cmd = exec.CommandContext(t.Context(), "waiter", args...)
	cmd.Env = append(cmd.Environ(), "GORACE=atexit_sleep_ms=0") // the race detector's default is a second
	stderr = new(bytes.Buffer)
	cmd.Stderr = stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(stdout)
	next = func() string {
		if !lines.Scan() {
			t.Errorf("no more lines: %v", lines.Err())
		}
		return lines.Text()
	}
	if line := next(); line != "ready" {
		t.Fatalf("it said %q", line)
	}
	return cmd, next, stderr
}

func signalled(t *testing.T, cmd *exec.Cmd, sig syscall.Signal) {
	t.Helper()
	if err := cmd.Process.Signal(sig); err != nil {
		t.Fatal(err)
	}
}

func TestSignalCancels(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
		cmd, next, stderr := started(t, "--graceful")
		signalled(t, cmd, sig)
		if line := next(); line != "stopping" {
			t.Errorf("it said %q", line)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("after %v: %v, %s", sig, err, stderr)
		}
	}
}

func TestSignalIsNamed(t *testing.T) {
	cmd, _, stderr := started(t)
	signalled(t, cmd, syscall.SIGTERM)
	_ = cmd.Wait()
	if status := cmd.ProcessState.ExitCode(); status != StatusFailed || stderr.String() != "error: stopped by a signal (terminated)\n" {
		t.Errorf("status %d, %s", status, stderr)
	}
}

func TestSecondSignalEndsAtOnce(t *testing.T) {
	cmd, next, stderr := started(t, "--stubborn")
	signalled(t, cmd, syscall.SIGINT)
	if line := next(); line != "stopping" {
		t.Errorf("it said %q", line)
	}
	signalled(t, cmd, syscall.SIGTERM)
	_ = cmd.Wait()
	if status := cmd.ProcessState.ExitCode(); status != StatusFailed || stderr.String() != "error: ended at once by a second signal (terminated)\n" {
		t.Errorf("status %d, %s", status, stderr)
	}
}

func TestHangupAsksForReload(t *testing.T) {
	cmd, next, _ := started(t, "--graceful")
	for range 2 {
		signalled(t, cmd, syscall.SIGHUP)
		if line := next(); line != "reloaded" {
			t.Errorf("it said %q", line)
		}
	}
	signalled(t, cmd, syscall.SIGTERM)
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}
