// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"crypto"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"net"
	"net/url"
	"slices"
	"strings"
	"testing"
)

func request(t testing.TB, key crypto.Signer, edit func(*x509.CertificateRequest)) []byte {
	t.Helper()
	tmpl := &x509.CertificateRequest{Subject: pkix.Name{CommonName: "edge-1", Organization: []string{string(RoleAgent)}}}
	if edit != nil {
		edit(tmpl)
	}
	der := must[[]byte](t)(x509.CreateCertificateRequest(rand.Reader, tmpl, key))
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}

func wantDenial(t testing.TB, name string, err error, reason string) {
	t.Helper()
	var d *Denial
	if reason == "" && err == nil {
		return
	}
	if !errors.As(err, &d) || d.Reason() != reason || !slices.Contains(DenyReasons(), reason) || d.Detail() == "" || len(d.Detail()) > 500 ||
		!strings.Contains(d.Error(), reason+": "+d.Detail()) {
		t.Errorf("%s: got %v, want the reason %q", name, err, reason)
	}
}

func TestParseCSR(t *testing.T) {
	key := ecKey(t, elliptic.P256())
	good := request(t, key, nil)
	c := must[CSR](t)(ParseCSR(good))
	if c.Name != "edge-1" || c.Role != RoleAgent || len(c.hosts()) > 0 || len(c.KeyID) != 64 {
		t.Errorf("got %+v", c)
	}
	if again := must[CSR](t)(ParseCSR(request(t, key, nil))); again.KeyID != c.KeyID {
		t.Error("one key has two ids")
	}
	if other := must[CSR](t)(ParseCSR(request(t, ecKey(t, elliptic.P256()), nil))); other.KeyID == c.KeyID {
		t.Error("two keys have one id")
	}
	c = must[CSR](t)(ParseCSR(request(t, key, func(r *x509.CertificateRequest) {
		r.Subject.Organization = []string{string(RoleServer)}
		r.DNSNames = []string{"b.example.org", "A.example.org", "b.example.org"}
		r.IPAddresses = []net.IP{net.ParseIP("fd00::1"), net.ParseIP("::ffff:10.0.0.1"), {10, 0, 0, 1}}
	})))
	if c.Role != RoleServer || !slices.Equal(c.DNSNames, []string{"a.example.org", "b.example.org"}) || !slices.Equal(c.Addrs, addrs("10.0.0.1", "fd00::1")) {
		t.Errorf("got %+v", c)
	}

	many := func(r *x509.CertificateRequest) {
		for i := range maxHosts + 1 {
			r.IPAddresses = append(r.IPAddresses, net.IP{10, 0, 0, byte(i)})
		}
	}
	ext := func(id asn1.ObjectIdentifier, value any) func(*x509.CertificateRequest) {
		return func(r *x509.CertificateRequest) {
			r.ExtraExtensions = append(r.ExtraExtensions, pkix.Extension{Id: id, Value: must[[]byte](t)(asn1.Marshal(value))})
		}
	}
	name := func(tag int, bytes string) asn1.RawValue {
		return asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: tag, Bytes: []byte(bytes)}
	}
	subject := func(n pkix.Name) func(*x509.CertificateRequest) {
		return func(r *x509.CertificateRequest) { r.Subject = n }
	}
	agents := []string{string(RoleAgent)}
	decoded := must[[]*pem.Block](t)(decodePEM(good))
	forged := slices.Clone(decoded[0].Bytes)
	forged[len(forged)-1] ^= 1
	for what, c := range map[string]struct {
		data   []byte
		reason string
	}{
		"nothing":     {nil, DenyBadRequest},
		"no PEM":      {[]byte("hello"), DenyBadRequest},
		"two":         {slices.Concat(good, good), DenyBadRequest},
		"half":        {good[:len(good)/2], DenyBadRequest},
		"certificate": {certPEM([]byte("x")), DenyBadRequest},
		"no DER":      {pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: []byte("x")}), DenyBadRequest},
		"huge":        {slices.Concat(good, make([]byte, maxCSR)), DenyBadRequest},
		"forged":      {pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: forged}), DenyBadRequest},
		"P-384":       {request(t, ecKey(t, elliptic.P384()), nil), DenyBadKey},
		"RSA":         {request(t, must[*rsa.PrivateKey](t)(rsa.GenerateKey(rand.Reader, 2048)), nil), DenyBadKey},

		"no CN":        {request(t, key, subject(pkix.Name{Organization: agents})), DenyWrongSubject},
		"no O":         {request(t, key, subject(pkix.Name{CommonName: "edge-1"})), DenyWrongSubject},
		"two O":        {request(t, key, subject(pkix.Name{CommonName: "edge-1", Organization: []string{string(RoleAgent), string(RoleServer)}})), DenyWrongSubject},
		"cluster's O":  {request(t, key, subject(pkix.Name{CommonName: "edge-1", Organization: []string{"system:masters"}})), DenyWrongSubject},
		"OU":           {request(t, key, subject(pkix.Name{CommonName: "edge-1", Organization: agents, OrganizationalUnit: []string{"x"}})), DenyWrongSubject},
		"serialNumber": {request(t, key, subject(pkix.Name{CommonName: "edge-1", Organization: agents, SerialNumber: "1"})), DenyWrongSubject},
		"two CN":       {request(t, key, subject(pkix.Name{Organization: agents, ExtraNames: []pkix.AttributeTypeAndValue{atv("edge-1"), atv("edge-2")}})), DenyWrongSubject},
		"bad CN":       {request(t, key, subject(pkix.Name{CommonName: "../edge", Organization: agents})), DenyWrongSubject},
		"long CN":      {request(t, key, subject(pkix.Name{CommonName: strings.Repeat("é", 5000), Organization: agents})), DenyWrongSubject},

		"mail":       {request(t, key, func(r *x509.CertificateRequest) { r.EmailAddresses = []string{"a@b.example"} }), DenyExtraNames},
		"URI":        {request(t, key, func(r *x509.CertificateRequest) { r.URIs = []*url.URL{{Scheme: "spiffe", Host: "x"}} }), DenyExtraNames},
		"otherName":  {request(t, key, ext(oidSAN, []asn1.RawValue{name(0, "\x06\x01\x01")})), DenyExtraNames},
		"wildcard":   {request(t, key, func(r *x509.CertificateRequest) { r.DNSNames = []string{"*.example.org"} }), DenyExtraNames},
		"DNS as IP":  {request(t, key, func(r *x509.CertificateRequest) { r.DNSNames = []string{"10.0.0.1"} }), DenyExtraNames},
		"many names": {request(t, key, many), DenyExtraNames},
		"CA":         {request(t, key, ext(asn1.ObjectIdentifier{2, 5, 29, 19}, struct{ CA bool }{true})), DenyExtraNames},
		"two SANs": {request(t, key, func(r *x509.CertificateRequest) {
			ext(oidSAN, []asn1.RawValue{name(2, "a")})(r)
			ext(oidSAN, []asn1.RawValue{name(2, "b")})(r)
		}), DenyBadRequest},
		"garbage SAN": {request(t, key, ext(oidSAN, "x")), DenyBadRequest},
	} {
		_, err := ParseCSR(c.data)
		wantDenial(t, what, err, c.reason)
	}
}

func TestProve(t *testing.T) {
	a := Accounts{Agent: "system:serviceaccount:kube-system:agent", Server: "system:serviceaccount:kube-system:server"}
	if err := a.Validate(); err != nil {
		t.Error(err)
	}
	for _, bad := range []Accounts{
		{}, {a.Agent, a.Agent}, {"agent", a.Server}, {a.Agent, "system:serviceaccount::server"}, {a.Agent, "system:serviceaccount:a:"},
		{a.Agent, "system:serviceaccount:a:b:c"}, {a.Agent, "system:node:a:b"},
	} {
		if bad.Validate() == nil {
			t.Errorf("%+v is taken", bad)
		}
	}
	extra := func(pairs ...string) map[string][]string {
		m := map[string][]string{}
		for i := 0; i < len(pairs); i += 2 {
			m[pairs[i]] = append(m[pairs[i]], pairs[i+1])
		}
		return m
	}
	nodes := []string{"system:nodes", "system:authenticated"}
	for what, c := range map[string]struct {
		role   Role
		who    Requester
		want   Proof
		reason string
	}{
		"agent's token": {RoleAgent, Requester{a.Agent, nil, extra(extraNode, "edge-1", extraNodeUID, "7")}, Proof{Node: "edge-1", NodeUID: "7"}, ""},
		"node and pod":  {RoleAgent, Requester{a.Agent, nil, extra(extraNode, "edge-1", extraPod, "p", extraPodUID, "8")}, Proof{Node: "edge-1"}, ""},
		"old token":     {RoleAgent, Requester{a.Agent, nil, extra(extraPod, "p", extraPodUID, "8")}, Proof{Pod: "p", PodUID: "8"}, ""},
		"kubelet":       {RoleAgent, Requester{"system:node:edge-1", nodes, nil}, Proof{Node: "edge-1"}, ""},
		"server":        {RoleServer, Requester{a.Server, nil, extra(extraNode, "cloud-1")}, Proof{Node: "cloud-1"}, ""},

		"kubelet as server":    {RoleServer, Requester{"system:node:edge-1", nodes, nil}, Proof{}, DenyWrongAccount},
		"agent as server":      {RoleServer, Requester{a.Agent, nil, extra(extraNode, "edge-1")}, Proof{}, DenyWrongAccount},
		"server as agent":      {RoleAgent, Requester{a.Server, nil, extra(extraNode, "cloud-1")}, Proof{}, DenyWrongAccount},
		"same name, other ns":  {RoleAgent, Requester{"system:serviceaccount:default:agent", nil, extra(extraNode, "edge-1")}, Proof{}, DenyWrongAccount},
		"longer name":          {RoleAgent, Requester{a.Agent + "x", nil, extra(extraNode, "edge-1")}, Proof{}, DenyWrongAccount},
		"nobody":               {RoleAgent, Requester{}, Proof{}, DenyWrongAccount},
		"admin":                {RoleAgent, Requester{"kubernetes-admin", []string{"system:masters", "system:nodes"}, nil}, Proof{}, DenyWrongAccount},
		"node without group":   {RoleAgent, Requester{"system:node:edge-1", []string{"system:authenticated"}, nil}, Proof{}, DenyWrongAccount},
		"node without name":    {RoleAgent, Requester{"system:node:", nodes, nil}, Proof{}, DenyWrongAccount},
		"node with a bad name": {RoleAgent, Requester{"system:node:../x", nodes, nil}, Proof{}, DenyWrongAccount},
		"no role":              {"", Requester{a.Agent, nil, extra(extraNode, "edge-1")}, Proof{}, DenyWrongAccount},
		"unbound token":        {RoleAgent, Requester{a.Agent, nil, nil}, Proof{}, DenyNoNode},
		"pod without UID":      {RoleAgent, Requester{a.Agent, nil, extra(extraPod, "p")}, Proof{}, DenyNoNode},
		"two pods":             {RoleAgent, Requester{a.Agent, nil, extra(extraPod, "p", extraPod, "q", extraPodUID, "8")}, Proof{}, DenyNoNode},
		"two nodes":            {RoleAgent, Requester{a.Agent, nil, extra(extraNode, "edge-1", extraNode, "edge-2")}, Proof{}, DenyNoNode},
		"two nodes and a pod":  {RoleAgent, Requester{a.Agent, nil, extra(extraNode, "a", extraNode, "b", extraPod, "p", extraPodUID, "8")}, Proof{}, DenyNoNode},
		"empty node":           {RoleAgent, Requester{a.Agent, nil, extra(extraNode, "")}, Proof{}, DenyNoNode},
	} {
		got, err := a.Prove(c.role, c.who)
		wantDenial(t, what, err, c.reason)
		if got != c.want {
			t.Errorf("%s: got %+v", what, got)
		}
	}
	if _, err := (Accounts{}).Prove(RoleAgent, Requester{}); err == nil {
		t.Error("no account is everybody's")
	}
}

func TestCheckUsages(t *testing.T) {
	for _, c := range []struct {
		role   Role
		usages string
		reason string
	}{
		{RoleAgent, "digital signature,client auth", ""},
		{RoleAgent, "client auth,digital signature,client auth", ""},
		{RoleServer, "server auth,client auth,digital signature", ""},
		{RoleAgent, "client auth", DenyWrongUsages},
		{RoleAgent, "", DenyWrongUsages},
		{RoleAgent, "digital signature,client auth,server auth", DenyWrongUsages},
		{RoleAgent, "digital signature,key encipherment,client auth", DenyWrongUsages},
		{RoleAgent, "any,digital signature,client auth", DenyWrongUsages},
		{RoleServer, "digital signature,server auth", DenyWrongUsages},
		{RoleServer, "digital signature,server auth,client auth,code signing", DenyWrongUsages},
	} {
		wantDenial(t, string(c.role)+" "+c.usages, CheckUsages(c.role, strings.Split(c.usages, ",")), c.reason)
	}
}

func TestCheckRequest(t *testing.T) {
	key := ecKey(t, elliptic.P256())
	csr := func(role Role, name string, hosts ...string) CSR {
		return must[CSR](t)(ParseCSR(request(t, key, func(r *x509.CertificateRequest) {
			r.Subject = pkix.Name{CommonName: name, Organization: []string{string(role)}}
			for _, h := range hosts {
				if ip := net.ParseIP(h); ip != nil {
					r.IPAddresses = append(r.IPAddresses, ip)
				} else {
					r.DNSNames = append(r.DNSNames, h)
				}
			}
		})))
	}
	may := []string{"LB.example.org.", "10.0.0.1", "fd00::1", "127.0.0.1", "fe80::1", "not a host", "", "10.0.0.1"}
	for what, c := range map[string]struct {
		csr    CSR
		role   Role
		reason string
	}{
		"agent":               {csr(RoleAgent, "edge-1"), RoleAgent, ""},
		"server":              {csr(RoleServer, "edge-1", "lb.example.org", "10.0.0.1", "fd00::1"), RoleServer, ""},
		"fewer names":         {csr(RoleServer, "edge-1", "10.0.0.1"), RoleServer, ""},
		"another node":        {csr(RoleAgent, "edge-2"), RoleAgent, DenyWrongNode},
		"server's O":          {csr(RoleServer, "edge-1"), RoleAgent, DenyWrongSubject},
		"agent's O":           {csr(RoleAgent, "edge-1"), RoleServer, DenyWrongSubject},
		"agent with address":  {csr(RoleAgent, "edge-1", "10.0.0.1"), RoleAgent, DenyExtraNames},
		"agent with its name": {csr(RoleAgent, "edge-1", "edge-1"), RoleAgent, DenyExtraNames},
		"other server":        {csr(RoleServer, "cloud-2", "10.0.0.1"), RoleServer, DenyWrongNode},
		"no names":            {csr(RoleServer, "edge-1"), RoleServer, DenyNoNames},
		"extra address":       {csr(RoleServer, "edge-1", "10.0.0.1", "10.0.0.2"), RoleServer, DenyExtraNames},
		"extra name":          {csr(RoleServer, "edge-1", "lb.example.org", "kubernetes.default.svc"), RoleServer, DenyExtraNames},
		"loopback":            {csr(RoleServer, "edge-1", "127.0.0.1"), RoleServer, DenyExtraNames},
		"many extra": {csr(RoleServer, "edge-1", strings.Repeat("a", 200), strings.Repeat("b", 200), strings.Repeat("c", 200)), RoleServer,
			DenyExtraNames},
	} {
		wantDenial(t, what, c.csr.Check(c.role, "edge-1", may), c.reason)
	}
	many := make([]string, 100)
	for i := range many {
		many[i] = net.IP{10, 1, 1, byte(i)}.String()
	}
	if got := Hosts(many); len(got) != maxHosts {
		t.Errorf("%d hosts", len(got))
	}
	for signer, role := range map[string]Role{SignerAgent: RoleAgent, SignerServer: RoleServer, "kubernetes.io/kubelet-serving": "", "": ""} {
		if got := SignerRole(signer); got != role {
			t.Errorf("%s: %q", signer, got)
		}
	}
}

func FuzzParseCSR(f *testing.F) {
	key := ecKey(f, elliptic.P256())
	f.Add(request(f, key, nil))
	f.Add(request(f, key, func(r *x509.CertificateRequest) {
		r.Subject.Organization = []string{string(RoleServer)}
		r.DNSNames, r.IPAddresses = []string{"a.example.org"}, []net.IP{net.ParseIP("fd00::1")}
	}))
	f.Add([]byte("-----BEGIN CERTIFICATE REQUEST-----\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := ParseCSR(data)
		var d *Denial
		if err != nil {
			if !errors.As(err, &d) || !slices.Contains(DenyReasons(), d.Reason()) {
				t.Fatalf("%v is no denial", err)
			}
			return
		}
		if CheckName(c.Name) != nil || c.key == nil || len(c.hosts()) > maxHosts || c.Role != RoleAgent && c.Role != RoleServer {
			t.Fatalf("taken: %+v", c)
		}
		// What is taken can be granted, and says then what was asked for.
		var hosts []string
		for _, h := range c.hosts() {
			hosts = append(hosts, h.String())
		}
		if err := c.Check(c.Role, c.Name, hosts); err != nil && c.Role == RoleServer && len(hosts) == len(Hosts(hosts)) && len(hosts) > 0 {
			t.Fatal(err)
		}
	})
}
