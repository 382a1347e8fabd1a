#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# fuzz.sh TIME PACKAGES...: runs every fuzz target for TIME, one after the other ("make fuzz" calls it).
set -euo pipefail
cd "$(dirname "$0")/.."

time=$1
shift
count=0
log=$(mktemp)
trap 'rm -f "$log"' EXIT
while read -r package dir; do
	files=("$dir"/*_test.go)
	[ -e "${files[0]}" ] || continue
	mapfile -t targets < <(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(.*/\1/p' "${files[@]}")
	for target in "${targets[@]}"; do
		echo "fuzzing ${package#*/*/*/} $target for $time"
		go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" "$package" >"$log" 2>&1 || { cat "$log" && exit 1; }
		count=$((count + 1))
	done
done < <(go list -f '{{.ImportPath}} {{.Dir}}' "$@")
echo "$count fuzz targets passed"
