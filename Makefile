# Each target sets up what it needs. PYTHON and TORCH may be set:
#   make install PYTHON=python3.12 TORCH='torch>=2.11'   (a CUDA machine takes any torch from 2.11)
PYTHON ?= python3
# A plain `torch` pulls gigabytes of CUDA libraries; this release has a CPU build.
TORCH ?= torch==2.13.0
PIP_FLAGS ?= --quiet --disable-pip-version-check
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install demo test lint types bench claims claims-more faults fuzz audit lock docs clean

install: $(STAMP)

$(STAMP): pyproject.toml
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install $(PIP_FLAGS) '$(TORCH)'
	$(BIN)/pip install $(PIP_FLAGS) -e '.[dev]'
	touch $@

demo: install
	$(BIN)/prefloop demo

test: install lint types
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python tools/make_method_docs.py --check

types: install
	$(BIN)/mypy

bench: install
	$(BIN)/python -m benchmarks

claims: install
	$(BIN)/python -m benchmarks.claims

claims-more: install
	$(BIN)/python -m benchmarks.claims --more

faults: install
	$(BIN)/python -m benchmarks.reliability

# Hostile input for every reader, at least 100,000; writes docs/hostile_input.md. About a quarter of an hour on one core.
fuzz: install
	$(BIN)/python -m benchmarks.reliability.fuzz

# Known vulnerabilities of what is installed. Asks a database on the network, and says so if it cannot.
audit: install
	$(BIN)/python tools/audit.py

# Versions and hashes of everything that `make install` takes, for a repeatable environment.
lock: install
	$(BIN)/python tools/lock.py

docs: install
	$(BIN)/python tools/make_method_docs.py

clean:
	rm -rf .venv build .pytest_cache .mypy_cache .ruff_cache
