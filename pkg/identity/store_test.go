// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

func wantFileError(t testing.TB, err error, what, text string) *FileError {
	t.Helper()
	fe, ok := errors.AsType[*FileError](err)
	if !ok || fe.What != what || !strings.Contains(err.Error(), text) {
		t.Fatalf("got error %v, want one about the %s with %q", err, what, text)
	}
	if fe.Hint() == "" || strings.Contains(err.Error(), "\n") {
		t.Fatalf("error %q has hint %q", err, fe.Hint())
	}
	return fe
}

func TestOpenRefusesBadFiles(t *testing.T) {
	p := newPair(t)
	ours := p.ca.issuer()
	key := ecKey(t, elliptic.P256())
	keyPEM := string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: must[[]byte](t)(x509.MarshalPKCS8PrivateKey(key))}))
	leaf := func(i issuer, edit func(*x509.Certificate)) func(Files) {
		return func(f Files) {
			var text string
			for _, der := range i.leaf(t, key, edit).Certificate {
				text += string(certPEM(der))
			}
			put(t, f.Cert, text)
			put(t, f.Key, keyPEM)
		}
	}
	remove := func(path string) {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name       string
		spoil      func(Files)
		what, text string
	}{
		{"no CA", func(f Files) { remove(f.CA) }, "CA bundle", "no such file"},
		{"no certificate", func(f Files) { remove(f.Cert) }, "certificate", "no such file"},
		{"no key", func(f Files) { remove(f.Key) }, "key", "no such file"},
		{"no deny file", func(f Files) { remove(f.Deny) }, "deny file", "no such file"},
		{"CA is a folder", func(f Files) { remove(f.CA); os.Mkdir(f.CA, 0o700) }, "CA bundle", "not a regular file"},
		{"key is a FIFO", func(f Files) { remove(f.Key); syscall.Mkfifo(f.Key, 0o600) }, "key", "not a regular file"},
		{"key for the group", func(f Files) { os.Chmod(f.Key, 0o640) }, "key", "mode 0640"},
		{"key for the world", func(f Files) { os.Chmod(f.Key, 0o604) }, "key", "mode 0604"},
		{"empty CA", func(f Files) { put(t, f.CA, "") }, "CA bundle", "no PEM block"},
		{"garbage CA", func(f Files) { put(t, f.CA, "\x00\xff garbage") }, "CA bundle", "no PEM block"},
		{"huge CA", func(f Files) { put(t, f.CA, strings.Repeat("x", maxPEMFile+1)) }, "CA bundle", "larger than"},
		{"half a CA", func(f Files) { put(t, f.CA, read(t, f.CA)[:200]) }, "CA bundle", "half-written"},
		{"one and a half CAs", func(f Files) { put(t, f.CA, read(t, f.CA)+read(t, f.CA)[:200]) }, "CA bundle", "half-written"},
		{"a leaf as CA", func(f Files) { copyFile(t, f.Cert, f.CA) }, "CA bundle", "not a CA's"},
		{"a key in the CA", func(f Files) { put(t, f.CA, read(t, f.CA)+read(t, f.Key)) }, "CA bundle", "PRIVATE KEY"},
		{"bad DER in the CA", func(f Files) { put(t, f.CA, string(certPEM([]byte("no")))) }, "CA bundle", "certificate 1"},
		{"expired CA", func(f Files) {
			put(t, f.CA, string(certPEM(root(t, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }).cert.Raw)))
		}, "CA bundle", "expired"},
		{"another CA", func(f Files) { copyFile(t, newCA(t).CertFile(), f.CA) }, "certificate", "unknown_ca"},
		{"garbage certificate", func(f Files) { put(t, f.Cert, "hello") }, "certificate", "no PEM block"},
		{"key as certificate", func(f Files) { copyFile(t, f.Key, f.Cert) }, "certificate", "no certificate"},
		{"certificate as key", func(f Files) { copyFile(t, f.Cert, f.Key) }, "key", "no private key"},
		{"garbage key", func(f Files) { put(t, f.Key, "hello") }, "key", "no PEM block"},
		{"encrypted key", func(f Files) {
			put(t, f.Key, string(pem.EncodeToMemory(&pem.Block{Type: "ENCRYPTED PRIVATE KEY", Bytes: []byte("x")})))
		}, "key", "unencrypted"},
		{"another key", func(f Files) { put(t, f.Key, keyPEM) }, "key", "does not belong"},
		{"P-384", func(f Files) {
			k := ecKey(t, elliptic.P384())
			put(t, f.Cert, string(certPEM(ours.leaf(t, k, nil).Certificate[0])))
			put(t, f.Key, string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: must[[]byte](t)(x509.MarshalPKCS8PrivateKey(k))})))
		}, "certificate", "P-256"},
		{"expired", leaf(ours, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }), "certificate", "expired"},
		{"server's", func(f Files) { copyFile(t, p.sFiles.Cert, f.Cert); copyFile(t, p.sFiles.Key, f.Key) }, "certificate", string(RoleServer)},
		{"no role", leaf(ours, func(c *x509.Certificate) { c.Subject.Organization = nil }), "certificate", "wrong_role"},
		{"bad name", leaf(ours, func(c *x509.Certificate) { c.Subject.CommonName = "Bad" }), "certificate", "bad_name"},
		{"bad usage", leaf(ours, func(c *x509.Certificate) { c.ExtKeyUsage = nil }), "certificate", "bad_usage"},
		{"missing intermediate", func(f Files) {
			r := root(t, nil)
			put(t, f.CA, string(certPEM(r.cert.Raw)))
			sub := r.sub(t, nil)
			sub.rest = nil
			leaf(sub, nil)(f)
		}, "certificate", "unknown_ca"},
		{"bad deny file", func(f Files) { put(t, f.Deny, "edge-1\nserial:xyz\n\nNo Name\n") }, "deny file", "line 2: "},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := files(t, p.ca, Issued{CertFile: p.aFiles.Cert, KeyFile: p.aFiles.Key})
			c.spoil(f)
			_, err := Open(f, Options{Role: RoleAgent})
			wantFileError(t, err, c.what, c.text)
		})
	}
	if _, err := Open(Files{}, Options{Role: RoleAgent}); err == nil || !strings.Contains(err.Error(), "CA bundle") || !strings.Contains(err.Error(), "key") {
		t.Fatalf("got %v", err)
	}
	if _, err := Open(p.aFiles, Options{}); err == nil {
		t.Fatal("no role accepted")
	}
	f := p.aFiles
	f.CA += ".missing"
	_, err := Open(f, Options{Role: RoleAgent})
	if !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("got %v", err)
	}
}

func TestOpenWithWrongClock(t *testing.T) {
	p := newPair(t)
	s := must[*Store](t)(Open(p.aFiles, Options{Role: RoleAgent, Clock: func() time.Time { return time.Unix(60, 0) }}))
	if u := s.Stats().Untrusted; u != "" {
		t.Fatal(u)
	}
}

func TestOpenOtherForms(t *testing.T) {
	p := newPair(t)
	key := must[*ecdsa.PrivateKey](t)(parseKey([]byte(read(t, p.aFiles.Key))))
	// As openssl writes it, and everything in one file, with text around it and carriage returns.
	sec1 := pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: must[[]byte](t)(x509.MarshalECPrivateKey(key))})
	params := "-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n"
	all := strings.ReplaceAll("subject=edge-1\n"+read(t, p.aFiles.Cert)+params+string(sec1), "\n", "\r\n")
	put(t, p.aFiles.Cert, all)
	put(t, p.aFiles.Key, all)
	f := p.aFiles
	f.Deny = ""
	s := must[*Store](t)(Open(f, Options{Role: RoleAgent}))
	if sets := s.Stats().Sets; len(sets) != 2 {
		t.Fatalf("got %+v", sets)
	}
	if o := shake(t, p.server.ServerTLS(protocols), s.ClientTLS("localhost", alpnAgent)); o.serverErr != nil {
		t.Fatal(o.serverErr)
	}
}

func TestReloadKeepsTheLastGoodState(t *testing.T) {
	p := newPair(t)
	before := p.server.Self()
	changed := p.server.Changed()
	put(t, p.sFiles.CA, "garbage")
	put(t, p.sFiles.Cert, read(t, p.sFiles.Cert)[:100])
	put(t, p.sFiles.Deny, "Bad Name\n")
	err := p.server.Reload()
	for _, what := range []string{"CA bundle", "certificate", "deny file"} {
		if err == nil || !strings.Contains(err.Error(), what) {
			t.Fatalf("got %v, want it to name the %s", err, what)
		}
	}
	select {
	case <-changed:
		t.Fatal("nothing has changed")
	default:
	}
	for _, set := range p.server.Stats().Sets {
		if set.Loads != 1 || set.Failures != 1 || set.Error == "" {
			t.Fatalf("got %+v", set)
		}
	}
	if p.server.Self().Serial != before.Serial {
		t.Fatal("another leaf")
	}
	if o := shake(t, p.server.ServerTLS(protocols), p.agent.ClientTLS("localhost", alpnAgent)); o.serverErr != nil || o.clientErr != nil {
		t.Fatal(o.serverErr, o.clientErr)
	}
}

// A broken certificate must not keep a deny entry from taking effect.
func TestSetsAreIndependent(t *testing.T) {
	p := newPair(t)
	o := shake(t, p.server.ServerTLS(protocols), p.agent.ClientTLS("localhost", alpnAgent))
	if o.serverErr != nil {
		t.Fatal(o.serverErr)
	}
	changed := p.server.Changed()
	put(t, p.sFiles.Cert, "half")
	put(t, p.sFiles.Deny, "serial:"+strings.ToUpper(p.agent.Self().Serial)+" # laptop left in a train\n")
	wantFileError(t, p.server.Reload(), "certificate", "")
	<-changed
	_, err := p.server.Peer(o.server)
	wantReason(t, err, ReasonDenied)
	st := p.server.Stats()
	if st.DenyEntries != 1 || st.Sets[1].Error == "" || st.Sets[2].Loads != 2 {
		t.Fatalf("got %+v", st)
	}
	put(t, p.sFiles.Deny, "")
	p.server.Reload()
	must[Peer](t)(p.server.Peer(o.server))
}

func TestReloadRefusesAnotherName(t *testing.T) {
	p := newPair(t)
	other := must[Issued](t)(p.ca.IssueAgent("edge-2", nil, false))
	copyFile(t, other.CertFile, p.aFiles.Cert)
	copyFile(t, other.KeyFile, p.aFiles.Key)
	wantFileError(t, p.agent.Reload(), "certificate", "edge-2")
	if p.agent.Self().Name != "edge-1" {
		t.Fatal("renamed")
	}
}

func TestReloadWithoutChange(t *testing.T) {
	p := newPair(t)
	changed := p.server.Changed()
	for range 3 {
		if err := p.server.Reload(); err != nil {
			t.Fatal(err)
		}
	}
	if changed != p.server.Changed() || p.server.Stats().Sets[0].Loads != 1 {
		t.Fatal("a reload of the same files is no change")
	}
}

// The whole life of a CA rotation, with configurations made once and a session that lives through it.
func TestCARotation(t *testing.T) {
	p := newPair(t)
	server, client := p.server.ServerTLS(protocols), p.agent.ClientTLS("localhost", alpnAgent)
	session := shake(t, server, client)
	if session.serverErr != nil {
		t.Fatal(session.serverErr)
	}
	next := newCA(t)
	reload := func() {
		t.Helper()
		if err := errors.Join(p.server.Reload(), p.agent.Reload()); err != nil {
			t.Fatal(err)
		}
	}
	works := func() {
		t.Helper()
		if o := shake(t, server, client); o.serverErr != nil || o.clientErr != nil {
			t.Fatal(o.serverErr, o.clientErr)
		}
	}
	both := read(t, p.ca.CertFile()) + "\n# the next one\n" + read(t, next.CertFile())
	put(t, p.sFiles.CA, both)
	put(t, p.aFiles.CA, both)
	reload()
	works()
	if cas := p.server.Stats().CAs; len(cas) != 2 || cas[0].Fingerprint == cas[1].Fingerprint || cas[0].Subject == cas[1].Subject {
		t.Fatalf("got %+v", cas)
	}

	agent := must[Issued](t)(next.IssueAgent("edge-1", addrs("10.99.0.5"), false))
	copyFile(t, agent.CertFile, p.aFiles.Cert)
	copyFile(t, agent.KeyFile, p.aFiles.Key)
	reload()
	works()
	if p.agent.Self().Serial != agent.Serial {
		t.Fatal("old leaf")
	}
	must[Peer](t)(p.server.Peer(session.server)) // the old session is still fine

	// The old CA leaves before the server has a new leaf: bad order, but its removal must take effect.
	changed := p.server.Changed()
	copyFile(t, next.CertFile(), p.sFiles.CA)
	reload()
	<-changed
	_, err := p.server.Peer(session.server)
	wantReason(t, err, ReasonUnknownCA)
	if p.server.Stats().Untrusted == "" {
		t.Fatal("a leaf that the own bundle does not believe goes unnoticed")
	}
	s := must[Issued](t)(next.IssueServer("cloud-1", []string{"localhost"}))
	copyFile(t, s.CertFile, p.sFiles.Cert)
	copyFile(t, s.KeyFile, p.sFiles.Key)
	reload()
	works()
	if p.server.Stats().Untrusted != "" {
		t.Fatal(p.server.Stats().Untrusted)
	}
}

// start runs a store until the test ends.
func start(t *testing.T, s *Store) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// await waits until ok holds, checking after each change and now and then.
func await(t *testing.T, s *Store, what string, ok func() bool) {
	t.Helper()
	timeout := time.After(20 * time.Second)
	for {
		changed := s.Changed()
		if ok() {
			return
		}
		select {
		case <-changed:
		case <-time.After(10 * time.Millisecond):
		case <-timeout:
			t.Fatalf("%s: never; %+v", what, s.Stats())
		}
	}
}

// Kubernetes replaces all files of a volume by swapping one symlink.
func TestRunFollowsSymlinkSwaps(t *testing.T) {
	ca := newCA(t)
	volume := t.TempDir()
	swap := func(n int) Issued {
		i := must[Issued](t)(ca.IssueAgent("edge-1", nil, false))
		dir := filepath.Join(volume, fmt.Sprintf("..v%d", n))
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		copyFile(t, ca.CertFile(), filepath.Join(dir, "ca.crt"))
		copyFile(t, i.CertFile, filepath.Join(dir, "tls.crt"))
		copyFile(t, i.KeyFile, filepath.Join(dir, "tls.key"))
		if err := errors.Join(os.Symlink(filepath.Base(dir), filepath.Join(volume, "..tmp")),
			os.Rename(filepath.Join(volume, "..tmp"), filepath.Join(volume, "..data"))); err != nil {
			t.Fatal(err)
		}
		return i
	}
	swap(0)
	f := Files{CA: filepath.Join(volume, "ca.crt"), Cert: filepath.Join(volume, "tls.crt"), Key: filepath.Join(volume, "tls.key")}
	for _, path := range []string{f.CA, f.Cert, f.Key} {
		if err := os.Symlink(filepath.Join("..data", filepath.Base(path)), path); err != nil {
			t.Fatal(err)
		}
	}
	s := must[*Store](t)(Open(f, Options{Role: RoleAgent, Poll: time.Millisecond}))
	start(t, s)
	for n := range 15 {
		i := swap(n + 1)
		await(t, s, "new leaf", func() bool { return s.Self().Serial == i.Serial })
	}
	for _, set := range s.Stats().Sets {
		if set.Failures != 0 {
			t.Fatalf("a swap was seen half-done: %+v", set)
		}
	}
}

func TestRunOverHalfWrittenFiles(t *testing.T) {
	p := newPair(t)
	s := must[*Store](t)(Open(p.aFiles, Options{Role: RoleAgent, Poll: time.Millisecond}))
	start(t, s)
	next := must[Issued](t)(p.ca.IssueAgent("edge-1", nil, false))
	says := func(text string) func() bool {
		return func() bool { return strings.Contains(s.Stats().Sets[1].Error, text) }
	}

	crt := read(t, next.CertFile)
	put(t, p.aFiles.Cert, crt[:len(crt)/2])
	await(t, s, "half a certificate", says("half-written"))
	put(t, p.aFiles.Cert, crt)
	await(t, s, "certificate without its key", says("does not belong"))
	if err := os.Remove(p.aFiles.Key); err != nil {
		t.Fatal(err)
	}
	await(t, s, "no key", says("no such file"))
	if s.Self().Serial == next.Serial {
		t.Fatal("half a leaf in force")
	}
	copyFile(t, next.KeyFile, p.aFiles.Key)
	await(t, s, "complete", func() bool { return s.Self().Serial == next.Serial })
	if set := s.Stats().Sets[1]; set.Error != "" || set.Loads != 2 {
		t.Fatalf("got %+v", set)
	}
	// In place, same length, possibly within one tick of the file system's clock.
	put(t, p.aFiles.Deny, "edge-a\n")
	await(t, s, "edge-a", func() bool { _, ok := s.state.Load().deny.names["edge-a"]; return ok })
	put(t, p.aFiles.Deny, "edge-b\n")
	await(t, s, "edge-b", func() bool { _, ok := s.state.Load().deny.names["edge-b"]; return ok })
}

// Replacing certificate and key while they are read is no failure, replacing them for ever is one.
func TestSettle(t *testing.T) {
	p := newPair(t)
	next := must[Issued](t)(p.ca.IssueAgent("edge-1", nil, false))
	leaf := p.agent.sets[1]
	crt := read(t, next.CertFile)
	steps := []func(){
		func() { put(t, p.aFiles.Cert, crt) },
		func() { copyFile(t, next.KeyFile, p.aFiles.Key) },
		func() {},
	}
	n := 0
	leaf.pause = func() { steps[n](); n++ }
	put(t, p.aFiles.Cert, crt[:100])
	if err := p.agent.Reload(); err != nil || n != 3 || p.agent.Self().Serial != next.Serial {
		t.Fatalf("after %d pauses: %v", n, err)
	}
	leaf.pause = func() { n++; put(t, p.aFiles.Cert, fmt.Sprint(n)) }
	put(t, p.aFiles.Cert, "0")
	wantFileError(t, p.agent.Reload(), "certificate", "changes all the time")
}

// A leaf that was refused because the clock was wrong comes into force once the clock is right, without a new write.
func TestRunRetriesWhenTimeCures(t *testing.T) {
	p := newPair(t)
	p.clock.set(0)
	s := must[*Store](t)(Open(p.aFiles, Options{Role: RoleAgent, Poll: time.Millisecond, Clock: p.clock.now}))
	start(t, s)
	p.clock.set(3 * 365 * 24 * time.Hour)
	next := must[Issued](t)(p.ca.IssueAgent("edge-1", nil, false))
	copyFile(t, next.CertFile, p.aFiles.Cert)
	copyFile(t, next.KeyFile, p.aFiles.Key)
	await(t, s, "expired", func() bool { return strings.Contains(s.Stats().Sets[1].Error, "expired") })
	p.clock.set(0)
	await(t, s, "in force", func() bool { return s.Self().Serial == next.Serial })
}

func TestEverythingAtOnce(t *testing.T) {
	p := newPair(t)
	server, client := p.server.ServerTLS(protocols), p.agent.ClientTLS("localhost", alpnAgent)
	o := shake(t, server, client)
	if o.serverErr != nil {
		t.Fatal(o.serverErr)
	}
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for _, work := range []func(){
		func() { p.server.Reload() },
		func() { p.server.Stats() },
		func() { p.server.Self() },
		func() {
			if _, err := p.server.Peer(o.server); err != nil {
				var r *Refusal
				if !errors.As(err, &r) || r.Reason() != ReasonDenied {
					t.Error(err)
				}
			}
		},
		func() {
			select {
			case <-p.server.Changed():
			case <-stop:
			}
		},
	} {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					work()
				}
			}
		})
	}
	for n := range 10 {
		changed := p.server.Changed()
		put(t, p.sFiles.Deny+".new", fmt.Sprintf("edge-%d\n", n%2))
		if err := os.Rename(p.sFiles.Deny+".new", p.sFiles.Deny); err != nil {
			t.Fatal(err)
		}
		<-changed
	}
	close(stop)
	wg.Wait()
}
