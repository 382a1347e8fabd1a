// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"net/netip"
	"reflect"
	"strings"
	"testing"
)

func TestOptionsValidate(t *testing.T) {
	if err := (Options{}).Validate(); err != nil {
		t.Error("the zero value:", err)
	}
	bad := Options{BPFFS: "relative", CgroupRoot: "too", RedirectPort: 65530, Capacity: -1, MaxTargets: -1}
	err := bad.Validate()
	if err == nil {
		t.Fatal("everything is wrong, and accepted")
	}
	for _, part := range []string{"relative", "too", "65530", "capacity", "targets"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q does not mention %s", err, part)
		}
	}
	if err := (Options{RedirectPort: 65528}).Validate(); err != nil {
		t.Error("the last eight ports:", err)
	}
}

// TestCountersAreComplete: a counter that is new in the kernel half has to be summed here.
func TestCountersAreComplete(t *testing.T) {
	kernel := reflect.TypeFor[kernelCounters]()
	ours := reflect.TypeFor[Counters]()
	for i := range kernel.NumField() {
		name := kernel.Field(i).Name
		if name == "_" {
			continue
		}
		if _, ok := ours.FieldByName(name); !ok {
			t.Errorf("Counters has no %s", name)
		}
	}
	if n := kernel.NumField() - 1; n != ours.NumField() {
		t.Errorf("the kernel has %d counters, Counters %d", n, ours.NumField())
	}
	one := kernelCounters{}
	for v, i := reflect.ValueOf(&one).Elem(), 1; i < kernel.NumField(); i++ {
		v.Field(i).SetUint(uint64(i))
	}
	sum := reflect.ValueOf(sumCounters([]kernelCounters{one, one}))
	for i := 1; i < kernel.NumField(); i++ {
		if got := sum.FieldByName(kernel.Field(i).Name).Uint(); got != uint64(2*i) {
			t.Errorf("%s is %d, want %d", kernel.Field(i).Name, got, 2*i)
		}
	}
}

func TestFindCgroup2(t *testing.T) {
	const hybrid = `23 28 0:21 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
24 23 0:22 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu
25 23 0:23 / /sys/fs/cgroup/unified rw,nosuid - cgroup2 cgroup2 rw
`
	for name, c := range map[string]struct{ mounts, want string }{
		"hybrid":          {hybrid, "/sys/fs/cgroup/unified"},
		"pure":            {"30 23 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw\n", "/sys/fs/cgroup"},
		"the root's wins": {"30 23 0:26 /a /mnt/a rw - cgroup2 none rw\n31 23 0:26 / /mnt/root rw - cgroup2 none rw\n", "/mnt/root"},
		"only a part":     {"30 23 0:26 /a /mnt/a rw - cgroup2 none rw\n", "/mnt/a"},
		"a blank":         {`30 23 0:26 / /mnt/a\040b rw - cgroup2 none rw`, "/mnt/a b"},
		"none":            {"24 23 0:22 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n", ""},
		"garbage":         {"cgroup2 - cgroup2 \n - cgroup2 x\n", ""},
	} {
		got, err := findCgroup2(strings.NewReader(c.mounts))
		if got != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%s: %q (%v), want %q", name, got, err, c.want)
		}
	}
}

func FuzzFindCgroup2(f *testing.F) {
	f.Add("25 23 0:23 / /sys/fs/cgroup/unified rw,nosuid - cgroup2 cgroup2 rw\n")
	f.Add("- cgroup2 \n")
	f.Fuzz(func(t *testing.T, mounts string) {
		if path, err := findCgroup2(strings.NewReader(mounts)); err == nil && path == "" {
			t.Error("found nothing, and no error")
		}
	})
}

func FuzzTarget(f *testing.F) {
	f.Add([]byte{10, 0, 0, 1}, "edge-1", uint32(1))
	f.Add(netip.IPv6Loopback().AsSlice(), strings.Repeat("n", 253), uint32(3))
	f.Fuzz(func(t *testing.T, addr []byte, node string, state uint32) {
		a, _ := netip.AddrFromSlice(addr)
		in := Target{a, node, State(state)}
		if in.check() != nil {
			return
		}
		if out := decodeTarget(in.key(), in.state(), in.node()); out != in {
			t.Errorf("%v came back as %v", in, out)
		}
	})
}
