# Needs make and Python 3.10 or newer; everything else is installed into $(VENV) at the tested versions.
#   make PYTHON=/path/to/python3.12 test     another interpreter for a new environment
#   make ARGS="--overwrite" quickstart       arguments for the program
#   make WORKERS=8 test                      on more cores

VENV    ?= .venv
THREADS ?= 2
WORKERS ?= 2
ARGS    ?=
# The first interpreter that really runs and is new enough; looked for only when an environment is made.
PYTHON  ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3.10 python3,$(if $(shell \
             $(p) -c 'import sys; print("ok" if sys.version_info >= (3, 10) else "")' 2>/dev/null),$(p))))

PY      := $(VENV)/bin/python
PIP     := $(PY) -m pip install --disable-pip-version-check --progress-bar on -c constraints.txt
THREADED := OMP_NUM_THREADS=$(THREADS) MKL_NUM_THREADS=$(THREADS)
# Files of tests go to so many processes of one thread each; a file stays in one, where its fixtures are shared.
PYTEST  := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses=$(WORKERS) --dist=loadfile
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1
BASE    := $(VENV)/.installed
DEV     := $(VENV)/.installed-dev

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-all test-gpu check docs bench clean

help:            ## list the targets
	@sed -n 's/^\([a-z-]*\): *[^#]*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

quickstart: $(BASE)    ## train, align and measure a tiny model (at most 10 minutes on two cores)
	@$(VENV)/bin/lightning-rlhf quickstart $(ARGS)

test: check docs    ## what CI runs: check, the docs with warnings as errors, all tests but the slow ones
	@echo "==> pytest"
	@$(PYTEST) --durations=15 -m "not slow" $(ARGS)

test-all: check docs    ## the same with the slow tests: whole epochs on the real data
	@echo "==> pytest"
	@$(PYTEST) --durations=15 $(ARGS)

test-gpu: $(DEV)    ## only the tests that need a CUDA device
	@$(THREADED) $(PY) -m pytest -m gpu $(ARGS)

check: $(DEV)    ## ruff (lint and format) and mypy
	@echo "==> ruff"
	@$(PY) -m ruff check --quiet .
	@$(PY) -m ruff format --check --quiet --diff .
	@echo "==> mypy"
	@$(PY) -m mypy

docs: $(DEV)    ## build docs/_build/html, warnings as errors
	@echo "==> sphinx"
	@$(OFFLINE) $(PY) -m sphinx -E -W --keep-going -q -b html docs docs/_build/html

bench: $(DEV)    ## speed and memory beside TRL
	@$(THREADED) $(PY) -m tests.benchmarks $(ARGS)

clean:           ## remove what builds and tests leave, but neither the environment nor your runs
	rm -rf build dist *.egg-info docs/_build .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(PY):
	@test -n "$(PYTHON)" || { echo "Python 3.10 or newer is needed; name one with PYTHON=…" >&2; exit 1; }
	@echo "==> making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)

# An environment made for development holds everything that the base needs, so it counts as both.
$(BASE): pyproject.toml constraints.txt | $(PY)
	@echo "==> installing lightning-rlhf (the first time a few minutes)"
	@$(PIP) -e .
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(PY)
	@echo "==> installing lightning-rlhf with its test and docs extras (the first time a few minutes)"
	@$(PIP) -e '.[test,docs]'
	@touch $(BASE) $@
