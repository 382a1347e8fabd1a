// SPDX-License-Identifier: Apache-2.0

package kubebed

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// authority is one of a cluster's CAs.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

func newAuthority(name string) (*authority, error) {
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, IsCA: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	a := &authority{}
	certPEM, _, err := a.sign(template)
	a.pem = certPEM
	return a, err
}

// issue makes a certificate for a client (names empty) or for a server and client; it returns the certificate and the key in PEM.
func (a *authority) issue(user string, groups, names []string, addrs []net.IP) (certPEM, keyPEM []byte, err error) {
	return a.sign(&x509.Certificate{
		Subject:  pkix.Name{CommonName: user, Organization: groups},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		DNSNames: names, IPAddresses: addrs,
	})
}

// sign fills in the rest. An authority without a certificate gets this one as its own.
func (a *authority) sign(template *x509.Certificate) (certPEM, keyPEM []byte, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, nil, err
	}
	template.SerialNumber = serial
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().AddDate(1, 0, 0)
	template.BasicConstraintsValid = true
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		return nil, nil, err
	}
	if a.cert == nil {
		if a.cert, err = x509.ParseCertificate(der); err != nil {
			return nil, nil, err
		}
		a.key = key
	}
	keyPEM, err = encodeKey(key)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), keyPEM, err
}

func encodeKey(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalECPrivateKey(key)
	return pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), err
}

// pki is a folder with what the control plane's programs read. Whoever comes later (users, kubelets) is issued from memory.
type pki struct {
	dir       string
	ca, front *authority // of the cluster, and of the aggregation layer
}

// newPKI makes the folder; addrs are the API server's.
func newPKI(dir string, addrs ...net.IP) (*pki, error) {
	p := &pki{dir: dir}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	var err error
	if p.ca, err = newAuthority("kubernetes-ca"); err != nil {
		return nil, err
	}
	if p.front, err = newAuthority("front-proxy-ca"); err != nil {
		return nil, err
	}
	accounts, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	accountsKey, err := encodeKey(accounts)
	if err != nil {
		return nil, err
	}
	caKey, err := encodeKey(p.ca.key)
	if err != nil {
		return nil, err
	}
	addrs = append(addrs, net.IPv4(127, 0, 0, 1), net.IPv4(10, 96, 0, 1))
	return p, errors.Join(
		p.write("ca.crt", p.ca.pem), p.write("ca.key", caKey),
		p.write("front-proxy-ca.crt", p.front.pem),
		p.write("accounts.key", accountsKey), // the public half is read from the same file
		p.issue(p.ca, "apiserver", "kube-apiserver", nil,
			[]string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"}, addrs),
		p.issue(p.ca, "apiserver-kubelet-client", "kube-apiserver-kubelet-client", []string{"system:masters"}, nil, nil),
		p.issue(p.front, "front-proxy-client", "front-proxy-client", nil, nil, nil),
	)
}

func (p *pki) path(file string) string { return filepath.Join(p.dir, file) }

func (p *pki) write(file string, content []byte) error {
	return os.WriteFile(p.path(file), content, 0o600)
}

// issue writes FILE.crt and FILE.key.
func (p *pki) issue(by *authority, file, user string, groups, names []string, addrs []net.IP) error {
	certPEM, keyPEM, err := by.issue(user, groups, names, addrs)
	if err != nil {
		return err
	}
	return errors.Join(p.write(file+".crt", certPEM), p.write(file+".key", keyPEM))
}
