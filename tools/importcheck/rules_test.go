// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"testing"
)

func TestJudge(t *testing.T) {
	for _, c := range []struct {
		from, imported string
		want           string // part of the sentence; empty: allowed
	}{
		{"pkg/wire", "encoding/binary", ""},
		{"pkg/wire", "golang.org/x/sys/unix", "level 0 has the standard library only"},
		{"pkg/wire", module + "/pkg/route", "imports point down only"},
		{"pkg/tunnel", module + "/pkg/wire", ""},
		{"pkg/tunnel/internal/frame", module + "/pkg/wire", ""},
		{"pkg/tunnel", module + "/pkg/tunnel/internal/frame", ""},
		{"pkg/tunnel", module + "/pkg/route", "may import pkg/wire of ours"},
		{"pkg/tunnel", module + "/pkg/redirect", "imports point down only"},
		{"pkg/tunnel", module + "/cmd/internal/cli", "nothing in pkg/ knows who uses it"},
		{"pkg/tunnel", "github.com/hashicorp/yamux", ""},
		{"pkg/tunnel", "golang.org/x/time/rate", ""},
		{"pkg/tunnel", "github.com/cilium/ebpf", "third-party family is github.com/hashicorp/yamux"},
		{"pkg/redirect", "github.com/cilium/ebpf/link", ""},
		{"pkg/intercept", module + "/pkg/relay", ""},
		{"pkg/intercept", module + "/pkg/tunnel", "take the rest as funcs"},
		{"pkg/intercept", "testing", "outside of its tests"},
		{"cmd/tunnel-server", module + "/pkg/tunnel", ""},
		{"cmd/tunnel-server", module + "/test/netlab", "for tests only"},
		{"cmd/tunnel-server", module + "/pkg/wire/wiretest", "for tests only"},
		{"cmd/tunnel-server", module + "/tools/importcheck", "wired from pkg/ and cmd/ only"},
		{"cmd/tunnelctl", "github.com/spf13/cobra", ""},
		{"pkg/kube", "k8s.io/client-go/rest", ""},
		{"pkg/kube/servercfg", "k8s.io/api/core/v1", "it does without"},
		{"cmd/tunnel-server", "k8s.io/client-go/rest", "only pkg/kube"},
		{"tools/demo", module + "/test/netlab", ""},
		{"test/netlab", "testing", ""},
		{"pkg/wire/wiretest", "testing", ""},
	} {
		got := judge(c.from, c.imported)
		if (got == "") != (c.want == "") || !strings.Contains(got, c.want) {
			t.Errorf("judge(%s, %s) = %q, want %q", c.from, c.imported, got, c.want)
		}
	}
}

func TestUnlistedPackageIsNamed(t *testing.T) {
	broken := check([]pkg{{ImportPath: module + "/pkg/util"}, {ImportPath: module + "/pkg/wire"}})
	if len(broken) != 1 || !strings.Contains(broken[0], "pkg/util has no level") {
		t.Errorf("check = %q, want one sentence about pkg/util", broken)
	}
}
