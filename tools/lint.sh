#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# Every check that is not a test. Runs all of them, then fails if one did. "make lint" calls it.
# shellcheck disable=SC2317,SC2086 # functions are called by name; $RUN is empty or several words
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

failed=()
check() { # name, command...
	local name=$1
	shift
	local start=$SECONDS
	if "$@"; then
		printf '  ok    %s (%d s)\n' "$name" $((SECONDS - start))
	else
		printf '  FAIL  %s\n' "$name"
		failed+=("$name")
	fi
}

formatted() {
	local out
	out=$(git ls-files -z '*.go' | xargs -0 -r gofmt -s -l) && [ -z "$out" ] && return
	echo "run gofmt -s -w on:" && echo "$out"
	return 1
}

# arm64 is built on every change, since only amd64 machines run the tests.
arm64() {
	GOARCH=arm64 CGO_ENABLED=0 go build ./... && GOARCH=arm64 CGO_ENABLED=0 go vet ./...
}

# An agent without Kubernetes must have nothing of it.
nokube() {
	go vet -tags nokube ./cmd/tunnel-agent || return 1
	! go list -deps -tags nokube ./cmd/tunnel-agent | grep k8s.io
}

# tools/release is a module of its own, so that what it needs (helm's packages, an image library) is nothing that the programs need.
tidy() {
	go mod tidy -diff && go -C tools/release mod tidy -diff
}

scripts() {
	if ! $RUN bash -c 'command -v shellcheck' >/dev/null; then
		echo "shellcheck is missing: make deps" && return 1
	fi
	{ git ls-files '*.sh' && echo .ci/run; } | xargs $RUN shellcheck
}

# The checked-in BPF objects are what their sources give, whatever else is changed in the work tree.
generated() {
	local before after
	before=$(snapshot) && $RUN go generate ./... && after=$(snapshot) || return 1
	diff <(echo "$before") <(echo "$after") && return
	echo "make generate changes these files: commit the result"
	return 1
}

snapshot() {
	git ls-files -z --cached --others --exclude-standard | xargs -0 sha256sum 2>/dev/null | sort -k 2
}

# Needs a copy of the Go vulnerability database, such as VULNDB=file:///srv/vulndb: a check that asks a network is not repeatable.
vulnerabilities() {
	if [ -z "${VULNDB:-}" ]; then
		echo "        (known vulnerabilities not checked: VULNDB names no database)"
		return 0
	fi
	go run golang.org/x/vuln/cmd/govulncheck@v1.1.4 -db "$VULNDB" ./...
}

check "gofmt -s" formatted
check "go.mod is tidy" tidy
check "go vet" go vet ./...
check "go build and vet for arm64" arm64
check "an agent without Kubernetes" nokube
check "import directions" go run ./tools/importcheck
check "headers and leftovers" go run ./tools/sourcecheck
check "shellcheck" scripts
check "generated files" generated
check "manifests of the chart" tools/manifests.sh check
check "golangci-lint" "$GOLANGCI" run --allow-parallel-runners
check "govulncheck" vulnerabilities

[ ${#failed[@]} -eq 0 ] && exit 0
echo "failed: ${failed[*]}" >&2
exit 1
