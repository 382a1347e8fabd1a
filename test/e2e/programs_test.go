// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"sync"
	"testing"
)

// programs builds the programs when the first test needs them, and returns the folder that they are in.
var programs = sync.OnceValues(func() (string, error) { return buildPrograms(raceDetector()) })

// plainPrograms are without the race detector, whatever the tests have: for tests that move gigabytes or measure
// memory.
var plainPrograms = sync.OnceValues(func() (string, error) {
	if !raceDetector() {
		return programs()
	}
	return buildPrograms(false)
})

// newPlainWorld is newWorld with plainPrograms.
func newPlainWorld(t *testing.T) *world {
	t.Helper()
	w := newWorld(t)
	bin, err := plainPrograms()
	if err != nil {
		t.Fatal(err)
	}
	w.bin = bin
	return w
}

func buildPrograms(race bool) (string, error) {
	dir, err := os.MkdirTemp("", programsPrefix())
	if err != nil {
		return "", err
	}
	// Nodes' processes may have other identities.
	if err := os.Chmod(dir, 0o755); err != nil {
		return "", err
	}
	args := []string{"build", "-o", dir + "/"}
	if race {
		args = append(args, "-race")
	}
	for _, name := range []string{"tunnel-server", "tunnel-agent", "tunnel-controller", "tunnelctl"} {
		args = append(args, "github.com/edge-tunnel/edge-tunnel/cmd/"+name)
	}
	out, err := exec.Command("go", args...).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("build the programs: %w: %s", err, out)
	}
	return dir, err
}

// programsPrefix is how the folders of this run are called.
func programsPrefix() string { return fmt.Sprintf("et-e2e-%d-", os.Getpid()) }

// removePrograms is for the very end.
func removePrograms() {
	dirs, _ := filepath.Glob(filepath.Join(os.TempDir(), programsPrefix()+"*"))
	for _, dir := range dirs {
		_ = os.RemoveAll(dir)
	}
}

// raceDetector reports whether this test has it. The programs shall have it then, too.
func raceDetector() bool {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return false
	}
	for _, s := range info.Settings {
		if s.Key == "-race" {
			return s.Value == "true"
		}
	}
	return false
}

// raceStatus is how a program ends after a data race. The detector's own pause at each exit would make the tests slow.
const (
	raceStatus   = 66
	raceVariable = "GORACE=halt_on_error=1 exitcode=66 atexit_sleep_ms=0"
)
