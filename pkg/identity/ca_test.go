// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

func mode(t *testing.T, path string) fs.FileMode {
	t.Helper()
	return must[fs.FileInfo](t)(os.Stat(path)).Mode().Perm()
}

func leafOf(t *testing.T, i Issued) *x509.Certificate {
	t.Helper()
	return must[[]*x509.Certificate](t)(parseCerts([]byte(read(t, i.CertFile))))[0]
}

func TestInitCA(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "pki")
	ca := must[*CA](t)(InitCA(dir, CAOptions{}))
	for path, want := range map[string]fs.FileMode{dir: 0o700, ca.CertFile(): 0o644, filepath.Join(dir, "ca.key"): 0o600, filepath.Join(dir, "index"): 0o600} {
		if got := mode(t, path); got != want {
			t.Errorf("%s has mode %o, want %o", path, got, want)
		}
	}
	key, ok := ca.cert.PublicKey.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() || !ca.cert.IsCA || !ca.cert.MaxPathLenZero {
		t.Errorf("got %+v", ca.cert)
	}
	if years := time.Until(ca.NotAfter()).Hours() / 24 / 365.25; years < 9.9 || years > 10.1 {
		t.Errorf("valid for %v years", years)
	}
	before := read(t, ca.CertFile()) + read(t, filepath.Join(dir, "ca.key"))
	for _, gone := range []string{"", "ca.crt", "index"} { // whatever is left is not replaced
		if gone != "" {
			os.Rename(filepath.Join(dir, gone), filepath.Join(t.TempDir(), gone))
		}
		_, err := InitCA(dir, CAOptions{})
		if fe := wantFileError(t, err, "CA folder", "exists already"); !errors.Is(fe, fs.ErrExist) {
			t.Fatal(err)
		}
	}
	if !strings.HasSuffix(before, read(t, filepath.Join(dir, "ca.key"))) {
		t.Fatal("key replaced")
	}
	file := filepath.Join(t.TempDir(), "file")
	put(t, file, "")
	if _, err := InitCA(file, CAOptions{}); err == nil {
		t.Fatal("a file is no folder")
	}
}

func TestOpenCA(t *testing.T) {
	ca := newCA(t)
	again := must[*CA](t)(OpenCA(ca.dir, CAOptions{}))
	if !again.cert.Equal(ca.cert) || !again.key.Equal(ca.key) {
		t.Fatal("another CA")
	}
	crt, key := ca.CertFile(), filepath.Join(ca.dir, "ca.key")
	goodCrt, goodKey := read(t, crt), read(t, key)

	_, err := OpenCA(t.TempDir(), CAOptions{})
	wantFileError(t, err, "CA certificate", "not exist")
	os.Chmod(key, 0o644)
	_, err = OpenCA(ca.dir, CAOptions{})
	wantFileError(t, err, "CA key", "mode 0644")
	os.Chmod(key, 0o600)
	other := newCA(t)
	copyFile(t, filepath.Join(other.dir, "ca.key"), key)
	_, err = OpenCA(ca.dir, CAOptions{})
	wantFileError(t, err, "CA key", "does not belong")
	put(t, crt, read(t, other.CertFile())+goodCrt) // a bundle, ours last
	put(t, key, goodKey)
	if again := must[*CA](t)(OpenCA(ca.dir, CAOptions{})); !again.cert.Equal(ca.cert) {
		t.Fatal("took the wrong certificate of the bundle")
	}
	put(t, crt, "garbage")
	_, err = OpenCA(ca.dir, CAOptions{})
	wantFileError(t, err, "CA certificate", "no PEM")
	put(t, crt, goodCrt)
	put(t, key, "garbage")
	_, err = OpenCA(ca.dir, CAOptions{})
	wantFileError(t, err, "CA key", "no PEM")
}

func TestIssue(t *testing.T) {
	ca := newCA(t)
	s := must[Issued](t)(ca.IssueServer("cloud-1", []string{"Cloud.Example.ORG.", "192.0.2.1", "[2001:db8::1]", "::ffff:192.0.2.2"}))
	c := leafOf(t, s)
	if !slices.Equal(c.DNSNames, []string{"cloud.example.org"}) || fmt.Sprint(c.IPAddresses) != "[192.0.2.1 2001:db8::1 192.0.2.2]" {
		t.Errorf("got %v, %v", c.DNSNames, c.IPAddresses)
	}
	if !slices.Equal(c.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}) || c.IsCA {
		t.Errorf("got %v", c.ExtKeyUsage)
	}
	a := must[Issued](t)(ca.IssueAgent("edge-1.site", addrs("fd00::5", "::ffff:10.99.0.5", "10.99.0.5"), false))
	c = leafOf(t, a)
	p := must[Peer](t)(describe(c))
	if !slices.Equal(c.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}) || c.DNSNames != nil ||
		p.Name != "edge-1.site" || p.Role != RoleAgent || p.Serial != a.Serial || !p.NotAfter.Equal(a.NotAfter) || !slices.Equal(p.Addrs, addrs("10.99.0.5", "fd00::5")) {
		t.Errorf("got %+v, %v", p, c.ExtKeyUsage)
	}
	if bits := c.SerialNumber.BitLen(); bits < 90 || bits > 128 {
		t.Errorf("serial number of %d bits", bits)
	}
	if back := time.Since(c.NotBefore); back < 30*time.Minute || back > 2*time.Hour {
		t.Errorf("backdated by %v", back)
	}
	if days := time.Until(a.NotAfter).Hours() / 24; days < 364 || days > 366 {
		t.Errorf("valid for %v days", days)
	}
	for path, want := range map[string]fs.FileMode{a.CertFile: 0o644, a.KeyFile: 0o600, s.CertFile: 0o644, s.KeyFile: 0o600} {
		if got := mode(t, path); got != want {
			t.Errorf("%s has mode %o, want %o", path, got, want)
		}
	}
	if want := filepath.Join(ca.dir, "edge-1.site.crt"); a.CertFile != want {
		t.Errorf("%s, want %s", a.CertFile, want)
	}
	again := must[Issued](t)(ca.IssueAgent("edge-1.site", addrs("10.99.0.5"), false)) // a renewal
	if again.Serial == a.Serial || leafOf(t, again).Equal(c) {
		t.Error("not renewed")
	}
	must[Issued](t)(ca.IssueAgent("kube-node", nil, false)) // the name only
	must[Issued](t)(ca.IssueAgent(strings.Repeat("a", maxIssuedName), nil, false))
}

func TestLifetimes(t *testing.T) {
	var c clock
	o := CAOptions{Validity: 48 * time.Hour, LeafValidity: 36 * time.Hour, Clock: c.now}
	ca := must[*CA](t)(InitCA(filepath.Join(t.TempDir(), "pki"), o))
	a := must[Issued](t)(ca.IssueAgent("a", nil, false))
	if h := time.Until(a.NotAfter).Hours(); h < 35.9 || h > 36.1 {
		t.Errorf("valid for %v hours", h)
	}
	c.set(24 * time.Hour)
	if b := must[Issued](t)(ca.IssueAgent("b", nil, false)); !b.NotAfter.Equal(ca.NotAfter()) {
		t.Errorf("a leaf until %v, its CA until %v", b.NotAfter, ca.NotAfter())
	}
	c.set(49 * time.Hour)
	_, err := ca.IssueAgent("c", nil, false)
	wantFileError(t, err, "CA certificate", "expired")
	_, err = OpenCA(ca.dir, o)
	wantFileError(t, err, "CA certificate", "expired")
}

func TestRequestsThatMakeNoSense(t *testing.T) {
	ca := newCA(t)
	must[Issued](t)(ca.IssueAgent("taken", nil, false))
	must[Issued](t)(ca.IssueServer("cloud", []string{"localhost"}))
	many := make([]netip.Addr, maxAddrs+1)
	for i := range many {
		many[i] = netip.AddrFrom4([4]byte{10, 0, 1, byte(i)})
	}
	before := read(t, filepath.Join(ca.dir, "index"))
	agent := func(name string, a ...string) func() error {
		return func() error { _, err := ca.IssueAgent(name, addrs(a...), false); return err }
	}
	server := func(name string, hosts ...string) func() error {
		return func() error { _, err := ca.IssueServer(name, hosts); return err }
	}
	for name, issue := range map[string]func() error{
		"named ca": agent("ca"), "server named ca": server("ca", "localhost"), "empty": agent(""), "path": agent("../x"), "upper": agent("Edge"),
		"252 bytes": agent(strings.Repeat("a", maxIssuedName+1)), "254 bytes": agent(strings.Repeat("a", 254)),
		"agent and server": server("taken", "localhost"), "server and agent": agent("cloud"),
		"loopback": agent("a", "127.0.0.1"), "any": agent("a", "::"), "multicast": agent("a", "224.0.0.1"), "link-local": agent("a", "fe80::1"),
		"broadcast": agent("a", "255.255.255.255"), "mapped loopback": agent("a", "::ffff:127.0.0.1"),
		"zone":       func() error { _, err := ca.IssueAgent("a", addrs("2001:db8::1%eth0"), false); return err },
		"no address": func() error { _, err := ca.IssueAgent("a", []netip.Addr{{}}, false); return err },
		"many":       func() error { _, err := ca.IssueAgent("a", many, false); return err },
		"no hosts":   server("s"), "host with port": server("s", "localhost:10262"), "URL": server("s", "https://x"), "mistyped": server("s", "10.0.0.256"),
		"wildcard": server("s", "*.example.org"), "host with zone": server("s", "fe80::1%eth0"), "empty host": server("s", ""),
		"many hosts": server("s", make([]string, maxHosts+1)...),
	} {
		var re *RequestError
		if err := issue(); !errors.As(err, &re) || re.Error() == "" || strings.Contains(re.Error(), "\n") {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if read(t, filepath.Join(ca.dir, "index")) != before {
		t.Error("a refused request is in the index")
	}
	if left, _ := filepath.Glob(filepath.Join(ca.dir, "*.key")); len(left) != 3 {
		t.Errorf("got %v", left)
	}
}

func TestAddressOfAnotherNode(t *testing.T) {
	ca := newCA(t)
	a := must[Issued](t)(ca.IssueAgent("a", addrs("10.0.0.1", "fd00::1"), false))
	other := must[*CA](t)(OpenCA(ca.dir, CAOptions{})) // the index is on disk, not in memory
	_, err := other.IssueAgent("b", addrs("10.0.0.2", "::ffff:10.0.0.1"), false)
	var taken *TakenError
	if !errors.As(err, &taken) || taken.Node != "b" || !strings.Contains(err.Error(), `10.0.0.1 was issued to node "a"`) || !slices.Equal(taken.Taken, []Moved{{addrs("10.0.0.1")[0], "a", a.Serial}}) || taken.Hint() == "" {
		t.Fatalf("got %v", err)
	}
	if _, err := os.Stat(filepath.Join(ca.dir, "b.crt")); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal("a refused certificate was written")
	}
	b := must[Issued](t)(other.IssueAgent("b", addrs("10.0.0.2", "10.0.0.1"), true))
	if !slices.Equal(b.Moved, taken.Taken) {
		t.Fatalf("got %+v", b.Moved)
	}
	// It is b's now, fd00::1 is still a's.
	must[Issued](t)(ca.IssueAgent("b", addrs("10.0.0.1"), false))
	if _, err = ca.IssueAgent("a", addrs("10.0.0.1"), false); !errors.As(err, &taken) {
		t.Fatalf("got %v", err)
	}
	if _, err = ca.IssueAgent("b", addrs("fd00::1"), false); !errors.As(err, &taken) {
		t.Fatalf("got %v", err)
	}
	// A renewal without an address does not give it up: the old certificate still has it.
	must[Issued](t)(ca.IssueAgent("a", nil, false))
	if _, err = ca.IssueAgent("b", addrs("fd00::1"), false); !errors.As(err, &taken) {
		t.Fatalf("got %v", err)
	}
}

func TestRenewalsDoNotGrowTheIndex(t *testing.T) {
	var c clock
	ca := must[*CA](t)(InitCA(filepath.Join(t.TempDir(), "pki"), CAOptions{Clock: c.now, LeafValidity: time.Hour}))
	must[Issued](t)(ca.IssueAgent("gone", addrs("10.0.0.9"), false))
	for n := range 10 {
		c.set(time.Duration(n) * 2 * time.Hour)
		must[Issued](t)(ca.IssueAgent("a", addrs("10.0.0.1"), false))
	}
	ix := must[index](t)(parseIndex([]byte(read(t, filepath.Join(ca.dir, "index")))))
	if len(ix) != 2 {
		t.Fatalf("got %+v", ix)
	}
	var taken *TakenError // expired or not, nobody said that it has moved
	if _, err := ca.IssueAgent("a", addrs("10.0.0.9"), false); !errors.As(err, &taken) {
		t.Fatalf("got %v", err)
	}
}

func TestIssueAtTheSameTime(t *testing.T) {
	dir := newCA(t).dir
	const issuers, each = 6, 5
	var won sync.Map
	var wg sync.WaitGroup
	for i := range issuers {
		ca := must[*CA](t)(OpenCA(dir, CAOptions{})) // each with a lock of its own, like processes
		wg.Go(func() {
			for n := range each {
				if _, err := ca.IssueAgent(fmt.Sprintf("edge-%d-%d", i, n), []netip.Addr{netip.AddrFrom4([4]byte{10, 1, byte(i), byte(n)})}, false); err != nil {
					t.Error(err)
				}
				// Everybody wants this one.
				_, err := ca.IssueAgent(fmt.Sprintf("rival-%d", i), []netip.Addr{netip.AddrFrom4([4]byte{10, 2, 0, byte(n)})}, false)
				var taken *TakenError
				switch {
				case err == nil:
					if other, dup := won.LoadOrStore(n, i); dup {
						t.Errorf("10.2.0.%d issued to %v and %d", n, other, i)
					}
				case !errors.As(err, &taken):
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	ix := must[index](t)(parseIndex([]byte(read(t, filepath.Join(dir, "index")))))
	if len(ix) != issuers*each+each {
		t.Errorf("%d entries, want %d", len(ix), issuers*each+each)
	}
	for n := range each {
		if _, ok := won.Load(n); !ok {
			t.Errorf("nobody got 10.2.0.%d", n)
		}
	}
}

// What a crash at any point may leave: a temporary file, or an index entry without its files.
func TestIssueAfterCrash(t *testing.T) {
	ca := newCA(t)
	a := must[Issued](t)(ca.IssueAgent("a", addrs("10.0.0.1"), false))
	left := filepath.Join(ca.dir, unfinished)
	put(t, left, "a private key")
	for _, path := range []string{a.CertFile, a.KeyFile} {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	var taken *TakenError
	if _, err := ca.IssueAgent("b", addrs("10.0.0.1"), false); !errors.As(err, &taken) {
		t.Fatalf("got %v", err)
	}
	if _, err := os.Stat(left); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal("left behind")
	}
	leafOf(t, must[Issued](t)(ca.IssueAgent("a", addrs("10.0.0.1"), false)))
}

func TestDamagedIndex(t *testing.T) {
	ca := newCA(t)
	must[Issued](t)(ca.IssueAgent("a", addrs("10.0.0.1"), false))
	path := filepath.Join(ca.dir, "index")
	good := read(t, path)
	for name, text := range map[string]string{
		"empty": "", "another version": strings.Replace(good, "index 1", "index 2", 1), "cut off": good[:len(good)-5], "no line end": good[:len(good)-1],
		"garbage": good + "hello\n", "no fields": good + "\n", "bad role": strings.Replace(good, "agent", "king", 1), "bad address": strings.Replace(good, "10.0.0.1", "10.0.0.x", 1),
	} {
		put(t, path, text)
		_, err := ca.IssueAgent("b", addrs("10.0.0.1"), false)
		if err == nil {
			t.Fatalf("%s: issued", name)
		}
		wantFileError(t, err, "CA index", "")
		if read(t, path) != text {
			t.Fatalf("%s: index replaced", name)
		}
	}
	os.Remove(path)
	_, err := ca.IssueAgent("b", addrs("10.0.0.1"), false)
	wantFileError(t, err, "CA index", "not exist")
}

func TestFolderCannotBeWritten(t *testing.T) {
	ca := newCA(t)
	// A folder in place of the certificate makes the last rename fail, for root too.
	if err := os.Mkdir(filepath.Join(ca.dir, "a.crt"), 0o700); err != nil {
		t.Fatal(err)
	}
	_, err := ca.IssueAgent("a", nil, false)
	var fe *FileError
	if !errors.As(err, &fe) || fe.Path != filepath.Join(ca.dir, "a.crt") {
		t.Fatalf("got %v", err)
	}
	if _, err := os.Stat(filepath.Join(ca.dir, unfinished)); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal("left behind")
	}
}
