#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# The compiler of the BPF programs: runs clang-14 with the arguments given, after making sure that it is clang 14.
# The objects are checked in and have to be the same on every machine, and another major version makes other code.
set -eu

wanted=14
clang=${CLANG:-clang-$wanted}

if ! version=$("$clang" --version 2>/dev/null); then
	echo "error: the BPF programs need clang $wanted; $clang was not found" >&2
	echo "hint: on Debian 12: apt-get install clang-$wanted llvm-$wanted libbpf-dev, or set CLANG" >&2
	exit 1
fi
found=$(printf '%s\n' "$version" | sed -n 's/.*clang version \([0-9]*\)\..*/\1/p' | head -n 1)
if [ "$found" != "$wanted" ]; then
	echo "error: the BPF programs need clang $wanted; $clang is version ${found:-unknown}" >&2
	echo "hint: install clang-$wanted, or set CLANG to it" >&2
	exit 1
fi
[ $# -gt 0 ] || exit 0

# Debian keeps <asm/types.h>, which <linux/bpf.h> wants, in a folder per architecture that clang does not search for -target bpf.
exec "$clang" -isystem "/usr/include/$(uname -m)-linux-gnu" "$@"
