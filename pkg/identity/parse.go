// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"time"
)

const maxBundle = 256 // certificates in a CA bundle

// CAInfo describes one certificate of the CA bundle.
type CAInfo struct {
	Subject             string // RFC 2253 text, at most 100 bytes
	Fingerprint         string // SHA-256, lower-case hexadecimal
	NotBefore, NotAfter time.Time
}

// bundle is a parsed CA file.
type bundle struct {
	roots *x509.CertPool
	infos []CAInfo
}

const pemBegin = "-----BEGIN "

// decodePEM returns all blocks. pem.Decode skips what it cannot read; here that is an error, because half a bundle would
// silently end the sessions that depend on its other half.
func decodePEM(data []byte) ([]*pem.Block, error) {
	begun := bytes.Count(data, []byte("\n"+pemBegin))
	if bytes.HasPrefix(data, []byte(pemBegin)) {
		begun++
	}
	var blocks []*pem.Block
	for rest := data; ; {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			break
		}
		blocks = append(blocks, b)
	}
	switch {
	case len(blocks) == 0 && begun == 0:
		return nil, errors.New("no PEM block")
	case len(blocks) != begun:
		return nil, fmt.Errorf("%d PEM blocks begin, %d can be read: damaged or half-written", begun, len(blocks))
	}
	return blocks, nil
}

// parseBundle parses a CA bundle. One that has ended is no error while another has not: it is common to find an old CA beside its
// successor, and it is never believed.
func parseBundle(data []byte, now time.Time) (bundle, error) {
	certs, err := parseCAs(data)
	if err != nil {
		return bundle{}, err
	}
	b := bundle{roots: x509.NewCertPool()}
	live := false
	for _, c := range certs {
		b.roots.AddCert(c)
		b.infos = append(b.infos, infoOf(c))
		live = live || !now.After(c.NotAfter)
	}
	if !live {
		return bundle{}, errors.New("every CA in it has expired")
	}
	return b, nil
}

// parseCAs parses CA certificates and nothing else.
func parseCAs(data []byte) ([]*x509.Certificate, error) {
	blocks, err := decodePEM(data)
	if err != nil {
		return nil, err
	}
	if len(blocks) > maxBundle {
		return nil, fmt.Errorf("%d certificates, at most %d are allowed", len(blocks), maxBundle)
	}
	var certs []*x509.Certificate
	for i, block := range blocks {
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("block %d is a %.40q, not a certificate", i+1, block.Type)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", i+1, err)
		}
		if !c.BasicConstraintsValid || !c.IsCA || c.KeyUsage != 0 && c.KeyUsage&x509.KeyUsageCertSign == 0 {
			return nil, fmt.Errorf("certificate %d (%.100q) is not a CA's", i+1, c.Subject.String())
		}
		certs = append(certs, c)
	}
	return certs, nil
}

func infoOf(c *x509.Certificate) CAInfo {
	return CAInfo{
		Subject: fmt.Sprintf("%.100s", c.Subject.String()), Fingerprint: fingerprint(c), NotBefore: c.NotBefore, NotAfter: c.NotAfter,
	}
}

// parseCerts parses a leaf and its intermediates. Other blocks are skipped: some tools write the key into the same file.
func parseCerts(data []byte) ([]*x509.Certificate, error) {
	blocks, err := decodePEM(data)
	if err != nil {
		return nil, err
	}
	var certs []*x509.Certificate
	for _, block := range blocks {
		if block.Type != "CERTIFICATE" {
			continue
		}
		if len(certs) == maxChain {
			return nil, fmt.Errorf("more than %d certificates", maxChain)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(certs)+1, err)
		}
		certs = append(certs, c)
	}
	if len(certs) == 0 {
		return nil, errors.New("no certificate in it")
	}
	return certs, nil
}

// parseKey parses the first private key: PKCS #8 or SEC 1, not encrypted.
func parseKey(data []byte) (*ecdsa.PrivateKey, error) {
	blocks, err := decodePEM(data)
	if err != nil {
		return nil, err
	}
	for _, block := range blocks {
		var key crypto.PrivateKey
		switch {
		case block.Type == "PRIVATE KEY":
			key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
		case block.Type == "EC PRIVATE KEY" && block.Headers["DEK-Info"] == "":
			key, err = x509.ParseECPrivateKey(block.Bytes)
		case strings.HasSuffix(block.Type, "PRIVATE KEY"):
			return nil, fmt.Errorf("is a %.40q; an unencrypted ECDSA P-256 key is needed", block.Type)
		default:
			continue
		}
		if err != nil {
			return nil, err
		}
		if ec, ok := key.(*ecdsa.PrivateKey); ok {
			return ec, nil
		}
		return nil, errors.New("is not an ECDSA key")
	}
	return nil, errors.New("no private key in it")
}

// leafSet is what this process presents.
type leafSet struct {
	leaf  *tls.Certificate
	chain []*x509.Certificate // the same, parsed
	self  Peer
}

// parseLeaf parses certificate and key and checks that they fit each other, the role and the time. A certificate that
// is not valid yet is accepted: edge nodes without a battery boot in 1970, and an exit would not set their clock.
func parseLeaf(cert, key source, certPEM, keyPEM []byte, role Role, now time.Time) (leafSet, error) {
	certs, err := parseCerts(certPEM)
	if err != nil {
		return leafSet{}, cert.fail(err, "expected is a PEM file: the certificate first, then intermediates if there are any")
	}
	priv, err := parseKey(keyPEM)
	if err != nil {
		return leafSet{}, key.fail(err, "expected is a PEM file with an ECDSA P-256 key, as tunnelctl pki writes it")
	}
	leaf := certs[0]
	self, err := describe(leaf)
	if err != nil {
		return leafSet{}, cert.fail(err, "issue a new one: tunnelctl pki issue-agent or issue-server")
	}
	switch {
	case !priv.PublicKey.Equal(leaf.PublicKey):
		return leafSet{}, key.fail(fmt.Errorf("does not belong to certificate %s", cert.path),
			"certificate and key must come from the same issue; check both paths")
	case self.Role != role:
		return leafSet{}, cert.fail(fmt.Errorf("is for the role %q, %q is needed", self.Role, role),
			"agents use certificates of tunnelctl pki issue-agent, servers those of issue-server")
	case now.After(leaf.NotAfter):
		return leafSet{}, cert.fail(fmt.Errorf("expired %s", stamp(leaf.NotAfter)),
			"issue a new one: tunnelctl pki issue-agent or issue-server; or is this machine's clock wrong?")
	}
	c := &tls.Certificate{PrivateKey: priv, Leaf: leaf}
	for _, x := range certs {
		c.Certificate = append(c.Certificate, x.Raw)
	}
	return leafSet{leaf: c, chain: certs, self: self}, nil
}
