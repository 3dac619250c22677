# Two commands are the whole set-up on a machine with Python 3.11 or newer: `make serve` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
# For `make serve ARGS="--port 9000"`, `make test ARGS="-k routing"` and the like.
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install install-dev serve test test-gpu test-containers check format bench demo clean

help:
	@echo "make serve   install, prune and serve the demo, print a curl line that works"
	@echo "make test    install the dev extra, run the tests"
	@echo "make test-gpu  the kernels' tests, on the GPU there is: bfloat16, CUDA graphs"
	@echo "make test-containers   build the image and bring compose up, where Docker runs"
	@echo "make check   ruff format --check, ruff check, mypy --strict"
	@echo "make format  let ruff rewrite the sources"
	@echo "make bench   side-by-side measurements, see benchmarks/"
	@echo "make demo    train and prune the demo models again from the vendored rows"
	@echo "make clean   remove the virtual environment and all caches"

# The stamps are newer than what they were installed from, so that a second call installs nothing.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.runtime: $(VENV)/.created pyproject.toml constraints.txt
	$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $@

install: $(VENV)/.runtime

install-dev: $(VENV)/.dev

serve: $(VENV)/.runtime
	@exec $(BIN)/secateur serve $(ARGS)

demo: $(VENV)/.runtime
	$(BIN)/secateur demo build $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(ARGS)

# Installs nothing, since a GPU machine has its own build of torch: with Python there, `make test-gpu BIN=/usr/bin`.
test-gpu:
	@$(BIN)/python -c 'import torch, triton; assert torch.cuda.is_available(), "torch sees no CUDA device"'
	$(BIN)/python -m pytest tests/kernels $(ARGS)

# CONTAINER_RUN may name a program that brings an engine up for the command it is given; empty, Docker is there already.
# PYTHON in the environment is the image's, such as 3.12, and not what makes the virtual environment.
test-containers:
	@$(MAKE) --no-print-directory PYTHON=python3 install-dev
	$(CONTAINER_RUN) bash docker/check.sh

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.baselines
	$(BIN)/python -m benchmarks.forward $(ARGS)
	$(BIN)/python -m benchmarks.overload demo/secateur.yaml
	$(BIN)/python -m benchmarks.kernels --quick

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
