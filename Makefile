# SPDX-License-Identifier: Apache-2.0
#
# A Debian 12 machine with Go and make is enough: "deps" unpacks the rest into a cache folder.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

BIN ?= bin

# PACKAGES=no uses the machine's own programs instead of the unpacked ones.
PACKAGES ?= yes
ifeq ($(PACKAGES),no)
RUN  :=
else
RUN  := tools/packages.sh run
endif

# What "make test", "make fuzz" and "make test-kernels" can be narrowed to.
PKG      ?= ./...
TEST     ?=
KERNELS  ?= 5.10 6.1 6.12
FUZZTIME ?= 5s

# What "make bench" can be narrowed to: SUITE=datapath, hook, longlink or agents. BENCH=-quick shows that it works and writes nothing.
SUITE ?=
BENCH ?=

# What "make image" calls it, and "make chart".
VERSION := $(shell sed -n 's/^appVersion: *//p' deploy/chart/Chart.yaml)
IMAGE ?= ghcr.io/edge-tunnel/edge-tunnel:$(VERSION)

CACHE    := $(or $(EDGE_TUNNEL_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/edge-tunnel)
GOLANGCI := $(CACHE)/golangci-lint-$(shell sed -n 's|.*golangci-lint/v2 \(v[^ ]*\).*|\1|p' tools/lint/go.mod)

.PHONY: help deps build generate kubernetes lint test e2e test-kernels fuzz bench demo cluster cluster-down image chart manifests clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | while IFS='|' read -r name text; do printf '  make %-12s %s\n' "$$name" "$$text"; done

deps: ## get what is missing: Go modules, and Debian packages unpacked into a cache folder
ifneq ($(PACKAGES),no)
	@tools/packages.sh install
endif
	@go mod download

build: ## static programs into bin/
	@mkdir -p $(BIN)
	@for main in cmd/tunnel*/; do \
		[ -d "$$main" ] || continue; \
		CGO_ENABLED=0 go build -buildvcs=auto -trimpath -ldflags '-s -w' -o $(BIN)/ "./$$main"; \
	done

generate: deps ## compile bpf/ and regenerate the Go code that embeds it
	@$(RUN) go generate ./...

lint: deps $(GOLANGCI) ## format, vet, linters, shell scripts, import directions, generated files
	@GOLANGCI=$(GOLANGCI) RUN='$(RUN)' tools/lint.sh

$(GOLANGCI): tools/lint/go.mod
	@echo "building golangci-lint (once)"
	@mkdir -p $(CACHE)
	@go build -C tools/lint -o $@ github.com/golangci/golangci-lint/v2/cmd/golangci-lint

kubernetes: ## the Kubernetes programs that tests need, into the cache folder (once, five minutes)
	@go run ./tools/cluster build

# Whoever tests one package waits for that only if a test of it does: tests build what they miss as well.
test: deps build $(if $(filter ./...,$(PKG)),kubernetes) ## everything, race detector on; needs root
	@$(if $(filter ./...,$(PKG)),go test -C tools/release -count=1 ./...)
	@$(RUN) tools/test.sh $(PKG) $(if $(TEST),-run '$(TEST)')

e2e: deps build kubernetes ## the tests on real Kubernetes only; needs root
	@$(RUN) tools/test.sh ./test/k8s $(if $(TEST),-run '$(TEST)')

test-kernels: deps build ## the BPF tests and the daemons on older kernels (KERNELS="5.10 6.1 6.12"), emulated
	@go build -o $(BIN)/ ./tools/vmtest
	@exec $(RUN) $(BIN)/vmtest -bin $(BIN) -cache $(CACHE) -kernels '$(KERNELS)' $(if $(TEST),-run '$(TEST)')

fuzz: deps ## every fuzz target for FUZZTIME (5s)
	@$(RUN) tools/fuzz.sh $(FUZZTIME) $(PKG)

bench: deps build ## benchmarks, written to docs/PERFORMANCE.md; needs root and a quiet machine
	@go build -o $(BIN)/ ./test/bench
	@$(RUN) $(BIN)/bench -bin $(BIN) $(if $(SUITE),-suite $(SUITE)) $(BENCH)

demo: deps build ## the 60-second demo: a cloud node, a pod, a NAT router and an edge node; needs root
	@go build -o $(BIN)/ ./tools/demo
	@exec $(RUN) $(BIN)/demo -bin $(BIN)

cluster: deps ## a Kubernetes of two cloud and two edge nodes, which stays; needs root
	@go build -o $(BIN)/ ./tools/cluster
	@$(BIN)/cluster up

cluster-down: ## remove it, with every trace
	@go build -o $(BIN)/ ./tools/cluster
	@$(BIN)/cluster down

image: ## the container image for amd64 and arm64, dist/edge-tunnel.tar (IMAGE=REGISTRY/NAME:TAG)
	@rm -rf dist/image
	@for arch in amd64 arm64; do GOARCH=$$arch $(MAKE) --no-print-directory build BIN=dist/image/$$arch; done
	@go run -C tools/release ./image -ref $(IMAGE) -version $(lastword $(subst :, ,$(IMAGE))) -out $(CURDIR)/dist/edge-tunnel.tar \
		amd64=$(CURDIR)/dist/image/amd64 arm64=$(CURDIR)/dist/image/arm64
	@rm -rf dist/image && ls -sh dist/edge-tunnel.tar

chart: ## the chart as helm installs it, dist/edge-tunnel-VERSION.tgz
	@mkdir -p dist
	@tar --create --gzip --file dist/edge-tunnel-$(VERSION).tgz --directory deploy --transform 's,^chart,edge-tunnel,' \
		--sort name --mtime @0 --owner 0 --group 0 --numeric-owner chart

manifests: ## deploy/manifests, from the chart
	@tools/manifests.sh

clean: ## remove what was built here (the cache folder stays)
	@rm -rf $(BIN) dist
