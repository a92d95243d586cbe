# Every entry point of the project. `make help` lists them; CI calls the same targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
NATIVE_SOURCES := $(shell find csrc -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.inc' \) 2>/dev/null)
FORMATTED_SOURCES := $(filter %.cpp %.h,$(NATIVE_SOURCES))

# A stamp is touched when its step has succeeded, so that running a target again costs nothing.
VENV_STAMP := $(VENV)/.stamp-venv
DEPS_STAMP := $(VENV)/.stamp-deps
NATIVE_STAMP := $(VENV)/.stamp-native
PEERS_STAMP := $(VENV)/.stamp-peers
ATTRIBUTION_STAMP := $(VENV)/.stamp-attribution

.DEFAULT_GOAL := help
.PHONY: help dev build demo test check lint type format docs bench-smoke bench-peers bench-attribution clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1|/' | \
		while IFS='|' read -r name text; do printf '  make %-17s %s\n' "$$name" "$$text"; done

$(VENV_STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "gradkern needs Python >= 3.10, got: $$($(PYTHON) --version); try: make dev PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch comes first: the native library is built against it, without pip's build isolation.
$(DEPS_STAMP): $(VENV_STAMP) constraints.txt pyproject.toml
	$(PIP) install --quiet -c constraints.txt torch setuptools wheel ninja
	GRADKERN_NATIVE=0 $(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

$(NATIVE_STAMP): $(DEPS_STAMP) setup.py $(NATIVE_SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install --quiet --no-deps --no-build-isolation -e .
	@test -f gradkern/_C.so || echo "gradkern: no native library was built (is there a C++ compiler?); pure Python, slower"
	@touch $@

dev: $(NATIVE_STAMP)  ## create .venv with pinned dependencies and gradkern in editable form

build: $(NATIVE_STAMP)  ## build the native library again if its sources changed

demo: dev  ## train a byte-level GPT on the standard library; writes out/report.html
	$(BIN)/python examples/quickstart.py --out out

test: check  ## checks and the whole test suite
	$(BIN)/python -m pytest

check: lint type  ## every static check

lint: dev  ## ruff, clang-format and the layer contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(if $(FORMATTED_SOURCES),$(BIN)/clang-format --dry-run --Werror $(FORMATTED_SOURCES))

type: dev  ## mypy, strict
	$(BIN)/mypy

format: dev  ## rewrite Python and C++ sources in the project's format
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(if $(FORMATTED_SOURCES),$(BIN)/clang-format -i $(FORMATTED_SOURCES))

docs: dev  ## build the documentation into docs/_build/html; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

bench-smoke: dev  ## run every benchmark suite with the fewest rounds
	$(BIN)/python -m bench cycle --rounds 7 --json out/bench-cycle.json
	$(BIN)/python -m bench step --rounds 7 --json out/bench-step.json

# A folder of its own, without dependencies: peers change neither torch nor what the tests import (bench/peers.py).
$(PEERS_STAMP): $(DEPS_STAMP) bench/requirements.txt
	rm -rf $(VENV)/peers
	$(PIP) install --quiet --no-deps --target $(VENV)/peers -c constraints.txt -r bench/requirements.txt
	@touch $@

bench-peers: dev $(PEERS_STAMP)  ## install what benchmarks compare with and say what runs; compiles for minutes
	$(BIN)/python -m bench.peers

$(ATTRIBUTION_STAMP): $(DEPS_STAMP) $(wildcard bench/attribution_peers/requirements/*.txt)
	$(BIN)/python -m bench.attribution_peers.install && touch $@ || true

bench-attribution: dev $(ATTRIBUTION_STAMP)  ## install the estimators of influence compared with, and say what runs
	$(BIN)/python -m bench.attribution

clean:  ## remove what was built; keeps .venv
	rm -rf build dist out docs/_build gradkern.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	rm -f gradkern/*.so $(NATIVE_STAMP)
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
