// SPDX-License-Identifier: Apache-2.0

package identity

import (
	"os"
	"strings"
	"testing"
)

func TestLate(t *testing.T) {
	p := newPair(t)
	dir := t.TempDir()
	f := Files{CA: dir + "/ca.crt", Cert: dir + "/current.pem", Key: dir + "/current.pem"}
	if _, err := Open(f, Options{Role: RoleAgent}); err == nil {
		t.Error("opened without files")
	}
	s := must[*Store](t)(Open(f, Options{Role: RoleAgent, Late: "edge-1"}))
	if self := s.Self(); self.Name != "edge-1" || self.Role != RoleAgent || !self.NotAfter.IsZero() {
		t.Errorf("%+v", self)
	}
	fails := func(what string) {
		t.Helper()
		if o := shake(t, p.server.ServerTLS(protocols), s.ClientTLS("localhost", alpnAgent)); o.clientErr == nil {
			t.Errorf("%s: a handshake succeeds", what)
		}
	}
	fails("nothing")
	cert, key := []byte(read(t, p.aFiles.Cert)), []byte(read(t, p.aFiles.Key))
	if err := s.Present(cert, key); err != nil {
		t.Fatal(err)
	}
	if s.Self().Serial == "" {
		t.Error("not in use")
	}
	fails("no bundle")
	changed := s.Changed()
	put(t, f.CA, read(t, p.aFiles.CA))
	if err := s.Reload(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-changed:
	default:
		t.Error("not told")
	}
	if o := shake(t, p.server.ServerTLS(protocols), s.ClientTLS("localhost", alpnAgent)); o.clientErr != nil || o.serverErr != nil {
		t.Errorf("%v, %v", o.clientErr, o.serverErr)
	}

	// What is presented stays until the files say something else; what is refused changes nothing.
	serial := s.Self().Serial
	other := files(t, p.ca, must[Issued](t)(p.ca.IssueAgent("edge-2", nil, false)))
	for name, c := range map[string][2][]byte{
		"another's": {[]byte(read(t, other.Cert)), []byte(read(t, other.Key))}, "another's key": {cert, []byte(read(t, other.Key))}, "garbage": {[]byte("x"), key},
	} {
		if err := s.Present(c[0], c[1]); err == nil || s.Self().Serial != serial {
			t.Errorf("%s: %v", name, err)
		}
	}
	renewed := files(t, p.ca, must[Issued](t)(p.ca.IssueAgent("edge-1", nil, true)))
	put(t, f.Cert, read(t, renewed.Cert)+read(t, renewed.Key))
	if err := s.Reload(); err != nil || s.Self().Serial == serial {
		t.Errorf("the files are not used: %v", err)
	}
	serial = s.Self().Serial
	if err := s.Present(cert, key); err != nil || s.Self().Serial == serial {
		t.Errorf("not presented beside files: %v", err)
	}
	if err := os.Remove(f.Cert); err != nil {
		t.Fatal(err)
	}
	if err := s.Reload(); err != nil || s.Self().Serial == serial {
		t.Errorf("lost with the files: %v", err)
	}

	// A cached certificate that is of no use is as good as none. The deny file is not late.
	put(t, f.Cert, "half a certificate")
	late := must[*Store](t)(Open(f, Options{Role: RoleAgent, Late: "edge-1"}))
	if st := late.Stats(); st.Self.Serial != "" || st.Sets[1].Error == "" {
		t.Errorf("%+v", st)
	}
	f.Deny = dir + "/deny"
	if _, err := Open(f, Options{Role: RoleAgent, Late: "edge-1"}); err == nil || !strings.Contains(err.Error(), "deny") {
		t.Errorf("got %v", err)
	}
}
