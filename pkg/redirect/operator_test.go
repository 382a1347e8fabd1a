// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestBpftoolReadsTheMaps: without a decoder.
func TestBpftoolReadsTheMaps(t *testing.T) {
	bpftool, err := exec.LookPath("bpftool")
	if err != nil {
		t.Skip("needs bpftool")
	}
	l := newLab(t)
	k, _ := l.ready()
	places := k.filter.places(edge4)
	word := func(i int) string {
		return fmt.Sprintf(`{"key":%d,"value":%d}`, places[i].word, k.filter[i][places[i].word])
	}
	blanks := regexp.MustCompile(`\s`)
	for name, want := range map[string]string{
		kernelMapConfig:         `"host4":[0,0,0,0,0,0,0,0,0,0,255,255,127,0,0,1]`,
		kernelMapPorts:          `"port":10250`,
		kernelMapTargets:        `{"addr":[0,0,0,0,0,0,0,0,0,0,255,255,10,99,0,5]},"value":{"state":"TARGET_ONLINE"}`,
		kernelMapTargetNodes:    `{"addr":[0,0,0,0,0,0,0,0,0,0,255,255,10,99,0,5]},"value":{"node":"edge-1"}`,
		kernelMapCounters:       `"bind_refused":0`,
		kernelMapTargetNetworks: word(0),
		kernelMapTargetFilter:   word(1),
	} {
		dump, err := exec.CommandContext(t.Context(), bpftool, "map", "dump", "pinned", k.pins.mapPin(name)).CombinedOutput()
		if err != nil || !strings.Contains(blanks.ReplaceAllString(string(dump), ""), want) {
			t.Errorf("%s (%v) does not show %s:\n%s", name, err, want, dump)
		}
	}
}

// TestMissingCapabilitiesAreNamed opens as root without any of root's capabilities, as in a container.
func TestMissingCapabilitiesAreNamed(t *testing.T) {
	l := newLab(t)
	in(l.host, func() {
		// Of this thread only, which ends with the function.
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData
		if err := unix.Capset(&header, &none[0]); err != nil {
			t.Error("drop capabilities:", err)
			return
		}
		_, err := Open(t.Context(), l.options())
		var hinted interface{ Hint() string }
		if !errors.As(err, &hinted) || !strings.Contains(hinted.Hint(), "CAP_NET_ADMIN, CAP_SYS_ADMIN") {
			t.Errorf("%v, want a hint that names the capabilities", err)
		}
	})
}
