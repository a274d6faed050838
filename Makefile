# What one does with this project, a target each. `make help` lists them.
# Plain POSIX make and sh; PYTHON chooses the interpreter that .venv is made with.

PYTHON ?= python3
PORT ?= 5000
MINUTES ?= 10
SEED ?= 0
BIN = .venv/bin
STAMP = .venv/.installed
PYTEST_OPTIONS = --numprocesses 2 --dist loadscope

.PHONY: help setup demo studies studies-fast ui test test-all chaos coverage bench lint lock settings
.DEFAULT_GOAL := help

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## Make .venv with everything in it (other targets do this where needed)

# The stamp is newer than these files exactly when what they ask for is installed, and built.
$(STAMP): pyproject.toml constraints.txt syncbn/norm/native/*.cpp syncbn/norm/native/*.h syncbn/norm/native/kernels/*.cpp syncbn/norm/native/kernels/*.h
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit("Python 3.11 to 3.13 is needed, this is %d.%d; give another: make PYTHON=python3.12 ..." % v)'
	@start=$$(date +%s) && \
	  $(PYTHON) -m venv .venv && \
	  $(BIN)/python -m pip install --quiet --constraint constraints.txt uv && \
	  PYTHONDONTWRITEBYTECODE= $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --editable '.[dev]' --constraint constraints.txt && \
	  touch $@ && \
	  echo "set up .venv in $$(($$(date +%s) - start)) s"

demo: $(STAMP) ## Run the study `demo` on two ranks of this machine and print its table
	@start=$$(date +%s) && \
	  $(BIN)/python jobs/compare.py study=demo launcher.num_workers=2 && \
	  echo "study took $$(($$(date +%s) - start)) s; see it with: make ui, or open runs/demo/report.html"

studies: $(STAMP) ## Run all studies, 1.5 hours on 2 cores; goes on where it stopped (SYNCBN_DATA_ROOT=data)
	@$(BIN)/syncbn studies --tier full data.root="$${SYNCBN_DATA_ROOT:-data}"

studies-fast: $(STAMP) ## Run the fast form of the studies that have one, some minutes (SYNCBN_DATA_ROOT=data)
	@$(BIN)/syncbn studies --tier fast data.root="$${SYNCBN_DATA_ROOT:-data}"

ui: $(STAMP) ## Show runs, figures and reports in MLflow on 127.0.0.1 (PORT=5000)
	@$(BIN)/syncbn ui --port $(PORT)

test: $(STAMP) ## Run the tests that need no GPU and are not slow; every line of the layer that runs on a CPU is covered
	@$(BIN)/python tests/support/run_parts.py $(PYTEST_OPTIONS)

test-all: $(STAMP) ## Run all tests; those that need a GPU skip where there is none
	@$(BIN)/python -m pytest

chaos: $(STAMP) ## Let seeded faults happen to runs on each launcher, and print what came of them (MINUTES=10 SEED=0)
	@PYTHONPATH=tests/support $(BIN)/python tests/faults/chaos.py --minutes $(MINUTES) --seed $(SEED)

coverage: $(STAMP) ## Run the tests of `make test`, then list the lines of the whole package that they left out
	@$(BIN)/python -m pytest $(PYTEST_OPTIONS) -m "not gpu and not slow" --cov --cov-report=
	@$(BIN)/coverage report --skip-covered --show-missing

bench: $(STAMP) ## Measure the layer against its peers and the service, 15 minutes on 2 quiet cores; rewrites docs/performance.md
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --requirements pyproject.toml --extra bench --constraint constraints.txt || \
	  echo "the extra bench does not install: measuring without it"
	@$(BIN)/python -m benchmarks

settings: $(STAMP) ## Write docs/settings.md from the schema
	@$(BIN)/syncbn settings --page docs/settings.md

lint: $(STAMP) ## Check format, style, types and who imports what
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright
	@$(BIN)/lint-imports

lock: $(STAMP) ## Move .venv to the newest versions that pyproject.toml allows and pin them in constraints.txt
	@$(BIN)/uv pip install --quiet --upgrade --python $(BIN)/python --editable '.[dev]' uv
	@{ sed '/^[^#]/,$$d' constraints.txt && \
	   $(BIN)/uv pip freeze --exclude-editable --python $(BIN)/python | grep -v '^pip=='; } > constraints.new
	@mv constraints.new constraints.txt
	@touch $(STAMP)
