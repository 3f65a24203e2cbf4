# Every target makes .venv, installs what it needs into it once, and runs from there: nothing has to be
# activated. PYTHON is the interpreter that .venv is made with (3.11 or newer): python3.11 where there is
# one, else python3; `make PYTHON=/path/to/python test` takes another.

PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)

VENV_PYTHON := .venv/bin/python

# A shell's own paths must not reach into .venv; with no PATH at all, Python does not find itself.
unexport PYTHONHOME PYTHONPATH VIRTUAL_ENV
PATH ?= /usr/local/bin:/usr/bin:/bin
export PATH

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:  # two pips at once in one environment break it
.PHONY: help demo test lint docs bench clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-6s %s\n", $$1, $$2}' Makefile

demo: .venv/.installed-multiexit  ## train ResNet-56 by four methods on digits and compare them; runs/demo
	@.venv/bin/gradalign compare --epochs 10 --batch-size 64 --learning-rate 0.05 --out runs/demo

test: .venv/.installed-test  ## run the tests and doctests; ARGS="-k name" goes to pytest
	@echo "Running the tests ..."
	@$(VENV_PYTHON) -m pytest $(ARGS)

lint: .venv/.installed-dev  ## check style, formatting, types and the direction of imports
	@echo "Checking style, formatting, types and imports ..."
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m ruff format --check .
	@$(VENV_PYTHON) -m mypy
	@.venv/bin/lint-imports --no-logo

docs: .venv/.installed-dev  ## build docs/_build/html and run the examples in the documentation
	@echo "Building the documentation in docs/_build/html ..."
	@$(VENV_PYTHON) -m sphinx -q -W --keep-going -n -b html docs docs/_build/html
	@echo "Running the documentation's examples ..."
	@$(VENV_PYTHON) -m sphinx -q -W --keep-going -n -b doctest docs docs/_build/doctest

bench: .venv/.installed-bench  ## measure what a step costs, quickly
	@echo "Measuring the time of a step ..."
	@$(VENV_PYTHON) benchmarks/step_overhead.py --quick
	@echo "Measuring the memory of a step ..."
	@$(VENV_PYTHON) benchmarks/memory.py --quick
	@echo "Measuring the Gramian ..."
	@$(VENV_PYTHON) benchmarks/gramian.py --quick
	@echo "Measuring the time against K and P ..."
	@$(VENV_PYTHON) benchmarks/scaling.py --quick

clean:  ## remove .venv, caches and everything built; of runs/, only runs/demo
	@rm -rf .venv build dist docs/_build runs/demo
	@rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV_PYTHON):
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "gradalign needs Python 3.11 or newer, got '$(PYTHON)'; name one: make PYTHON=/path/to/python3.11" >&2; \
	  exit 1; }
	@echo "Making .venv with $(PYTHON) ..."
	@"$(PYTHON)" -m venv --clear .venv || { rm -rf .venv; exit 1; }

# One stamp for each set of extras. A set installs, and so stamps, the smaller ones too.
SETS_multiexit := multiexit
SETS_bench := multiexit bench
SETS_test := multiexit bench test
SETS_dev := multiexit bench test dev

.venv/.installed-multiexit .venv/.installed-bench .venv/.installed-test .venv/.installed-dev: \
.venv/.installed-%: $(VENV_PYTHON) pyproject.toml constraints.txt
	@echo "Installing gradalign[$*] into .venv (once; it can take some minutes) ..."
	@$(VENV_PYTHON) -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[$*]"
	@touch $(addprefix .venv/.installed-,$(SETS_$*))
