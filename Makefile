.PHONY: demo test lint bench bench-full

PYTHON ?= python3
# Processes that run tests; the fixtures of a file are made in one of them.
WORKERS ?= 2
BIN := .venv/bin
export TF_CPP_MIN_LOG_LEVEL ?= 2

# Train a small spiking network on real digits, export it and prove the export; under runs/ and savedmodels/.
demo: .venv/installed
	$(BIN)/keras-dsr train digits --export savedmodels

# The whole test suite on TensorFlow, then what JAX shares with it.
test: .venv/installed-dev
	KERAS_BACKEND=tensorflow $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
	KERAS_BACKEND=jax $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Time and memory against PyTorch, SpikingJelly and ANNs of the same shape, meant for 10 minutes on 2 cores. The first time,
# PyTorch is installed beforehand in an environment of its own, benchmarks/.peers.
bench: .venv/installed-dev
	$(BIN)/python benchmarks/peers.py
	$(BIN)/python benchmarks/suite.py

# All networks, numbers of time steps and forms, which takes hours; time to accuracy where DATA_DIR has CIFAR-10.
bench-full: .venv/installed-dev
	$(BIN)/python benchmarks/suite.py --full $(if $(DATA_DIR),--data-dir '$(DATA_DIR)')

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[export,serve]'
	touch $@

.venv/installed-dev: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@ .venv/installed
