// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"
)

const (
	day = 24 * time.Hour

	// authorityOverlap is how long a CA is in everybody's bundle before it signs.
	authorityOverlap = 7 * day
	// maxLeafValidity bounds what an authority issues, and with it how long the bundle has to keep a CA that no longer signs.
	maxLeafValidity = 90 * day
	minLeafValidity = time.Hour
	minAuthority    = 365 * day
)

// AuthorityOptions are the lifetimes of what an Authority makes. Zero values are replaced by defaults.
type AuthorityOptions struct {
	Validity     time.Duration    // of a CA's own certificate; default 2 years, at least one
	LeafValidity time.Duration    // of issued certificates; default 30 days, between an hour and 90 days
	Clock        func() time.Time // default time.Now
}

// Validate names all that is out of bounds.
func (o AuthorityOptions) Validate() error {
	var errs []error
	if o.Validity != 0 && o.Validity < minAuthority {
		errs = append(errs, fmt.Errorf("a CA's validity of %v is less than %v", o.Validity, minAuthority))
	}
	if o.LeafValidity != 0 && (o.LeafValidity < minLeafValidity || o.LeafValidity > maxLeafValidity) {
		errs = append(errs, fmt.Errorf("a certificate's validity of %v is not between %v and %v", o.LeafValidity, minLeafValidity, maxLeafValidity))
	}
	return errors.Join(errs...)
}

func (o AuthorityOptions) withDefaults() AuthorityOptions {
	if o.Validity == 0 {
		o.Validity = 730 * day
	}
	if o.LeafValidity == 0 {
		o.LeafValidity = 30 * day
	}
	if o.Clock == nil {
		o.Clock = time.Now
	}
	return o
}

// Authority is a CA that is replaced before it ends, without files: the caller keeps what Encode gives, at one place for all who sign.
// It is a succession of CAs. A new one is made when a third of the youngest one's life is left; it is believed at once and signs a week
// later, and an old one leaves the bundle when nothing that it signed can be valid: 97 days after its successor was made. That holds
// also for one that has ended, so that a clock that is wrong for a while makes a CA too many, but never takes one away. An Authority is
// never changed and may be used by several goroutines.
type Authority struct {
	cas []caEntry // oldest first
	o   AuthorityOptions
}

type caEntry struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey // nil: believed, but does not sign
}

func (e caEntry) made() time.Time { return e.cert.NotBefore.Add(backdate) }

func (e caEntry) valid(now time.Time) bool {
	return !now.Before(e.cert.NotBefore) && now.Before(e.cert.NotAfter)
}

// ParseAuthority reads what Encode gave. Nothing at all is an authority without CAs, which Rotate gives its first. Anything else that is
// not whole is an error: to begin anew then would end all tunnels.
func ParseAuthority(certs, keys []byte, o AuthorityOptions) (*Authority, error) {
	if err := o.Validate(); err != nil {
		return nil, err
	}
	a := &Authority{o: o.withDefaults()}
	if len(bytes.TrimSpace(certs))+len(bytes.TrimSpace(keys)) == 0 {
		return a, nil
	}
	parsed, err := parseCAs(certs)
	if err != nil {
		return nil, fmt.Errorf("CA certificates: %w", err)
	}
	for _, c := range parsed {
		a.cas = append(a.cas, caEntry{cert: c})
	}
	blocks, err := decodePEM(keys)
	if err != nil {
		return nil, fmt.Errorf("CA keys: %w", err)
	}
	for i, b := range blocks {
		key, err := parseKey(pem.EncodeToMemory(b))
		if err != nil {
			return nil, fmt.Errorf("CA key %d: %w", i+1, err)
		}
		at := slices.IndexFunc(a.cas, func(e caEntry) bool { return key.PublicKey.Equal(e.cert.PublicKey) })
		if at < 0 {
			return nil, fmt.Errorf("CA key %d belongs to none of the certificates", i+1)
		}
		a.cas[at].key = key
	}
	a.sort()
	return a, nil
}

func (a *Authority) sort() {
	slices.SortStableFunc(a.cas, func(x, y caEntry) int { return x.cert.NotBefore.Compare(y.cert.NotBefore) })
	a.cas = slices.CompactFunc(a.cas, func(x, y caEntry) bool { return x.cert.Equal(y.cert) })
}

// Believe also believes the CAs of a bundle, for as long as it would its own: for an authority that was lost while what it signed lives on.
func (a *Authority) Believe(bundle []byte) (*Authority, error) {
	parsed, err := parseCAs(bundle)
	if err != nil {
		return nil, fmt.Errorf("CA certificates: %w", err)
	}
	next := &Authority{cas: slices.Clone(a.cas), o: a.o}
	for _, c := range parsed {
		next.cas = append(next.cas, caEntry{cert: c})
	}
	next.sort()
	return next, nil
}

// Rotate returns what the authority is to be by now, and whether that differs from what it is. The caller keeps the new one before
// anybody believes it or it signs anything.
func (a *Authority) Rotate() (*Authority, bool, error) {
	now := a.o.Clock()
	next := &Authority{o: a.o}
	for i, e := range a.cas {
		// Of the others only one that can sign is a successor.
		superseded := slices.ContainsFunc(a.cas[i+1:], func(s caEntry) bool {
			return s.key != nil && !now.Before(s.made().Add(authorityOverlap+maxLeafValidity))
		})
		if !superseded {
			next.cas = append(next.cas, e)
		}
	}
	changed := len(next.cas) != len(a.cas)
	if !slices.ContainsFunc(next.cas, func(e caEntry) bool { return e.key != nil && e.valid(now) && !ending(e.cert, now) }) {
		if len(next.cas) == maxBundle {
			return nil, false, fmt.Errorf("the bundle has %d CAs, which is as many as there may be", maxBundle)
		}
		cert, key, _, err := newAuthority(now, a.o.Validity)
		if err != nil {
			return nil, false, err
		}
		next.cas, changed = append(next.cas, caEntry{cert: cert, key: key}), true
		next.sort()
	}
	return next, changed, nil
}

// ending says whether c needs a successor: a third of its life is left, or less.
func ending(c *x509.Certificate, now time.Time) bool {
	return c.NotAfter.Sub(now) <= c.NotAfter.Sub(c.NotBefore)/3
}

// Encode is the authority to be kept: certificates and keys, in PEM.
func (a *Authority) Encode() (certs, keys []byte, err error) {
	for _, e := range a.cas {
		if e.key == nil {
			continue
		}
		der, err := x509.MarshalPKCS8PrivateKey(e.key)
		if err != nil {
			return nil, nil, fmt.Errorf("encode CA key: %w", err)
		}
		keys = append(keys, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})...)
	}
	return a.Bundle(), keys, nil
}

// Bundle is what agents and servers have to believe, in PEM.
func (a *Authority) Bundle() []byte {
	var bundle []byte
	for _, e := range a.cas {
		bundle = append(bundle, certPEM(e.cert.Raw)...)
	}
	return bundle
}

// CAs describes the bundle.
func (a *Authority) CAs() []CAInfo {
	var infos []CAInfo
	for _, e := range a.cas {
		infos = append(infos, infoOf(e.cert))
	}
	return infos
}

// signer is the youngest CA that has been in the bundles for the time of the overlap, or else the oldest: then nobody has anything better.
func (a *Authority) signer(now time.Time) (caEntry, error) {
	var can []caEntry
	for _, e := range a.cas {
		if e.key != nil && e.valid(now) {
			can = append(can, e)
		}
	}
	if len(can) == 0 {
		return caEntry{}, errors.New("no CA is valid now: is this machine's clock wrong?")
	}
	for _, e := range slices.Backward(can) {
		if !now.Before(e.made().Add(authorityOverlap)) {
			return e, nil
		}
	}
	return can[0], nil
}

// Signer describes the CA that signs now.
func (a *Authority) Signer() (CAInfo, error) {
	e, err := a.signer(a.o.Clock())
	if err != nil {
		return CAInfo{}, err
	}
	return infoOf(e.cert), nil
}

// Sign issues what a request asks for, which the caller has checked. The certificate ends after the time that is wished, if that is
// positive and shorter than it would be valid otherwise. Its beginning is an hour before made, when the request was made by the API
// server's clock, if ours is ahead of that.
func (a *Authority) Sign(c CSR, made time.Time, wish time.Duration) (certPEMs []byte, notAfter time.Time, err error) {
	now := a.o.Clock()
	ca, err := a.signer(now)
	if err != nil {
		return nil, time.Time{}, err
	}
	validity := a.o.LeafValidity
	if wish > 0 {
		validity = min(validity, wish)
	}
	notAfter = now.Add(validity)
	if notAfter.After(ca.cert.NotAfter) {
		notAfter = ca.cert.NotAfter
	}
	notBefore := now
	if !made.IsZero() && made.Before(now) {
		notBefore = made
	}
	serial, err := newSerial()
	if err != nil {
		return nil, time.Time{}, err
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial, NotBefore: notBefore.Add(-backdate), NotAfter: notAfter.UTC().Truncate(time.Second), DNSNames: c.DNSNames,
	}
	for _, addr := range c.Addrs {
		tmpl.IPAddresses = append(tmpl.IPAddresses, net.IP(addr.AsSlice()))
	}
	der, err := signLeaf(tmpl, c.Name, c.Role, c.key, ca.cert, ca.key)
	if err != nil {
		return nil, time.Time{}, err
	}
	return certPEM(der), tmpl.NotAfter, nil
}
