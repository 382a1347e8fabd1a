#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# Writes deploy/manifests from deploy/chart; "make manifests" calls it. With "check" it only fails if that would change something, which it tells by a
# hash of all that goes in and of what came out: to render takes helm's packages, whose first build takes a while.
set -euo pipefail
cd "$(dirname "$0")/.."
export LC_ALL=C
out=deploy/manifests/edge-tunnel.yaml
cleanup=deploy/manifests/cleanup.yaml
mark='# Hash of chart, renderer and what came out: '

hash() {
	{
		find deploy/chart tools/release/go.mod tools/release/go.sum tools/release/render -type f ! -name '*_test.go' -print0 | sort -z | xargs -0 sha256sum
		grep -v "^$mark" "$out"
		cat "$cleanup"
	} | sha256sum | cut -d ' ' -f 1
}

if [ "${1:-}" = check ]; then
	grep -qx "$mark$(hash)" "$out" && exit
	echo "$out is not what deploy/chart gives: make manifests"
	exit 1
fi
mkdir -p "$(dirname "$out")"
go run -C tools/release ./render "$PWD/deploy/chart" >"$out.part"
go run -C tools/release ./render -hooks "$PWD/deploy/chart" >"$cleanup.part"
mv "$out.part" "$out"
mv "$cleanup.part" "$cleanup"
sed -i "3a $mark$(hash)" "$out"
