# Everything runs in its own virtual environment, .venv, which the first target makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# One thread per process: two threads in each of two processes on two cores are far slower.
export OMP_NUM_THREADS ?= 1
# Nothing calls home, and nothing is fetched while it runs.
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1
export DO_NOT_TRACK ?= 1

.DEFAULT_GOAL := help
.PHONY: help install demo test lint bench fuzz clean

help:  ## Show this help
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */  make \1\t/' | expand -t 18

install: $(READY)  ## Make .venv with fedveil, its development tools and the demo's model and data

$(READY): pyproject.toml constraints.txt requirements-demo.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fedveil needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-demo.txt
	touch $(READY)

demo: $(READY)  ## Fine-tune a text classifier on ten clients' documents, four schemes side by side
	$(BIN)/fedveil demo --out runs/demo

test: $(READY)  ## Run the test suite
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

lint: $(READY)  ## Check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Without constraints: pfl-research wants an older attrs. What cannot be installed is left out.
bench: $(READY)  ## Measure speed, bytes and memory as ratios to a plain copy, beside competitors
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]' || \
		echo 'Competitors could not be installed: they are skipped.'
	$(BIN)/python benchmarks/run.py --out runs/bench

# Each of the two programs runs for so many seconds; what ends one is in runs/fuzz/.
SECONDS ?= 300
fuzz: $(READY)  ## Fuzz what reads strangers' bytes, SECONDS=300 for each of two programs
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[fuzz]'
	mkdir -p runs/fuzz/read runs/fuzz/receive
	$(BIN)/python fuzz/wire.py -max_total_time=$(SECONDS) -artifact_prefix=runs/fuzz/read- \
		runs/fuzz/read tests/fuzz/corpus/read
	$(BIN)/python fuzz/rounds.py -max_total_time=$(SECONDS) -artifact_prefix=runs/fuzz/receive- \
		runs/fuzz/receive tests/fuzz/corpus/receive

clean:  ## Remove the virtual environment, caches and run folders
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache .hypothesis
