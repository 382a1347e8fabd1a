// SPDX-License-Identifier: Apache-2.0

package redirect

// The programs are compiled for little-endian machines only, which is every machine that Kubernetes runs on but s390x; one object
// serves amd64 and arm64. bpf2go is a tool of go.mod, so that the version that generates is the version that loads.

//go:generate go tool bpf2go -cc ../../bpf/check-clang.sh -strip llvm-strip-14 -target bpfel -type sock_kind -type target_state kernel ../../bpf/redirect.c -- -Wall -Wextra -Werror -fno-strict-aliasing
