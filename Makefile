# groundup: `make demo` trains a language model on this machine, `make test` checks everything. Both set up what they need in .venv/.
#
#   make demo                        the default text (the Python standard library on your machine), 5 minutes
#   make demo DATA=path/to/text      your own text: a file, a folder, a named source or hf:owner/name
#   make demo MINUTES=2 OUT=runs/x   more or less time, another run folder
#   make demo ARGS="--depth 4"       any other flag of `groundup demo`

PYTHON ?= python3
VENV   := .venv
PIP    := $(VENV)/bin/python -m pip --disable-pip-version-check
DATA   ?=
MINUTES ?=
OUT    ?=
ARGS   ?=
# Tests share the cores: one process each, one thread in each (tests/conftest.py).
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)

.DEFAULT_GOAL := help
.PHONY: help setup setup-test setup-bench demo test lint types floors pytest format bench clean

help:
	@sed -n '1,6s/^# \{0,1\}//p' Makefile
	@echo "  make setup | test | lint | types | floors | format | bench | clean"

# What is missing on a bare machine is said in one line, before anything else can fail in twenty.
.PHONY: python
python:
	@command -v $(PYTHON) >/dev/null 2>&1 || { echo "groundup: $(PYTHON) is missing. Install it: apt-get install python3 python3-venv (or set PYTHON=/path/to/python3.11)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "groundup: $$($(PYTHON) --version) is too old, 3.11 or newer is needed. Set PYTHON=/path/to/a/newer/python3"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "groundup: this Python has no venv. Install it: apt-get install python3-venv"; exit 1; }

# torch is asked for by its exact version before anything else can pull another build of it.
$(VENV)/.core: pyproject.toml constraints.txt | python
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV)/ (once; a minute or two) …"
	@$(PIP) install --quiet --constraint constraints.txt $$(grep '^torch==' constraints.txt)
	@$(PIP) install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.core
	@echo "Installing what the tests need …"
	@$(PIP) install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

$(VENV)/.bench: $(VENV)/.test
	@echo "Installing what the benchmarks compare with …"
	@$(PIP) install --quiet --constraint constraints.txt --editable '.[bench]'
	@touch $@

setup: $(VENV)/.core

setup-test: $(VENV)/.test

setup-bench: $(VENV)/.bench

demo: setup
	@$(VENV)/bin/groundup demo $(if $(DATA),--data "$(DATA)") $(if $(MINUTES),--minutes $(MINUTES)) $(if $(OUT),--out "$(OUT)") $(ARGS)

test: setup-test lint types floors pytest

lint: setup-test
	@$(VENV)/bin/ruff check --no-cache .
	@$(VENV)/bin/ruff format --check .

types: setup-test
	@$(VENV)/bin/mypy

floors: setup-test
	@$(VENV)/bin/lint-imports

pytest: setup-test
	@$(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

format: setup-test
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

# Each keeps its result in benchmarks/results/ and writes docs/benchmarks.md again; together about a day.
bench: setup-bench
	@$(VENV)/bin/python benchmarks/first_run.py
	@$(VENV)/bin/python benchmarks/tokenizer.py $(ARGS)
	@$(VENV)/bin/python benchmarks/attention.py $(ARGS)
	@$(VENV)/bin/python benchmarks/attention_study.py $(ARGS)
	@$(VENV)/bin/python benchmarks/loader.py $(ARGS)
	@$(VENV)/bin/python benchmarks/checkpoint.py $(ARGS)
	@$(VENV)/bin/python benchmarks/time_to_loss.py $(ARGS)
	@$(VENV)/bin/python benchmarks/train.py $(ARGS)
	@$(VENV)/bin/python benchmarks/decode.py $(ARGS)
	@$(VENV)/bin/python benchmarks/finetune.py $(ARGS)

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .import_linter_cache
