# `make help` lists what there is. Everything runs in .venv, which is made on first use.
PYTHON ?= python3.11
SEED ?= 0
BENCH ?= quick
VENV := .venv
READY := $(VENV)/.installed
# Python 3.11's own pip takes twice as long to choose, and compiles 20,000 modules on one core.
PIP := $(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help install demo test test-long bench lint format clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(READY)  ## make .venv with the pinned dependencies (about 7 GB)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) --no-compile --editable '.[dev]'
	$(VENV)/bin/python -m compileall -qq -j 0 $(VENV)/lib || true  # some packages hold templates that are not Python
	touch $@

demo: $(READY)  ## run the whole pipeline on a synthetic street world (SEED=0) into demo-output/
	$(VENV)/bin/clip2scene run jobs/demo.yaml seed=$(SEED)

test: $(READY)  ## run every test that this machine can run, but for the long ones
	$(VENV)/bin/python -m pytest -n logical --dist loadfile --no-loadscope-reorder -m "not long"

test-long: $(READY)  ## run the tests that kill clusters, servers and workers
	$(VENV)/bin/python -m pytest -m long

bench: $(READY)  ## one table of ratios against the best alternatives (BENCH=full also writes BENCHMARKS.md)
	$(VENV)/bin/python tests/benchmarks/run.py --mode $(BENCH) --json build/bench.json

lint: $(READY)  ## style and types
	$(VENV)/bin/ruff check platform tests cluster
	$(VENV)/bin/ruff format --check platform tests cluster
	$(VENV)/bin/mypy

format: $(READY)  ## rewrite the code in the project's style
	$(VENV)/bin/ruff check --fix platform tests cluster
	$(VENV)/bin/ruff format platform tests cluster

clean:  ## remove what demo and the tools wrote (not .venv)
	rm -rf demo-output streetworld-output tables-output cluster-output smoke-test clip2scene-storage .pytest_cache .mypy_cache .ruff_cache build
