// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"crypto/elliptic"
	"crypto/x509"
	"crypto/x509/pkix"
	"net"
	"slices"
	"strings"
	"testing"
	"time"
)

// keeper is where an authority is kept, with a clock of its own.
type keeper struct {
	t           *testing.T
	now         time.Time
	o           AuthorityOptions
	certs, keys []byte
}

func newKeeper(t *testing.T) *keeper {
	k := &keeper{t: t, now: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)}
	k.o.Clock = func() time.Time { return k.now }
	return k
}

// turn reads what is kept, rotates it and keeps it again.
func (k *keeper) turn() (*Authority, bool) {
	k.t.Helper()
	a := must[*Authority](k.t)(ParseAuthority(k.certs, k.keys, k.o))
	next, changed, err := a.Rotate()
	if err != nil {
		k.t.Fatal(err)
	}
	if k.certs, k.keys, err = next.Encode(); err != nil {
		k.t.Fatal(err)
	}
	return next, changed
}

func (k *keeper) sign(a *Authority, c CSR) *x509.Certificate {
	k.t.Helper()
	crt, notAfter, err := a.Sign(c, k.now, 0)
	if err != nil {
		k.t.Fatal(err)
	}
	leaf := must[[]*x509.Certificate](k.t)(parseCerts(crt))[0]
	if !leaf.NotAfter.Equal(notAfter) {
		k.t.Errorf("ends %v, said is %v", leaf.NotAfter, notAfter)
	}
	return leaf
}

func believed(t *testing.T, cas []byte, leaf *x509.Certificate, now time.Time) error {
	t.Helper()
	b := must[bundle](t)(parseBundle(cas, now))
	_, err := verifyChain([]*x509.Certificate{leaf}, b.roots, now)
	return err
}

func TestAuthority(t *testing.T) {
	k := newKeeper(t)
	a, changed := k.turn()
	if !changed || len(a.CAs()) != 1 {
		t.Fatalf("changed: %v, %v", changed, a.CAs())
	}
	if _, changed := k.turn(); changed {
		t.Error("rotates at each turn")
	}
	key := ecKey(t, elliptic.P256())
	csr := must[CSR](t)(ParseCSR(request(t, key, func(r *x509.CertificateRequest) {
		r.Subject = pkix.Name{CommonName: "cloud-1", Organization: []string{string(RoleServer)}}
		r.DNSNames, r.IPAddresses = []string{"lb.example.org"}, []net.IP{{10, 0, 0, 1}, net.ParseIP("fd00::1")}
	})))
	leaf := k.sign(a, csr)
	peer, err := describe(leaf)
	if err != nil || peer.Name != "cloud-1" || peer.Role != RoleServer || !slices.Equal(peer.Addrs, addrs("10.0.0.1", "fd00::1")) {
		t.Errorf("%+v, %v", peer, err)
	}
	if err := leaf.VerifyHostname("lb.example.org"); err != nil {
		t.Error(err)
	}
	if !key.PublicKey.Equal(leaf.PublicKey) || leaf.IsCA || len(leaf.Subject.Names) != 2 {
		t.Errorf("%+v", leaf)
	}
	if want := k.now.Add(30 * day); !leaf.NotAfter.Equal(want) || !leaf.NotBefore.Equal(k.now.Add(-time.Hour)) {
		t.Errorf("valid from %v to %v", leaf.NotBefore, leaf.NotAfter)
	}
	// Our clock may be ahead of the API server's, which the others' may be nearer to.
	crt, notAfter, err := a.Sign(csr, k.now.Add(-3*time.Hour), 10*time.Minute)
	if err != nil || !notAfter.Equal(k.now.Add(10*time.Minute)) {
		t.Errorf("%v, %v", notAfter, err)
	}
	if early := must[[]*x509.Certificate](t)(parseCerts(crt))[0]; !early.NotBefore.Equal(k.now.Add(-4 * time.Hour)) {
		t.Errorf("from %v", early.NotBefore)
	}
	if _, notAfter, _ := a.Sign(csr, k.now.Add(9*time.Hour), 1000*day); !notAfter.Equal(k.now.Add(30 * day)) {
		t.Errorf("wished for a thousand days: %v", notAfter)
	}
}

// TestAuthorityOverlap lives through ten years, day by day: everything issued is believed by who has a bundle of a week ago, and as long as
// it is valid.
func TestAuthorityOverlap(t *testing.T) {
	k := newKeeper(t)
	csr := must[CSR](t)(ParseCSR(request(t, ecKey(t, elliptic.P256()), nil)))
	type issued struct {
		leaf *x509.Certificate
		at   time.Time
	}
	var bundles [][]byte
	var live []issued
	signers, rotations := map[string]bool{}, 0
	for range 3653 {
		a, changed := k.turn()
		if changed {
			rotations++
		}
		bundles = append(bundles, a.Bundle())
		if n := len(a.CAs()); n > 2 {
			t.Fatalf("%d CAs", n)
		}
		signers[must[CAInfo](t)(a.Signer()).Fingerprint] = true
		leaf := k.sign(a, csr)
		if !leaf.NotAfter.Equal(k.now.Add(30 * day)) {
			t.Fatalf("%v: the leaf's life is cut short: %v", k.now, leaf.NotAfter)
		}
		live = append(live, issued{leaf, k.now})
		live = slices.DeleteFunc(live, func(i issued) bool { return i.leaf.NotAfter.Before(k.now) })
		for _, i := range []issued{live[0], live[len(live)-1]} {
			if err := believed(t, bundles[len(bundles)-1], i.leaf, k.now); err != nil {
				t.Fatalf("%v, issued %v: %v", k.now, i.at, err)
			}
			if old := bundles[max(0, len(bundles)-1-7)]; i.at.Equal(k.now) {
				if err := believed(t, old, i.leaf, k.now); err != nil {
					t.Fatalf("%v, with a bundle of a week ago: %v", k.now, err)
				}
			}
		}
		k.now = k.now.Add(day)
	}
	if len(signers) < 7 || rotations > 2*len(signers) {
		t.Errorf("%d signers, %d rotations", len(signers), rotations)
	}
}

// TestAuthorityUnderWrongClocks: nobody loses what they have because a clock was wrong for a while.
func TestAuthorityUnderWrongClocks(t *testing.T) {
	k := newKeeper(t)
	csr := must[CSR](t)(ParseCSR(request(t, ecKey(t, elliptic.P256()), nil)))
	a, _ := k.turn()
	start := k.now
	leaf, first := k.sign(a, csr), must[CAInfo](t)(a.Signer())
	for name, wrong := range map[string]time.Duration{"a year ahead": 365 * day, "30 years ahead": 30 * 365 * day, "in 1970": -56 * 365 * day, "an hour behind": -time.Hour} {
		k.now = start.Add(wrong)
		k.turn()
		k.now = start.Add(day)
		a, changed := k.turn()
		if err := believed(t, a.Bundle(), leaf, k.now); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if s, err := a.Signer(); err != nil || s != first || changed {
			t.Errorf("%s: signs %v, %v", name, s, err)
		}
	}
	// The CAs of the future are no successors.
	k.now = first.NotAfter.Add(-100 * day)
	k.turn()
	k.now = k.now.Add(8 * day)
	a, _ = k.turn()
	if s := must[CAInfo](t)(a.Signer()); s == first || s.NotAfter.Before(k.now.Add(600*day)) {
		t.Errorf("signs %+v", s)
	}
	k.now = time.Date(1980, 1, 1, 0, 0, 0, 0, time.UTC)
	young := newKeeper(t)
	a, _ = young.turn()
	young.now = young.now.Add(-2 * time.Hour)
	if _, _, err := a.Sign(csr, k.now, 0); err == nil || !strings.Contains(err.Error(), "clock") {
		t.Errorf("got %v", err)
	}
}

// TestAuthorityThatWasLost: what the lost one signed is believed beside its successor, for as long as it may be valid.
func TestAuthorityThatWasLost(t *testing.T) {
	k := newKeeper(t)
	csr := must[CSR](t)(ParseCSR(request(t, ecKey(t, elliptic.P256()), nil)))
	old, _ := k.turn()
	k.now = k.now.Add(day)
	leaf := k.sign(old, csr)

	empty := must[*Authority](t)(ParseAuthority(nil, []byte("\n"), k.o))
	if _, _, err := empty.Sign(csr, k.now, 0); err == nil {
		t.Error("signs without a CA")
	}
	next := must[*Authority](t)(empty.Believe(old.Bundle()))
	next, _, err := next.Rotate()
	if err != nil {
		t.Fatal(err)
	}
	if k.certs, k.keys, err = next.Encode(); err != nil {
		t.Fatal(err)
	}
	next, changed := k.turn()
	if changed || len(next.CAs()) != 2 {
		t.Fatalf("changed: %v, %v", changed, next.CAs())
	}
	for _, l := range []*x509.Certificate{leaf, k.sign(next, csr)} {
		if err := believed(t, next.Bundle(), l, k.now); err != nil {
			t.Error(err)
		}
	}
	if again := must[*Authority](t)(next.Believe(old.Bundle())); len(again.CAs()) != 2 {
		t.Errorf("believed twice: %v", again.CAs())
	}
	k.now = k.now.Add(98 * day)
	if next, _ = k.turn(); len(next.CAs()) != 1 {
		t.Errorf("the lost CA stays: %v", next.CAs())
	}
	if _, err := next.Believe([]byte("x")); err == nil {
		t.Error("believes garbage")
	}
}

func TestDamagedAuthority(t *testing.T) {
	k, other := newKeeper(t), newKeeper(t)
	k.turn()
	other.turn()
	csr := must[CSR](t)(ParseCSR(request(t, ecKey(t, elliptic.P256()), nil)))
	leaf := certPEM(k.sign(must[*Authority](t)(ParseAuthority(k.certs, k.keys, k.o)), csr).Raw)
	for name, c := range map[string]struct{ certs, keys []byte }{
		"no keys":        {k.certs, nil},
		"no certs":       {nil, k.keys},
		"half":           {k.certs[:len(k.certs)/2], k.keys},
		"half a key":     {k.certs, k.keys[:len(k.keys)/2]},
		"another's key":  {k.certs, other.keys},
		"one key more":   {k.certs, slices.Concat(k.keys, other.keys)},
		"no CA":          {leaf, k.keys},
		"cert as key":    {k.certs, k.certs},
		"key among them": {slices.Concat(k.certs, k.keys), k.keys},
	} {
		if a, err := ParseAuthority(c.certs, c.keys, k.o); err == nil {
			t.Errorf("%s: taken, %v", name, a.CAs())
		}
	}
	for _, o := range []AuthorityOptions{{Validity: day}, {Validity: -1}, {LeafValidity: time.Minute}, {LeafValidity: 91 * day}, {LeafValidity: -1}} {
		if _, err := ParseAuthority(nil, nil, o); err == nil {
			t.Errorf("%+v is taken", o)
		}
	}
}

func FuzzParseAuthority(f *testing.F) {
	first, _, err := must[*Authority](f)(ParseAuthority(nil, nil, AuthorityOptions{})).Rotate()
	if err != nil {
		f.Fatal(err)
	}
	certs, keys, err := first.Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(certs, keys)
	f.Add([]byte{}, []byte{})
	f.Add(certs, certs)
	f.Fuzz(func(t *testing.T, certs, keys []byte) {
		a, err := ParseAuthority(certs, keys, AuthorityOptions{})
		if err != nil {
			return
		}
		next, _, err := a.Rotate()
		if err != nil {
			return
		}
		if _, err := next.Signer(); err != nil {
			t.Fatalf("rotated, and yet: %v", err)
		}
		certs, keys, err = next.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if again, err := ParseAuthority(certs, keys, AuthorityOptions{}); err != nil || len(again.CAs()) != len(next.CAs()) {
			t.Fatalf("encoded cannot be parsed: %v", err)
		}
	})
}
