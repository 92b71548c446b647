# The commands of the project. They share one virtual environment with the tested versions, made when it is needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := benchmarks nio_hf recipes tests
STAMP := $(VENV)/.installed-$(shell cat constraints.txt pyproject.toml setup.cfg | cksum | cut -d ' ' -f 1)

.PHONY: quickstart test test-all bench install lint types clean

quickstart: $(STAMP)  ## NIO and a training of a small ViT on real images, on the CPU
	$(BIN)/nio-hf train vit-tiny/digits/nio

test: lint types  ## what must pass before a change is shared
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow"

test-all: lint types  ## the same, and what takes long
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

bench: $(STAMP)  ## the cost of NIO; hours
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.cost --sections counts
	$(BIN)/python -m benchmarks.cost --sections seconds errors

lint: $(STAMP)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/lint-imports

types: $(STAMP)
	$(BIN)/mypy

install: $(STAMP)

# The stamp is written last, so that an installation that was interrupted is made anew.
$(STAMP):
	@command -v $(PYTHON) > /dev/null || { \
	  echo "Python is missing. On Debian and Ubuntu: sudo apt install python3 python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is older than 3.11. Name a newer one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { \
	  echo "The module venv is missing. On Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info outputs
