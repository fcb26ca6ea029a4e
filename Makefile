# make demo   a tiny Gemma learns new facts, here and now: no GPU, no account, no network after the set-up
# make test   lint, types and tests
# make bench  speed and memory, ours against plain loops
#
# Each of them sets up everything it needs in .venv, once. See scripts/set_up.sh for VENV, PYTHON, CUDA and TORCH_INDEX.

VENV ?= .venv
PYTHON ?=
CUDA ?=
TORCH_INDEX ?=
RECIPE ?= recipes/quickstart.yaml
export VENV PYTHON CUDA TORCH_INDEX

READY := $(VENV)/.ready
BIN := $(VENV)/bin
# A process a core and one thread each: the models of the tests are too small for more, and waiting threads spin.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

.PHONY: tree help demo test test-quick lint format bench set-up clean force
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile | head -4

set-up: $(READY)

# A virtual environment knows its own place: one that was copied or moved with its checkout is made anew.
ifneq ($(shell head -n 1 $(READY) 2>/dev/null),$(CURDIR))
$(READY): force
endif
$(READY): pyproject.toml scripts/set_up.sh
	@scripts/set_up.sh

demo: $(READY)
	@BIN=$(BIN) RECIPE=$(RECIPE) scripts/demo.sh

lint: $(READY)
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "not formatted; run: make format"; exit 1; }
	@$(BIN)/mypy

format: $(READY)
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format .

# The rooms and files in docs/architecture.md.
tree: $(READY)
	@$(BIN)/python scripts/tree.py

# pytest comes last, so that its summary is the last line.
test: lint
	@$(PYTEST)

test-quick: $(READY)
	@$(PYTEST) -m "not slow"

bench: $(READY)
	@$(BIN)/python benchmarks/training.py

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis unsloth_compiled_cache dist
