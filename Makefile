# make train, make test; `make help` lists the rest.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
# Settings for train.py, as in: make train ARGS="optim.steps=20 name=short"
ARGS ?=
# Options for pip, as in: make train PIP_ARGS="--index-url URL" for another source of wheels
PIP_ARGS ?=
# Processes that share the CPU tests, each with its own core and about 4 GB
WORKERS ?= 2
# The Hopper kernels are compiled with the pinned Triton and with this one: Gluon changes from version to version.
NEWEST_TRITON := 3.9.0

.PHONY: help train test models check format gpu docs clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */\1	/' | expand -t 10

# Tests need lm-eval's interfaces alone. Of its 35 dependencies, transformers would import scikit-learn in every process.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "$(PYTHON) is older than Python 3.11; name another: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) \
	    -c constraints.txt -e '.[train,dev]'
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt --no-deps lm-eval
	@touch $@

train: .venv/installed  ## train the demo on every GPU, or on two CPU ranks: 4 minutes on two cores
	@$(BIN)/python launch/local.py $(ARGS)

.venv/triton-$(NEWEST_TRITON): .venv/installed
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) --no-deps --no-compile \
	    --target $@ triton==$(NEWEST_TRITON)
	@touch $@

test: .venv/installed .venv/triton-$(NEWEST_TRITON)  ## run the CPU test suite: 7 to 9 minutes on two cores
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

models: .venv/installed  ## prove every model family against its own attention and write docs/models.md: 5 minutes
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.models.sweep $(ARGS)

gpu: .venv/installed  ## run the tests that need a GPU: 15 minutes on an H100
	@$(BIN)/python -m pytest -m gpu $(ARGS)

check: .venv/installed  ## what CI checks before the tests: style, types, docstrings, prose, links: 1 minute
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy ringflash train.py launch benchmarks
	$(BIN)/interrogate -q ringflash train.py launch benchmarks
	$(BIN)/python -m tests.prose
	$(BIN)/python -m pytest tests/test_docs.py tests/test_prose.py -k "links or readme_has or every_path or prose"

format: .venv/installed  ## format the code and apply the linter's fixes
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

.venv/docs: .venv/installed
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[docs]'
	@touch $@

docs: .venv/docs  ## build the documentation with its API pages in site/: seconds, after installing mkdocs
	@$(BIN)/mkdocs build --strict --quiet --site-dir site

clean:  ## remove the environment, caches and site/; runs stay
	rm -rf .venv site .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
