# Two commands for a fresh machine with Python 3.11+ and make:
#   make demo   compare five published embedding designs on real text and open nothing: it prints
#               the verdict and where the report is
#   make test   the whole test suite
# Everything they do is a plain command; see the README for the same without make.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test check lint types contracts docs wheel bench ledger clean

demo: $(VENV)/.core
	$(BIN)/bakeoff run

test: $(VENV)/.dev
	$(BIN)/bakeoff pull smollm2-135m all-minilm-l6-v2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

check: test lint types contracts docs wheel

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

contracts: $(VENV)/.dev
	$(BIN)/lint-imports

docs: $(VENV)/.dev
	$(BIN)/python docs/make_ledger.py --check
	$(BIN)/mkdocs build --strict --quiet

wheel: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build --wheel --outdir dist . > /dev/null
	$(PYTHON) -m venv --clear build/wheel-venv
	build/wheel-venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	cd build && wheel-venv/bin/bakeoff --version && wheel-venv/bin/bakeoff methods

bench: $(VENV)/.dev
	for script in benchmarks/[a-z]*.py; do $(BIN)/python $$script; done

ledger: $(VENV)/.dev
	$(BIN)/python docs/make_ledger.py

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is %d.%d" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e .
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[dev]"
	touch $@ $(VENV)/.core

clean:
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
