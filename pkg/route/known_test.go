// SPDX-License-Identifier: Apache-2.0

package route

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

func open(t *testing.T, dir string) *Known {
	t.Helper()
	k, err := OpenKnown(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func learn(t *testing.T, k *Known, c Claim) {
	t.Helper()
	if _, err := k.Learn(c); err != nil {
		t.Fatal(err)
	}
}

func flush(t *testing.T, k *Known) {
	t.Helper()
	if err := k.Flush(); err != nil {
		t.Fatal(err)
	}
}

func wantClaims(t *testing.T, k *Known, want ...Claim) {
	t.Helper()
	if got := k.Claims(); len(got)+len(want) > 0 && !reflect.DeepEqual(got, want) {
		t.Fatalf("claims %v, want %v", got, want)
	}
}

func TestKnownInMemory(t *testing.T) {
	k := open(t, "")
	for _, step := range []struct {
		claim   Claim
		changed bool
	}{
		{claim("edge-1", "10.0.0.2", "10.0.0.1"), true},
		{claim("edge-1", "10.0.0.1", "::ffff:10.0.0.2", "10.0.0.1"), false}, // the same, written otherwise
		{claim("edge-2", "10.0.0.3"), true},
		{claim("edge-1", "10.0.0.9"), true}, // the latest login counts
		{Claim{Node: "edge-3"}, true},
		{Claim{Node: "edge-3"}, false},
	} {
		changed, err := k.Learn(step.claim)
		if err != nil || changed != step.changed {
			t.Errorf("learn %v: %t, %v", step.claim, changed, err)
		}
	}
	wantClaims(t, k, claim("edge-1", "10.0.0.9"), claim("edge-2", "10.0.0.3"), Claim{"edge-3", []netip.Addr{}})
	if !k.Forget("edge-2") || k.Forget("edge-2") || k.Forget("edge-4") {
		t.Error("forget must say whether it forgot")
	}
	flush(t, k)
	if s := k.Status(); s.Nodes != 2 || s.Addrs != 1 || s.Unsaved || s.Saves != 0 || s.Err != nil {
		t.Errorf("status %+v", s)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := k.Run(ctx); err != nil {
		t.Error(err)
	}
}

func TestKnownSurvives(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	k := open(t, dir)
	learn(t, k, claim("edge-1", "2001:db8::1", "10.0.0.1"))
	learn(t, k, claim("edge-2", "10.0.0.2"))
	learn(t, k, claim("edge-3", "127.0.0.1")) // what rules say is not for the file: rules change
	k.Forget("edge-2")
	if !k.Status().Unsaved {
		t.Error("saved too early")
	}
	flush(t, k)
	if s := k.Status(); s.Unsaved || s.Saves != 1 {
		t.Errorf("status %+v", s)
	}
	flush(t, k)
	if s := k.Status(); s.Saves != 1 {
		t.Error("wrote without a change")
	}
	again := open(t, dir)
	wantClaims(t, again, claim("edge-1", "10.0.0.1", "2001:db8::1"), claim("edge-3", "127.0.0.1"))
	if s := again.Status(); s.Nodes != 2 || s.Addrs != 3 || s.Unsaved {
		t.Errorf("status %+v", s)
	}

	got, err := os.ReadFile(filepath.Join(dir, "targets.json"))
	if err != nil {
		t.Fatal(err)
	}
	want := `{"version":1,"nodes":[
{"node":"edge-1","addrs":["10.0.0.1","2001:db8::1"]},
{"node":"edge-3","addrs":["127.0.0.1"]}
]}
`
	if string(got) != want {
		t.Errorf("file:\n%s\nwant:\n%s", got, want)
	}
	for path, mode := range map[string]os.FileMode{dir: 0o700, filepath.Join(dir, "targets.json"): 0o600} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s: %v %v", path, info.Mode(), err)
		}
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Errorf("left behind: %v", entries)
	}
}

func TestKnownEmptiedSurvives(t *testing.T) {
	dir := t.TempDir()
	k := open(t, dir)
	learn(t, k, claim("edge-1", "10.0.0.1"))
	flush(t, k)
	k.Forget("edge-1")
	flush(t, k)
	wantClaims(t, open(t, dir))
}

func TestKnownBounds(t *testing.T) {
	k := open(t, "")
	many := make([]netip.Addr, MaxNodeAddrs+1)
	for i := range many {
		many[i] = netip.AddrFrom4([4]byte{10, 1, 0, byte(i)})
	}
	learn(t, k, claim("edge-1", "10.0.0.1"))
	for _, test := range []struct {
		claim  Claim
		reason string
	}{
		{Claim{"", addrs("10.0.0.1")}, "bad_node_name"},
		{Claim{strings.Repeat("a", 254), nil}, "bad_node_name"},
		{Claim{"edge\n1", nil}, "bad_node_name"},
		{Claim{"Edge", nil}, "bad_node_name"},
		{Claim{"edge-1", []netip.Addr{{}}}, "bad_address"},
		{Claim{"edge-1", addrs("fe80::1%eth0")}, "bad_address"},
		{Claim{"edge-1", many}, "too_many_addresses"},
	} {
		changed, err := k.Learn(test.claim)
		var refused *ClaimError
		if changed || !errors.As(err, &refused) || refused.Reason() != test.reason || strings.Contains(err.Error(), "\n") {
			t.Errorf("%.20q: %t, %v, want %s", test.claim.Node, changed, err, test.reason)
		}
	}
	wantClaims(t, k, claim("edge-1", "10.0.0.1"))
	if _, err := k.Learn(Claim{"edge-1", many[:MaxNodeAddrs]}); err != nil {
		t.Error(err)
	}

	// Fill it, addresses first: 4096 nodes of 64 are all that are allowed.
	for n := 1; n < MaxAddrs/MaxNodeAddrs; n++ {
		for i := range many {
			many[i] = netip.AddrFrom4([4]byte{11, byte(n >> 8), byte(n), byte(i)})
		}
		learn(t, k, Claim{fmt.Sprintf("full-%d", n), many[:MaxNodeAddrs]})
	}
	reason := func(c Claim) string {
		_, err := k.Learn(c)
		var refused *ClaimError
		if !errors.As(err, &refused) {
			return fmt.Sprint(err)
		}
		return refused.Reason()
	}
	if got := reason(claim("one-more", "10.0.0.1")); got != "too_many_addresses" {
		t.Error(got)
	}
	if s := k.Status(); s.Addrs != MaxAddrs {
		t.Errorf("%d addresses", s.Addrs)
	}
	for n := k.Status().Nodes; n < MaxNodes; n++ {
		learn(t, k, Claim{Node: fmt.Sprintf("empty-%d", n)})
	}
	if got := reason(Claim{Node: "one-more"}); got != "too_many_nodes" {
		t.Error(got)
	}
	learn(t, k, claim("edge-1", "10.0.0.5")) // a known node may still change
	k.Forget("edge-1")
	learn(t, k, claim("one-more", "10.0.0.1")) // and a forgotten one makes room
}

// The largest set allowed must fit into the largest file that is read back.
func TestLargestSetFitsFile(t *testing.T) {
	line := len(`{"node":"","addrs":[]},` + "\n")
	addr := len(`"ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",`)
	if most := MaxNodes*(line+maxNodeName) + MaxAddrs*addr + 100; most > maxClaimsFile {
		t.Errorf("%d bytes, but files end at %d", most, maxClaimsFile)
	}
}

func TestCorruptFileIsSetAside(t *testing.T) {
	good := `{"version":1,"nodes":[{"node":"edge-1","addrs":["10.0.0.1"]}]}`
	for name, data := range map[string]string{
		"empty":           "",
		"truncated":       good[:len(good)-3],
		"garbage":         "\x00\x01\x02\x03",
		"trailing":        good + `{"version":1}`,
		"later version":   strings.Replace(good, `:1,`, `:2,`, 1),
		"no version":      `{"nodes":[]}`,
		"unknown field":   strings.Replace(good, `"node":`, `"nod":`, 1),
		"bad address":     strings.Replace(good, "10.0.0.1", "10.0.0.256", 1),
		"empty address":   strings.Replace(good, "10.0.0.1", "", 1),
		"address in zone": strings.Replace(good, "10.0.0.1", "fe80::1%eth0", 1),
		"bad name":        strings.Replace(good, "edge-1", "edge 1", 1),
		"node twice":      strings.Replace(good, `[{`, `[{"node":"edge-1","addrs":[]},{`, 1),
		"too many addrs":  strings.Replace(good, `"10.0.0.1"`, manyAddrs(MaxNodeAddrs+1), 1),
		"too long":        good + strings.Repeat(" ", maxClaimsFile),
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "targets.json")
			if err := os.WriteFile(path, []byte(data), 0o600); err != nil {
				t.Fatal(err)
			}
			k := open(t, dir)
			wantClaims(t, k)
			var corrupt *CorruptError
			if !errors.As(k.Status().Err, &corrupt) {
				t.Fatalf("not reported: %+v", k.Status())
			}
			if kept, err := os.ReadFile(corrupt.KeptAs); err != nil || string(kept) != data {
				t.Errorf("not kept: %v", err)
			}
			if _, err := os.Stat(path); !os.IsNotExist(err) {
				t.Errorf("still there: %v", err)
			}
			learn(t, k, claim("edge-2", "10.0.0.2"))
			flush(t, k)
			if s := k.Status(); s.Err != nil {
				t.Errorf("saved, but status is %+v", s)
			}
			wantClaims(t, open(t, dir), claim("edge-2", "10.0.0.2"))
			if kept, err := os.ReadFile(corrupt.KeptAs); err != nil || string(kept) != data {
				t.Errorf("no longer kept: %v", err)
			}
		})
	}
}

func manyAddrs(n int) string {
	var list []string
	for i := range n {
		list = append(list, fmt.Sprintf(`"10.1.%d.%d"`, i>>8, i&0xff))
	}
	return strings.Join(list, ",")
}

func TestUnreadableStateIsAnError(t *testing.T) {
	t.Run("file is a folder", func(t *testing.T) {
		dir := t.TempDir()
		if err := os.Mkdir(filepath.Join(dir, "targets.json"), 0o700); err != nil {
			t.Fatal(err)
		}
		if k, err := OpenKnown(dir, nil); err == nil {
			t.Errorf("opened: %+v", k.Status())
		}
	})
	t.Run("folder is a file", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if k, err := OpenKnown(path, nil); err == nil {
			t.Errorf("opened: %+v", k.Status())
		}
	})
}

// smallDisk mounts a file system of a few pages and returns its folder.
func smallDisk(t *testing.T, size string) string {
	t.Helper()
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Fatalf("mount a small file system (needs root): %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func TestFullDisk(t *testing.T) {
	dir := smallDisk(t, "64k")
	k := open(t, dir)
	learn(t, k, claim("edge-1", "10.0.0.1"))
	flush(t, k)

	hog := filepath.Join(dir, "hog")
	if err := os.WriteFile(hog, make([]byte, 1<<20), 0o600); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("the disk is not full: %v", err)
	}
	learn(t, k, claim("edge-2", "10.0.0.2"))
	if err := k.Flush(); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("flush: %v", err)
	}
	if s := k.Status(); s.Err == nil || s.SaveFailures != 1 || !s.Unsaved || s.Nodes != 2 {
		t.Errorf("status %+v", s)
	}
	wantClaims(t, open(t, dir), claim("edge-1", "10.0.0.1")) // the old file is whole

	// Run does not give up.
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- k.Run(ctx) }()
	if err := os.Remove(hog); err != nil {
		t.Fatal(err)
	}
	for k.Status().Unsaved {
		time.Sleep(10 * time.Millisecond)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	wantClaims(t, open(t, dir), claim("edge-1", "10.0.0.1"), claim("edge-2", "10.0.0.2"))
}

// A corrupt file on a disk that takes no changes: the server goes on without it and never writes over it.
func TestCorruptFileOnReadOnlyDisk(t *testing.T) {
	dir := smallDisk(t, "64k")
	path := filepath.Join(dir, "targets.json")
	if err := os.WriteFile(path, []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	remount := func(flags uintptr) {
		t.Helper()
		if err := syscall.Mount("", dir, "", syscall.MS_REMOUNT|flags, "size=64k"); err != nil {
			t.Fatal(err)
		}
	}
	remount(syscall.MS_RDONLY)
	k := open(t, dir)
	var corrupt *CorruptError
	if err := k.Status().Err; !errors.As(err, &corrupt) || corrupt.KeptAs != "" || !errors.Is(err, syscall.EROFS) {
		t.Fatalf("reported %v", err)
	}
	learn(t, k, claim("edge-1", "10.0.0.1"))
	if err := k.Flush(); !errors.Is(err, syscall.EROFS) {
		t.Fatalf("flush: %v", err)
	}
	remount(0)
	flush(t, k)
	aside, err := filepath.Glob(path + ".corrupt-*")
	if err != nil || len(aside) != 1 {
		t.Fatalf("set aside: %v %v", aside, err)
	}
	if kept, err := os.ReadFile(aside[0]); err != nil || string(kept) != "garbage" {
		t.Errorf("kept %q %v", kept, err)
	}
	wantClaims(t, open(t, dir), claim("edge-1", "10.0.0.1"))
}

// What a crash in the middle of a write leaves behind does not hurt, whatever its mode.
func TestLeftOverTempFile(t *testing.T) {
	dir := t.TempDir()
	temp := filepath.Join(dir, ".targets.json.new")
	if err := os.WriteFile(temp, []byte(`{"version":1,"no`), 0o666); err != nil {
		t.Fatal(err)
	}
	k := open(t, dir)
	learn(t, k, claim("edge-1", "10.0.0.1"))
	flush(t, k)
	info, err := os.Stat(filepath.Join(dir, "targets.json"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", info, err)
	}
	if _, err := os.Stat(temp); !os.IsNotExist(err) {
		t.Errorf("temporary file: %v", err)
	}
}

func TestStormOfLoginsIsFewWrites(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		k := open(t, dir)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- k.Run(ctx) }()
		for i := range 10_000 { // over ten seconds
			learn(t, k, claim(fmt.Sprintf("edge-%d", i), fmt.Sprintf("10.0.%d.%d", i>>8, i&0xff)))
			time.Sleep(time.Millisecond)
		}
		time.Sleep(2 * saveDelay)
		synctest.Wait()
		if s := k.Status(); s.Unsaved || s.Saves < 5 || s.Saves > 12 {
			t.Errorf("status %+v", s)
		}
		saves := k.Status().Saves
		time.Sleep(time.Hour)
		if got := k.Status().Saves; got != saves {
			t.Errorf("%d writes without a change", got-saves)
		}
		k.Forget("edge-0")
		cancel() // before the delay is over: what is not yet written is written now
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	if got := len(open(t, dir).Claims()); got != 9_999 {
		t.Errorf("%d claims in the file", got)
	}
}

func TestRetriesGrow(t *testing.T) {
	dir := t.TempDir()
	state := filepath.Join(dir, "state")
	synctest.Test(t, func(t *testing.T) {
		k := open(t, state)
		if err := os.Remove(state); err != nil { // each write fails now
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- k.Run(ctx) }()
		learn(t, k, claim("edge-1", "10.0.0.1"))
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if s := k.Status(); s.SaveFailures < 10 || s.SaveFailures > 17 || s.Err == nil { // 1+2+4+…+32 s, then each minute
			t.Errorf("status %+v", s)
		}
		cancel()
		if err := <-done; err == nil {
			t.Error("the last write failed, but Run did not say so")
		}
	})
}

func TestKnownConcurrently(t *testing.T) {
	dir := t.TempDir()
	k := open(t, dir)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- k.Run(ctx) }()
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for i := range 200 {
				node := fmt.Sprintf("edge-%d-%d", w, i)
				k.Learn(claim(node, fmt.Sprintf("10.%d.0.%d", w, i)))
				k.Learn(claim(node, fmt.Sprintf("10.%d.1.%d", w, i)))
				if i%2 == 0 {
					k.Forget(node)
				}
				if i%50 == 0 {
					k.Flush()
					k.Claims()
					k.Status()
				}
			}
		})
	}
	wg.Wait()
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if s := k.Status(); s.Nodes != 800 || s.Addrs != 800 || s.Unsaved {
		t.Errorf("status %+v", s)
	}
	wantClaims(t, open(t, dir), k.Claims()...)
}

// FuzzDecodeClaims: any file is refused or understood in a way that survives being written and read again.
func FuzzDecodeClaims(f *testing.F) {
	f.Add([]byte(`{"version":1,"nodes":[{"node":"edge-1","addrs":["10.0.0.1","::ffff:10.0.0.2","fd00::1"]},{"node":"e","addrs":[]}]}`))
	f.Add([]byte(`{"version":1,"nodes":[]}`))
	f.Add([]byte(`{"version":2}`))
	f.Add([]byte(`{"version":1,"nodes":null}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		claims, err := decodeClaims(data)
		if err != nil {
			return
		}
		var b strings.Builder
		if err := encodeClaims(&b, claims); err != nil {
			t.Fatal(err)
		}
		again, err := decodeClaims([]byte(b.String()))
		if err != nil || !reflect.DeepEqual(again, claims) {
			t.Fatalf("%s: %v, wrote %v, read %v", data, err, claims, again)
		}
		Build(claims, Rules{})
	})
}
