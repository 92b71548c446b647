# The commands of the project. They share one virtual environment with the tested versions, made when it is needed.

PYTHON ?= python3
DATA ?= ../shared/data
VENV := .venv
BIN := $(VENV)/bin
SOURCES := benchmarks nio_hf recipes tests
VERSIONS := $(shell cat constraints.txt pyproject.toml setup.cfg | cksum | cut -d ' ' -f 1)
RECIPES := $(VENV)/.recipes-$(VERSIONS)
STAMP := $(VENV)/.dev-$(VERSIONS)

.PHONY: quickstart test test-all test-floors test-latest study bench docs install lint types clean

quickstart: $(RECIPES)  ## NIO and a training of a small ViT on real images, on the CPU
	$(BIN)/nio-hf train vit-tiny/digits/nio

test: lint types docs  ## what must pass before a change is shared
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow"

test-all: lint types docs  ## the same, and what takes long
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

test-floors: EXTRA := test
test-latest: EXTRA := dev
test-floors test-latest: test-%:  ## the tests with the oldest versions that are allowed, and with the newest
	$(PYTHON) -m venv --clear .venv-$*
	$(PYTHON) .ci/versions.py $* > .venv-$*/constraints.txt
	.venv-$*/bin/python -m pip install --quiet --constraint .venv-$*/constraints.txt --editable '.[$(EXTRA)]'
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -n auto -m "not slow" -W default

study: $(STAMP)  ## the trainings of benchmarks/warmup_free, days; it goes on where it was, a second one shares the work
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.warmup_free.study $(DATA)
	$(BIN)/python -m benchmarks.warmup_free.tables

bench: $(STAMP)  ## the cost of NIO; hours
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.cost --sections counts
	$(BIN)/python -m benchmarks.cost --sections seconds errors

docs: $(STAMP)  ## the documentation, in docs/_build; broken links are errors
	$(BIN)/sphinx-build -q -W --keep-going docs docs/_build

lint: $(STAMP)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/lint-imports

types: $(STAMP)
	$(BIN)/mypy

install: $(STAMP)

# Stamps are written last, so that an installation that was interrupted is made anew.
$(STAMP): $(RECIPES)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@# It wants torchvision, which not every build of torch has and which its models do not need.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps timm
	@touch $@

$(RECIPES):
	@command -v $(PYTHON) > /dev/null || { \
	  echo "Python is missing. On Debian and Ubuntu: sudo apt install python3 python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is older than 3.11. Name a newer one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { \
	  echo "The module venv is missing. On Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[recipes]'
	@touch $@

clean:
	rm -rf .venv* build dist *.egg-info outputs docs/_build docs/_generated
