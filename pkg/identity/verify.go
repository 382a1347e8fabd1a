// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"
)

// Role is what a certificate's organization says its holder is.
type Role string

const (
	RoleAgent  Role = "edge-tunnel:agents"
	RoleServer Role = "edge-tunnel:servers"
)

// usages are the extended key usages that a certificate of the role must have, all of them. Asking servers for both at
// once finds a certificate that cannot be used for the hop between servers when it is loaded, not when the first hop fails.
func (r Role) usages() []x509.ExtKeyUsage {
	if r == RoleServer {
		return []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	}
	return []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
}

const (
	maxChain = 8  // certificates a peer may show: the leaf and seven intermediates
	maxAddrs = 64 // IP names in a certificate
)

// Peer is a verified certificate's holder.
type Peer struct {
	Name        string       // common name, see CheckName
	Role        Role         //
	Addrs       []netip.Addr // IP names: unmapped, sorted, without duplicates, at most 64; not checked to be sensible
	Serial      string       // lower-case hexadecimal without leading zeros
	Fingerprint string       // SHA-256 of the certificate, lower-case hexadecimal
	NotAfter    time.Time    // the earliest end in the chain, the CA's included: a session must not live longer
}

// Peer judges the other end of a connection made with a configuration of this Store by the present CA bundle, deny file
// and time, and returns a *Refusal if it is not, or no longer, to be believed. What cannot change while a connection lives (the
// role that the protocol asks for, the host that was dialed) was checked in the handshake and is not checked again.
func (s *Store) Peer(cs tls.ConnectionState) (Peer, error) {
	return s.state.Load().verify(cs.PeerCertificates, s.now())
}

// verify is the one place where certificates are judged.
func (st *state) verify(certs []*x509.Certificate, now time.Time) (Peer, error) {
	if len(certs) == 0 {
		return Peer{}, &Refusal{reason: ReasonNoCertificate, detail: "a client or server certificate is required"}
	}
	leaf := certs[0]
	if len(certs) > maxChain {
		return Peer{}, refuse(leaf, ReasonBadCertificate, "%d certificates shown, at most %d are allowed", len(certs), maxChain)
	}
	// The chain comes first, so that a stranger's certificate counts as unknown_ca whatever else is odd about it.
	notAfter, err := verifyChain(certs, st.roots, now)
	if err != nil {
		return Peer{}, err
	}
	p, err := describe(leaf)
	if err != nil {
		return Peer{}, err
	}
	p.NotAfter = notAfter
	if entry, denied := st.deny.match(p); denied {
		return Peer{}, refuse(leaf, ReasonDenied, "the deny file has %q", entry)
	}
	return p, nil
}

// verifyChain returns the time at which the last valid chain to roots ends.
func verifyChain(certs []*x509.Certificate, roots *x509.CertPool, now time.Time) (time.Time, error) {
	leaf := certs[0]
	opts := x509.VerifyOptions{Roots: roots, Intermediates: x509.NewCertPool(), CurrentTime: now}
	for _, c := range certs[1:] {
		opts.Intermediates.AddCert(c)
	}
	// KeyUsages are alternatives to x509, but a role needs all of its usages all the way up the chain: ask for each.
	usages := []x509.ExtKeyUsage{x509.ExtKeyUsageAny}
	if role, err := roleOf(leaf); err == nil {
		usages = role.usages()
	}
	var end time.Time
	for _, usage := range usages {
		opts.KeyUsages = []x509.ExtKeyUsage{usage}
		chains, err := leaf.Verify(opts)
		if err != nil {
			return time.Time{}, chainRefusal(leaf, opts, err)
		}
		if e := lastEnd(chains); end.IsZero() || e.Before(end) {
			end = e
		}
	}
	return end, nil
}

// lastEnd is the latest, over all chains, of the earliest NotAfter in a chain: one valid chain is enough.
func lastEnd(chains [][]*x509.Certificate) time.Time {
	var last time.Time
	for _, chain := range chains {
		end := chain[0].NotAfter
		for _, c := range chain[1:] {
			if c.NotAfter.Before(end) {
				end = c.NotAfter
			}
		}
		if end.After(last) {
			last = end
		}
	}
	return last
}

func chainRefusal(leaf *x509.Certificate, opts x509.VerifyOptions, err error) error {
	var invalid x509.CertificateInvalidError
	var unknown x509.UnknownAuthorityError
	switch {
	case errors.As(err, &unknown):
		return refuse(leaf, ReasonUnknownCA, "issued by %.100q, which is not in the CA bundle", leaf.Issuer.String())
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		// x509 looks at the leaf's dates before it looks for a chain. A stranger's old certificate is not "expired" in the
		// sense that somebody forgot to renew it, so look for the chain at a time when the leaf was valid.
		now := opts.CurrentTime
		if invalid.Cert == leaf {
			opts.CurrentTime = clamp(now, leaf)
			if _, err := leaf.Verify(opts); errors.As(err, &unknown) {
				return chainRefusal(leaf, opts, err)
			}
		}
		what := "it"
		if invalid.Cert != leaf {
			what = fmt.Sprintf("CA %.100q", invalid.Cert.Subject.String())
		}
		if now.Before(invalid.Cert.NotBefore) {
			return refuse(leaf, ReasonNotYetValid, "%s is valid from %s", what, stamp(invalid.Cert.NotBefore))
		}
		return refuse(leaf, ReasonExpired, "%s ended %s", what, stamp(invalid.Cert.NotAfter))
	case errors.As(err, &invalid) && invalid.Reason == x509.IncompatibleUsage:
		return refuse(leaf, ReasonBadUsage, "its chain does not allow the extended key usages that its role needs")
	}
	return refuse(leaf, ReasonBadCertificate, "%v", err)
}

// clamp returns the time closest to t at which c is valid.
func clamp(t time.Time, c *x509.Certificate) time.Time {
	if t.Before(c.NotBefore) {
		return c.NotBefore
	}
	if t.After(c.NotAfter) {
		return c.NotAfter
	}
	return t
}

// describe reads a leaf: everything about it that depends on neither time nor trust. NotAfter is the leaf's own.
func describe(leaf *x509.Certificate) (Peer, error) {
	role, err := roleOf(leaf)
	if err != nil {
		return Peer{}, err
	}
	if key, ok := leaf.PublicKey.(*ecdsa.PublicKey); !ok || key.Curve != elliptic.P256() {
		return Peer{}, refuse(leaf, ReasonBadCertificate, "its key is not ECDSA P-256")
	}
	if err := checkUsage(leaf, role); err != nil {
		return Peer{}, err
	}
	name, err := nameOf(leaf)
	if err != nil {
		return Peer{}, err
	}
	addrs, err := addrsOf(leaf)
	if err != nil {
		return Peer{}, err
	}
	return Peer{
		Name: name, Role: role, Addrs: addrs,
		Serial: serialText(leaf), Fingerprint: fingerprint(leaf), NotAfter: leaf.NotAfter,
	}, nil
}

// roleOf wants exactly one of our organizations. Others beside it mean nothing here and are ignored.
func roleOf(leaf *x509.Certificate) (Role, error) {
	var roles []Role
	for _, o := range leaf.Subject.Organization {
		if r := Role(o); r == RoleAgent || r == RoleServer {
			roles = append(roles, r)
		}
	}
	if len(roles) != 1 {
		return "", refuse(leaf, ReasonWrongRole, "its organization must be one of %q and %q, found %d of them", RoleAgent, RoleServer, len(roles))
	}
	return roles[0], nil
}

// checkUsage wants usages to be named: x509.Verify takes a leaf without any for one that may be used for everything.
func checkUsage(leaf *x509.Certificate, role Role) error {
	if leaf.IsCA {
		return refuse(leaf, ReasonBadUsage, "it is a CA")
	}
	if leaf.KeyUsage != 0 && leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		return refuse(leaf, ReasonBadUsage, "its key usage lacks digitalSignature")
	}
	for _, usage := range role.usages() {
		if !slices.Contains(leaf.ExtKeyUsage, usage) {
			name := "clientAuth"
			if usage == x509.ExtKeyUsageServerAuth {
				name = "serverAuth"
			}
			return refuse(leaf, ReasonBadUsage, "its extended key usage lacks %s", name)
		}
	}
	return nil
}

func nameOf(leaf *x509.Certificate) (string, error) {
	names := 0
	for _, attr := range leaf.Subject.Names {
		if attr.Type.Equal(oidCommonName) {
			names++
		}
	}
	if names != 1 {
		// Of several, x509 shows the last one; other software may show the first.
		return "", refuse(leaf, ReasonBadName, "it has %d common names, not one", names)
	}
	if err := CheckName(leaf.Subject.CommonName); err != nil {
		return "", refuse(leaf, ReasonBadName, "%.300v", err)
	}
	return leaf.Subject.CommonName, nil
}

func addrsOf(leaf *x509.Certificate) ([]netip.Addr, error) {
	if n := len(leaf.IPAddresses); n > maxAddrs {
		return nil, refuse(leaf, ReasonBadCertificate, "it has %d addresses, at most %d are allowed", n, maxAddrs)
	}
	var addrs []netip.Addr
	for _, ip := range leaf.IPAddresses {
		a, ok := netip.AddrFromSlice(ip)
		if !ok {
			return nil, refuse(leaf, ReasonBadCertificate, "it has an address of %d bytes", len(ip))
		}
		addrs = append(addrs, a.Unmap())
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	return slices.Compact(addrs), nil
}

func refuse(leaf *x509.Certificate, reason, format string, args ...any) *Refusal {
	name := leaf.Subject.CommonName
	if len(name) > maxName {
		name = name[:maxName]
	}
	return &Refusal{Name: name, Serial: serialText(leaf), reason: reason, detail: fmt.Sprintf(format, args...)}
}

func serialText(c *x509.Certificate) string { return c.SerialNumber.Text(16) }

func fingerprint(c *x509.Certificate) string {
	sum := sha256.Sum256(c.Raw)
	return hex.EncodeToString(sum[:])
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
