# `make` or `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch
OLDEST_TORCH = $(shell sed -nE 's/^ *"torch>=([0-9.]+)",/torch==\1.*/p' pyproject.toml)

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-full demo-finetuning test test-all test-oldest lint format bench gpu-prepare gpu-check

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: $(VENV)/.installed ## create .venv and install the package with its test dependencies

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	@echo 'Installing the package into $(VENV): two minutes and 6 GB, mostly torch.'
	$(BIN)/pip install --quiet '$(TORCH)' --editable '.[dev,sweep,compare,hf,slurm,8bit,optimizers,adapters]'
	@touch $@

demo: setup ## train on 291 drawings, sample, evaluate: outputs/demo/index.html (15 minutes, 2 CPU cores)
	$(BIN)/python -m scripts.demo --experiment demo

demo-full: setup ## the same on all 1,659 drawings, with larger networks
	$(BIN)/python -m scripts.demo --experiment openmoji

demo-finetuning: setup ## after demo: tune its model on 20 line drawings, and on 20 vehicles
	$(BIN)/python -m scripts.demo_finetuning

# Each process computes with one thread: two that use all cores wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test: setup ## the fast tests
	$(PYTEST)

test-all: setup ## every test
	$(PYTEST) -m ''

test-oldest: ## the fast tests with the oldest supported torch, installed in .venv-oldest (6 GB)
	$(MAKE) test VENV=.venv-oldest TORCH='$(OLDEST_TORCH)'

lint: setup ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## fix the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## benchmark inference against diffusers, and training: benchmarks/
	$(BIN)/python scripts/bench.py

gpu-prepare: setup ## fill .gpu/ with what a GPU machine without a network needs (5 minutes)
	$(BIN)/python -m scripts.gpu_check.prepare

# Without setup: the GPU machine has no network. PYTHON is its Python with torch.
gpu-check: ## check speed, memory and parity on one GPU (10 minutes): benchmarks/
	$(PYTHON) -m scripts.gpu_check
