# Each target uses the active virtual environment, or makes its own in .venv.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: install quickstart test test-slow lint format docs clean

ifdef VIRTUAL_ENV
VENV := $(VIRTUAL_ENV)
else
VENV := .venv
endif
PY := $(VENV)/bin/python
# Those that this process may use, where pytest-xdist by itself takes all physical ones of the machine.
CORES := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
STAMP := $(VENV)/.rotpruner-installed

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(PY) || python3 -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: $(STAMP)
	$(PY) -m experiments fit -c experiments/configs/quickstart.yaml

test: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow" --numprocesses $(CORES) --dist worksteal

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -m slow --numprocesses $(CORES) --dist worksteal

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --site-dir site

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache dist site
