// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"
)

func TestParseDeny(t *testing.T) {
	d, err := parseDeny([]byte("# lost\n\n  edge-1 # in a train\r\nedge-1\nserial:00:AB:cd\nserial: 0\ncloud.example.org"))
	if err != nil || d.len() != 4 {
		t.Fatalf("got %+v, %v", d, err)
	}
	for _, c := range []struct {
		p    Peer
		want string
	}{
		{Peer{Name: "edge-1", Serial: "1"}, "edge-1"}, {Peer{Name: "x", Serial: "abcd"}, "serial:abcd"}, {Peer{Name: "cloud.example.org"}, "cloud.example.org"},
		{Peer{Name: "edge-10", Serial: "ab"}, ""}, {Peer{Name: "abcd"}, ""},
	} {
		if got, denied := d.match(c.p); got != c.want || denied != (c.want != "") {
			t.Errorf("%+v: got %q", c.p, got)
		}
	}
	for text, want := range map[string]string{
		"ok\nBad\n": "line 2", "a b": "line 1", "serial:": "line 1", "serial:xy": "line 1", "serial:" + strings.Repeat("1", 41): "line 1",
		"serial:-1": "line 1", "\xef\xbb\xbfedge-1": "line 1", "a\x00": "line 1", "Serial:12": "line 1", strings.Repeat("BAD\n", 1000): "and more",
	} {
		if _, err := parseDeny([]byte(text)); err == nil || !strings.Contains(err.Error(), want) || len(err.Error()) > 1000 {
			t.Errorf("%.40q: got %v", text, err)
		}
	}
}

func FuzzParseDeny(f *testing.F) {
	f.Add("edge-1\nserial:0A:1b # x\n")
	f.Add("serial:zz\nA\n")
	f.Fuzz(func(t *testing.T, text string) {
		d, err := parseDeny([]byte(text))
		if err != nil {
			if d.len() != 0 {
				t.Fatal("half a list")
			}
			return
		}
		if d.len() > strings.Count(text, "\n")+1 {
			t.Fatal("more entries than lines")
		}
		for name := range d.names {
			if CheckName(name) != nil || !strings.Contains(text, name) {
				t.Fatalf("name %q", name)
			}
		}
		for serial := range d.serials {
			if again, err := parseSerial(serial); err != nil || again != serial {
				t.Fatalf("serial %q: %q, %v", serial, again, err)
			}
		}
	})
}

// The rule as Kubernetes writes it down, for comparison.
var subdomain = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)

func FuzzCheckName(f *testing.F) {
	for _, s := range []string{"edge-1", "a.b", "a..b", "-a", "a-.b", "a.-b", "A", "", ".", "é", "a\n", strings.Repeat("a", 253), strings.Repeat("a", 254)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		want := len(s) <= 253 && subdomain.MatchString(s) && !strings.HasSuffix(s, "\n")
		if got := CheckName(s) == nil; got != want {
			t.Fatalf("%q: %v, want %v", s, got, want)
		}
	})
}

func FuzzParseIndex(f *testing.F) {
	f.Add(indexHeader + "\n")
	f.Add(indexHeader + "\nabc agent edge-1 2027-01-02T03:04:05Z 10.0.0.1,fd00::1\n1 server s 2027-01-02T03:04:05+01:00 -\n")
	f.Fuzz(func(t *testing.T, text string) {
		ix, err := parseIndex([]byte(text))
		if err != nil {
			return
		}
		again, err := parseIndex(ix.format())
		if err != nil {
			t.Fatalf("%v in %q", err, ix.format())
		}
		if len(ix) != len(again) || len(ix) > 0 && !reflect.DeepEqual(ix, again) {
			t.Fatalf("%+v became %+v", ix, again)
		}
	})
}

func FuzzParsePEM(f *testing.F) {
	ca := newCA(f)
	i := must[Issued](f)(ca.IssueServer("cloud-1", []string{"localhost", "127.0.0.1"}))
	for _, path := range []string{ca.CertFile(), i.CertFile, i.KeyFile} {
		text := read(f, path)
		f.Add([]byte(text))
		f.Add([]byte(text[:len(text)/2]))
		f.Add([]byte("text\r\n" + text + text))
	}
	f.Add(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: []byte{48, 0}}))
	now := time.Now()
	f.Fuzz(func(t *testing.T, data []byte) {
		if b, err := parseBundle(data, now); err == nil && len(b.infos) == 0 {
			t.Fatal("empty bundle accepted")
		}
		certs, err := parseCerts(data)
		if err == nil {
			if len(certs) == 0 || len(certs) > maxChain {
				t.Fatalf("%d certificates accepted", len(certs))
			}
			// Whatever a stranger shows must be judged without a panic.
			st := &state{bundle: bundle{roots: x509.NewCertPool()}}
			if _, err := st.verify(certs, now); err == nil {
				t.Fatal("believed without a CA")
			}
			describe(certs[0])
		}
		if key, err := parseKey(data); err == nil && key == nil {
			t.Fatal("no key and no error")
		}
	})
}

func TestRefusalsAreBounded(t *testing.T) {
	p := newPair(t)
	leaf := must[Issued](t)(p.ca.IssueAgent("x", nil, false))
	c := leafOf(t, leaf)
	c.Subject.CommonName = strings.Repeat("A", 100_000)
	if r := refuse(c, ReasonBadName, "%s", "x"); len(r.Name) > maxName || len(r.Error()) > 1000 {
		t.Fatal("a refusal carries whatever a stranger sends")
	}
	if _, err := nameOf(c); err == nil || len(fmt.Sprint(err)) > 1000 {
		t.Fatalf("%d bytes", len(fmt.Sprint(err)))
	}
}
