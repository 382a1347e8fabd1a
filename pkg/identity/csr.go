// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

const maxCSR = 64 << 10 // bytes; 64 names of 253 bytes fit

// CSR is a certificate signing request: what the holder of a key asks for. It proves that they hold the key, and nothing more.
type CSR struct {
	Name     string       // common name, see CheckName
	Role     Role         //
	DNSNames []string     // lower case, sorted, without duplicates
	Addrs    []netip.Addr // IP names: unmapped, sorted, without duplicates
	KeyID    string       // SHA-256 of the public key, lower-case hexadecimal

	key *ecdsa.PublicKey
}

var (
	oidCommonName   = asn1.ObjectIdentifier{2, 5, 4, 3}
	oidOrganization = asn1.ObjectIdentifier{2, 5, 4, 10}
	oidSAN          = asn1.ObjectIdentifier{2, 5, 29, 17}
)

// ParseCSR parses a request in PEM. What this package's certificates cannot say is a *Denial and not left out, so that nobody takes
// what they get for what they asked for.
func ParseCSR(data []byte) (CSR, error) {
	if len(data) > maxCSR {
		return CSR{}, deny(DenyBadRequest, "%d bytes, at most %d are allowed", len(data), maxCSR)
	}
	blocks, err := decodePEM(data)
	if err != nil {
		return CSR{}, deny(DenyBadRequest, "%v", err)
	}
	if len(blocks) != 1 || blocks[0].Type != "CERTIFICATE REQUEST" {
		return CSR{}, deny(DenyBadRequest, "it must be one PEM block CERTIFICATE REQUEST, found %d, the first a %.40q", len(blocks), blocks[0].Type)
	}
	req, err := x509.ParseCertificateRequest(blocks[0].Bytes)
	if err != nil {
		return CSR{}, deny(DenyBadRequest, "%v", err)
	}
	// The key's kind comes before the signature: checking that of a huge RSA key is work that a stranger could give.
	key, ok := req.PublicKey.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() {
		return CSR{}, deny(DenyBadKey, "its key is not ECDSA P-256")
	}
	if err := req.CheckSignature(); err != nil {
		return CSR{}, deny(DenyBadRequest, "its signature is not by its key")
	}
	sum := sha256.Sum256(req.RawSubjectPublicKeyInfo)
	c := CSR{KeyID: hex.EncodeToString(sum[:]), key: key}
	if err := c.readSubject(req); err != nil {
		return CSR{}, err
	}
	return c, c.readExtensions(req)
}

func (c *CSR) readSubject(req *x509.CertificateRequest) error {
	var names, organizations []string
	for _, attr := range req.Subject.Names {
		text, ok := attr.Value.(string)
		switch {
		case ok && attr.Type.Equal(oidCommonName):
			names = append(names, text)
		case ok && attr.Type.Equal(oidOrganization):
			organizations = append(organizations, text)
		default:
			return deny(DenyWrongSubject, "its subject has the attribute %s beside CN and O", attr.Type)
		}
	}
	if len(names) != 1 || len(organizations) != 1 {
		return deny(DenyWrongSubject, "its subject has %d common names and %d organizations, not one of each", len(names), len(organizations))
	}
	if c.Role = Role(organizations[0]); c.Role != RoleAgent && c.Role != RoleServer {
		return deny(DenyWrongSubject, "its organization is %q", organizations[0])
	}
	if err := CheckName(names[0]); err != nil {
		return deny(DenyWrongSubject, "its common name: %v", err)
	}
	c.Name = names[0]
	return nil
}

func (c *CSR) readExtensions(req *x509.CertificateRequest) error {
	for i, ext := range req.Extensions {
		switch {
		case !ext.Id.Equal(oidSAN):
			return deny(DenyExtraNames, "it asks for the extension %s", ext.Id)
		case i > 0:
			return deny(DenyBadRequest, "it has two lists of names")
		}
		if err := onlyHosts(ext.Value); err != nil {
			return err
		}
	}
	if n := len(req.DNSNames) + len(req.IPAddresses); n > maxHosts {
		return deny(DenyExtraNames, "it has %d names, at most %d are allowed", n, maxHosts)
	}
	for _, name := range req.DNSNames {
		h, err := parseHost(name)
		if err != nil || h.dns == "" {
			return deny(DenyExtraNames, "%q is not a DNS name", name)
		}
		c.DNSNames = append(c.DNSNames, h.dns)
	}
	for _, ip := range req.IPAddresses {
		a, ok := netip.AddrFromSlice(ip)
		if !ok {
			return deny(DenyBadRequest, "it has an address of %d bytes", len(ip))
		}
		c.Addrs = append(c.Addrs, a.Unmap())
	}
	slices.Sort(c.DNSNames)
	c.DNSNames = slices.Compact(c.DNSNames)
	slices.SortFunc(c.Addrs, netip.Addr.Compare)
	c.Addrs = slices.Compact(c.Addrs)
	return nil
}

// onlyHosts refuses kinds of names (mail addresses, URIs, directory names, ...) that x509 in part leaves out silently.
func onlyHosts(san []byte) error {
	const dns, ip = 2, 7
	var names []asn1.RawValue
	if rest, err := asn1.Unmarshal(san, &names); err != nil || len(rest) > 0 {
		return deny(DenyBadRequest, "its list of names cannot be read")
	}
	for _, n := range names {
		if n.Class != asn1.ClassContextSpecific || n.Tag != dns && n.Tag != ip {
			return deny(DenyExtraNames, "it has a name that is neither a DNS name nor an IP address (kind %d)", n.Tag)
		}
	}
	return nil
}

// host is a DNS name or an address.
type host struct {
	dns  string
	addr netip.Addr
}

// parseHost takes what a server can be dialed at, without scheme and port.
func parseHost(text string) (host, error) {
	if a, err := netip.ParseAddr(strings.Trim(text, "[]")); err == nil {
		if a.Zone() != "" {
			return host{}, fmt.Errorf("%q has a zone, which cannot be in a certificate", text)
		}
		return host{addr: a.Unmap()}, nil
	}
	dns := strings.ToLower(strings.TrimSuffix(text, "."))
	last := dns[strings.LastIndexByte(dns, '.')+1:]
	// A name that ends in a number is a mistyped address.
	if err := CheckName(dns); err != nil || strings.Trim(last, "0123456789") == "" {
		return host{}, fmt.Errorf("%q is neither an IP address nor a DNS name", text)
	}
	return host{dns: dns}, nil
}
