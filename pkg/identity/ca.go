// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"
)

const (
	caName    = "ca" // no node or server may be called so: its files would replace the CA's
	indexFile = "index"

	// Certificates begin a little in the past, for machines whose clocks are behind the CA's.
	backdate = time.Hour

	maxHosts = 64 // names and addresses of a server
	// NAME.crt must be a file name.
	maxIssuedName = 255 - len(".crt")
)

// CAOptions are the lifetimes of what the small CA makes. Zero values are replaced by defaults.
type CAOptions struct {
	Validity     time.Duration    // of the CA's own certificate; default 10 years
	LeafValidity time.Duration    // of issued certificates; default 1 year, but never longer than the CA's
	Clock        func() time.Time // default time.Now
}

func (o CAOptions) withDefaults() CAOptions {
	if o.Validity <= 0 {
		o.Validity = 3653 * day
	}
	if o.LeafValidity <= 0 {
		o.LeafValidity = 365 * day
	}
	if o.Clock == nil {
		o.Clock = time.Now
	}
	return o
}

// CA is a small certificate authority in a directory: ca.crt, ca.key, an index of what it issued, and the issued NAME.crt and
// NAME.key. Several processes may issue from one directory at the same time. There is nothing to close.
type CA struct {
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	o    CAOptions
}

// Issued tells what was issued, and where it is.
type Issued struct {
	Name              string
	Role              Role
	Serial            string // as in Peer
	NotAfter          time.Time
	CertFile, KeyFile string
	Moved             []Moved // addresses taken from other nodes: deny those certificates, they still claim them
}

// Moved is an address that another node's certificate has.
type Moved struct {
	Addr   netip.Addr
	Node   string
	Serial string
}

// InitCA makes a CA in dir, which is made with mode 0700 if it does not exist. It never replaces one.
func InitCA(dir string, o CAOptions) (*CA, error) {
	o = o.withDefaults()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, &FileError{What: "CA folder", Path: dir, Err: withoutPath(err)}
	}
	f, err := lockFolder(dir)
	if err != nil {
		return nil, err
	}
	defer f.unlock()
	for _, name := range []string{caName + ".crt", caName + ".key", indexFile} {
		if _, err := os.Lstat(filepath.Join(dir, name)); !errors.Is(err, fs.ErrNotExist) {
			return nil, &FileError{What: "CA folder", Path: dir, Err: fmt.Errorf("%s exists already: %w", name, fs.ErrExist),
				hint: "use another folder; if an earlier init was interrupted (there is no ca.crt), remove ca.key and index first"}
		}
	}
	ca := &CA{dir: dir, o: o}
	if err := ca.create(f); err != nil {
		return nil, err
	}
	return ca, nil
}

// create writes the certificate last: with it the CA is complete.
func (ca *CA) create(f *folder) error {
	cert, key, keyPEM, err := newAuthority(ca.o.Clock(), ca.o.Validity)
	if err != nil {
		return err
	}
	ca.cert, ca.key = cert, key
	return errors.Join(
		f.write(indexFile, 0o600, index(nil).format()),
		f.write(caName+".key", 0o600, keyPEM),
		f.write(caName+".crt", 0o644, certPEM(cert.Raw)),
	)
}

// OpenCA opens the CA that InitCA made in dir. ca.crt may be a bundle: the certificate that belongs to ca.key is used.
func OpenCA(dir string, o CAOptions) (*CA, error) {
	ca := &CA{dir: dir, o: o.withDefaults()}
	crt := source{what: "CA certificate", path: filepath.Join(dir, caName+".crt"), limit: maxPEMFile}
	key := source{what: "CA key", path: filepath.Join(dir, caName+".key"), limit: maxPEMFile, private: true}
	crtPEM, err := crt.read()
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, crt.fail(fs.ErrNotExist, "make a CA first: tunnelctl pki init --dir "+dir)
		}
		return nil, err
	}
	keyPEM, err := key.read()
	if err != nil {
		return nil, err
	}
	if _, err := parseBundle(crtPEM, ca.o.Clock()); err != nil {
		return nil, crt.fail(err, "restore it, or make a new CA in another folder")
	}
	if ca.key, err = parseKey(keyPEM); err != nil {
		return nil, key.fail(err, "restore it, or make a new CA in another folder")
	}
	blocks, err := decodePEM(crtPEM)
	if err != nil {
		return nil, crt.fail(err, "")
	}
	for _, b := range blocks {
		c, err := x509.ParseCertificate(b.Bytes)
		if err == nil && ca.key.PublicKey.Equal(c.PublicKey) && (ca.cert == nil || c.NotAfter.After(ca.cert.NotAfter)) {
			ca.cert = c
		}
	}
	if ca.cert == nil {
		return nil, key.fail(fmt.Errorf("does not belong to %s", crt.path), "restore both files from the same backup")
	}
	return ca, nil
}

// CertFile is the path of the CA's certificate, for everyone's bundle.
func (ca *CA) CertFile() string { return filepath.Join(ca.dir, caName+".crt") }

// NotAfter is when the CA's certificate ends.
func (ca *CA) NotAfter() time.Time { return ca.cert.NotAfter }

// IssueServer issues a server's certificate for all the names and addresses at which it is dialed, and replaces an earlier
// one of the same name. A request that makes no sense is a *RequestError.
func (ca *CA) IssueServer(name string, hosts []string) (Issued, error) {
	tmpl := &x509.Certificate{}
	for _, text := range hosts {
		h, err := parseHost(text)
		switch {
		case err != nil:
			return Issued{}, &RequestError{problem: "host " + err.Error(), hint: "give hosts without scheme and port"}
		case h.dns != "":
			tmpl.DNSNames = append(tmpl.DNSNames, h.dns)
		default:
			tmpl.IPAddresses = append(tmpl.IPAddresses, h.addr.AsSlice())
		}
	}
	if len(hosts) == 0 || len(hosts) > maxHosts {
		return Issued{}, &RequestError{problem: fmt.Sprintf("a server needs between 1 and %d hosts, not %d", maxHosts, len(hosts)),
			hint: "give every name and address at which agents and other servers dial it"}
	}
	return ca.issue(indexEntry{role: RoleServer, name: name}, tmpl, false)
}

// IssueAgent issues a node's certificate, and replaces an earlier one of the same node. Without addresses it carries the name
// only, as in Kubernetes. Addresses that were last issued to another node are refused with a *TakenError, unless reissue
// says that they have moved. A request that makes no sense is a *RequestError.
func (ca *CA) IssueAgent(node string, addrs []netip.Addr, reissue bool) (Issued, error) {
	var own []netip.Addr
	for _, a := range addrs {
		plain := a.Unmap()
		// The servers would refuse these as targets; saying so now saves a search.
		if !plain.IsValid() || plain.Zone() != "" || !plain.IsGlobalUnicast() {
			return Issued{}, &RequestError{problem: fmt.Sprintf("address %s cannot be a node's", a),
				hint: "give the node's own unicast addresses: no loopback, link-local, multicast or broadcast ones"}
		}
		own = append(own, plain)
	}
	slices.SortFunc(own, netip.Addr.Compare)
	own = slices.Compact(own)
	if len(own) > maxAddrs {
		return Issued{}, &RequestError{problem: fmt.Sprintf("%d addresses, at most %d are allowed", len(own), maxAddrs)}
	}
	tmpl := &x509.Certificate{}
	for _, a := range own {
		tmpl.IPAddresses = append(tmpl.IPAddresses, net.IP(a.AsSlice()))
	}
	return ca.issue(indexEntry{role: RoleAgent, name: node, addrs: own}, tmpl, reissue)
}

// TakenError refuses addresses that another node's certificate has.
type TakenError struct {
	Node  string // that wanted them
	Taken []Moved
}

func (e *TakenError) Error() string {
	t := e.Taken[0]
	more := ""
	if n := len(e.Taken) - 1; n > 0 {
		more = fmt.Sprintf(", and %d more", n)
	}
	return fmt.Sprintf("address %s was issued to node %q (serial %s)%s", t.Addr, t.Node, t.Serial, more)
}

// Hint is one sentence for the user.
func (e *TakenError) Hint() string {
	return "if it has moved, use --reissue and put the serial number of the old certificate into the servers' deny file"
}

// issue completes e and tmpl, remembers them and writes the files.
func (ca *CA) issue(e indexEntry, tmpl *x509.Certificate, reissue bool) (Issued, error) {
	if err := CheckName(e.name); err != nil {
		return Issued{}, &RequestError{problem: err.Error()}
	}
	if e.name == caName || len(e.name) > maxIssuedName {
		return Issued{}, &RequestError{problem: fmt.Sprintf("name %q cannot be a file name here", e.name),
			hint: fmt.Sprintf("use a name other than %q of at most %d bytes", caName, maxIssuedName)}
	}
	now := ca.o.Clock()
	if now.After(ca.cert.NotAfter) {
		return Issued{}, &FileError{What: "CA certificate", Path: ca.CertFile(), Err: fmt.Errorf("expired %s", stamp(ca.cert.NotAfter)),
			hint: "make a new CA in another folder"}
	}
	e.notAfter = now.Add(ca.o.LeafValidity)
	if e.notAfter.After(ca.cert.NotAfter) {
		e.notAfter = ca.cert.NotAfter
	}
	e.notAfter = e.notAfter.UTC().Truncate(time.Second)
	serial, err := newSerial()
	if err != nil {
		return Issued{}, err
	}
	e.serial = serial.Text(16)
	key, keyPEM, err := newKey()
	if err != nil {
		return Issued{}, err
	}
	tmpl.SerialNumber, tmpl.NotBefore, tmpl.NotAfter = serial, now.Add(-backdate), e.notAfter
	der, err := signLeaf(tmpl, e.name, e.role, key.Public(), ca.cert, ca.key)
	if err != nil {
		return Issued{}, err
	}
	moved, err := ca.record(e, certPEM(der), keyPEM, reissue, now)
	if err != nil {
		return Issued{}, err
	}
	return Issued{
		Name: e.name, Role: e.role, Serial: e.serial, NotAfter: e.notAfter, Moved: moved,
		CertFile: filepath.Join(ca.dir, e.name+".crt"), KeyFile: filepath.Join(ca.dir, e.name+".key"),
	}, nil
}

// record checks e against the index and writes index, key and certificate, in this order: an interrupted issue may leave an
// entry without a certificate, which the next issue of that name puts right, but never a certificate without an entry.
func (ca *CA) record(e indexEntry, crt, key []byte, reissue bool, now time.Time) ([]Moved, error) {
	f, err := lockFolder(ca.dir)
	if err != nil {
		return nil, err
	}
	defer f.unlock()
	src := source{what: "CA index", path: filepath.Join(ca.dir, indexFile), limit: maxIndex}
	data, err := src.read()
	if errors.Is(err, fs.ErrNotExist) {
		return nil, src.fail(fs.ErrNotExist, fmt.Sprintf("restore it; if nothing was issued yet, make it with the single line %q", indexHeader))
	}
	if err != nil {
		return nil, err
	}
	ix, err := parseIndex(data)
	if err != nil {
		return nil, src.fail(err, "restore it: without it, addresses could be issued twice")
	}
	if role := ix.roleOf(e.name); role != "" && role != e.role {
		return nil, &RequestError{problem: fmt.Sprintf("%q was issued before, for the role %q", e.name, role),
			hint: "choose another name: an agent and a server cannot share one"}
	}
	moved := ix.others(e.name, e.addrs)
	if len(moved) > 0 && !reissue {
		return nil, &TakenError{Node: e.name, Taken: moved}
	}
	if err := f.write(indexFile, 0o600, ix.add(e, now).format()); err != nil {
		return nil, err
	}
	if err := f.write(e.name+".key", 0o600, key); err != nil {
		return nil, err
	}
	return moved, f.write(e.name+".crt", 0o644, crt)
}

// newAuthority makes a CA's certificate and key.
func newAuthority(now time.Time, validity time.Duration) (cert *x509.Certificate, key *ecdsa.PrivateKey, keyPEM []byte, err error) {
	key, keyPEM, err = newKey()
	if err != nil {
		return nil, nil, nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, nil, nil, err
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial,
		// Part of the serial number, so that an old CA and its successor are told apart in one bundle.
		Subject:               pkix.Name{CommonName: fmt.Sprintf("edge-tunnel CA %.8s", fmt.Sprintf("%032x", serial))},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(validity),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return nil, nil, nil, fmt.Errorf("sign CA certificate: %w", err)
	}
	if cert, err = x509.ParseCertificate(der); err != nil {
		return nil, nil, nil, fmt.Errorf("read CA certificate back: %w", err)
	}
	return cert, key, keyPEM, nil
}

// signLeaf completes tmpl, which has serial number, times and names.
func signLeaf(tmpl *x509.Certificate, name string, role Role, key crypto.PublicKey, ca *x509.Certificate, caKey *ecdsa.PrivateKey) ([]byte, error) {
	tmpl.Subject = pkix.Name{CommonName: name, Organization: []string{string(role)}}
	tmpl.KeyUsage, tmpl.ExtKeyUsage = x509.KeyUsageDigitalSignature, role.usages()
	tmpl.BasicConstraintsValid = true
	der, err := x509.CreateCertificate(rand.Reader, tmpl, ca, key, caKey)
	if err != nil {
		return nil, fmt.Errorf("sign certificate: %w", err)
	}
	return der, nil
}

func newKey() (key *ecdsa.PrivateKey, asPEM []byte, err error) {
	if key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, nil, fmt.Errorf("generate key: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, nil, fmt.Errorf("encode key: %w", err)
	}
	return key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// newSerial returns a random number of 128 bits, never 0.
func newSerial() (*big.Int, error) {
	limit := new(big.Int).Sub(new(big.Int).Lsh(big.NewInt(1), 128), big.NewInt(1))
	n, err := rand.Int(rand.Reader, limit)
	if err != nil {
		return nil, fmt.Errorf("choose serial number: %w", err)
	}
	return n.Add(n, big.NewInt(1)), nil
}

func certPEM(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}
