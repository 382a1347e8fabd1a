#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# go test with the race detector on PACKAGES AND FLAGS... ("make test" calls it). Ends with the packages' ok lines and
# the counts; a skipped test is a failure when CI is set, since a test that is skipped there is a test that nobody runs.
set -euo pipefail
cd "$(dirname "$0")/.."

forbid=()
[ -z "${CI:-}" ] || forbid=(-forbid-skips)

reporter=$(mktemp)
trap 'rm -f "$reporter"' EXIT
go build -o "$reporter" ./tools/testreport

# Two packages at a time: the end-to-end tests start many processes of their own.
go test -json -race -p 2 -shuffle=on -count=1 -timeout 18m "$@" | "$reporter" "${forbid[@]}"
