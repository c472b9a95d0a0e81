# Every target works on a fresh machine with Python 3.11 or newer and make. The environment is .venv, made from
# constraints.txt, and made again when setup.cfg, pyproject.toml or constraints.txt change.
#
#   make quickstart                           the embedded task: entropy collapse and its cure, on a CPU, in minutes
#   make test                                 everything that runs without a GPU
#   make test-distributed                     the tests of several processes, with DeepSpeed (needs g++)
#   make gpu-check                            the tests and benchmarks for a machine with a GPU; in an environment that has
#                                             the dependencies and pytest already: make gpu-check GPU_PYTHON=python3
#
# On Linux the default package index serves the CUDA build of torch, several GB. For the CPU build, first:
#   make install PIP_INSTALL_ARGS="--extra-index-url INDEX"    with PyTorch's index of CPU builds

PYTHON ?= python3
VENV ?= .venv
PIP_INSTALL_ARGS ?=
PYTEST_ARGS ?=
QUICKSTART_ARGS ?=
GPU_PYTHON ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install quickstart test test-distributed quality style gpu-check clean

help:
	@sed -n 's/^#   *\(make .*\)/\1/p' Makefile

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, and $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_INSTALL_ARGS) -c constraints.txt -e ".[dev]"
	touch $@

install: $(STAMP)

quickstart: $(STAMP)
	$(BIN)/entropy-trl quickstart $(QUICKSTART_ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -m "not gpu" $(PYTEST_ARGS)

test-distributed: $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[deepspeed]" ninja
	$(BIN)/python -m pytest tests/test_distributed.py $(PYTEST_ARGS)

quality: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

gpu-check: $(if $(GPU_PYTHON),,$(STAMP))
	PYTHONPATH=src $(or $(GPU_PYTHON),$(BIN)/python) -m pytest -m gpu $(PYTEST_ARGS)
	PYTHONPATH=src $(or $(GPU_PYTHON),$(BIN)/python) benchmarks/overhead.py
	PYTHONPATH=src $(or $(GPU_PYTHON),$(BIN)/python) benchmarks/selection.py

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
