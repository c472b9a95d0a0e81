"""Shared pieces: a tiny real model, a trainer factory, and the inputs of TRL's loss."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import copy
import functools
import gc
import importlib.metadata
import signal
from pathlib import Path

import pytest


# torch, TRL and this package are imported where they are used: pytest-xdist's controller, which runs no test, would
# import them before it starts its workers.

ROOT = Path(__file__).parents[1]
#: Scripts that tests launch.
JOBS = ROOT / "tests" / "jobs"
#: The files that take longest.
LONGEST = ("test_notebooks", "test_launch", "test_distributed", "test_interruption", "test_train_command")
#: For the environment of what tests launch.
PYTHONPATH = os.pathsep.join(map(str, (ROOT / "tests", JOBS, ROOT / "src")))


def digit_reward(completions, **kwargs):
    """A dense reward, so that a random model has advantages: the mean of the digits it wrote, over 9."""
    digits = [[int(c) for c in completion if c.isdigit()] for completion in completions]
    return [sum(d) / (9 * len(d)) if d else 0.0 for d in digits]


def untrained_policy():
    """A model factory for the command line."""
    from entropy_trl.quickstart.task import build_model, build_tokenizer

    return build_model(seed=0), build_tokenizer()


def pytest_configure():
    # Shells start background jobs with SIGINT ignored. Tests interrupt what they run.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Imports make no garbage worth looking for.
    gc.disable()
    # accelerate and transformers ask dozens of times a training which packages there are, and each answer parses the
    # metadata of the package again: a third of a tiny training.
    for name in ("metadata", "version"):
        setattr(importlib.metadata, name, functools.cache(getattr(importlib.metadata, name)))


def pytest_collection_modifyitems(items):
    # A long file that started last would leave the other processes idle.
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_collection_finish():
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def short_collections():
    """Take what is imported out of garbage collections.

    Each training asks for a collection, which would look at all objects of torch and TRL: longer than a tiny training.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def taught_once():
    """The policy of configs/smoke, which takes longer to teach than to train, is taught once: it is always the same."""
    from entropy_trl import smoke

    taught = functools.cache(smoke.tiny_math_policy)

    def tiny_math_policy(seed=0):
        return copy.deepcopy(taught(seed))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smoke, "tiny_math_policy", tiny_math_policy)
        yield


@pytest.fixture(scope="session")
def tiny_model():
    from entropy_trl.quickstart.task import build_model

    return build_model(seed=0)


@pytest.fixture
def make_config(tmp_path):
    """A configuration of 2 updates a rollout on a CPU; keyword arguments override it."""
    from entropy_trl import CovGRPOConfig

    def make(config_class=CovGRPOConfig, **overrides):
        values = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 6,
            "steps_per_generation": 2,
            "gradient_accumulation_steps": 1,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "dataloader_pin_memory": False,
            "disable_tqdm": True,
            "seed": 0,
        }
        return config_class(**(values | overrides))

    return make


@pytest.fixture
def make_trainer(tiny_model, make_config):
    """A trainer on a copy of the tiny model; keyword arguments go to the configuration."""
    from entropy_trl import CovGRPOConfig, CovGRPOTrainer
    from entropy_trl.quickstart.task import build_dataset, build_tokenizer

    def make(
        trainer_class=CovGRPOTrainer,
        config_class=CovGRPOConfig,
        model=None,
        trainer_kwargs=None,
        reward_funcs=digit_reward,
        **overrides,
    ):
        trainer = trainer_class(
            model=copy.deepcopy(tiny_model) if model is None else model,
            reward_funcs=reward_funcs,
            args=make_config(config_class, **overrides),
            train_dataset=build_dataset(64),
            processing_class=build_tokenizer(),
            **(trainer_kwargs or {}),
        )
        # The training loop sets this one; tests also call the loss on its own.
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
        return trainer

    return make


@pytest.fixture
def set_forward(monkeypatch):
    """Let TRL's forward pass return given tensors, so that a test knows every log-probability of TRL's loss."""
    import torch
    from trl import GRPOTrainer

    def install(logps, entropies=None, aux_loss=None):
        entropies = torch.ones_like(logps) if entropies is None else entropies
        monkeypatch.setattr(
            GRPOTrainer, "_get_per_token_logps_and_entropies", lambda *args, **kwargs: (logps, entropies, aux_loss)
        )

    return install


@pytest.fixture
def loss_inputs():
    """Random inputs of TRL's loss: `rows` completions of up to `length` tokens. Returns (logps, inputs)."""
    import torch

    def make(rows=4, length=6, *, seed=0, dtype=torch.float64, drift=0.3, mask=None, per_token=False):
        generator = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
        old_logps = -normal(rows, length).abs() * 2
        logps = (old_logps + drift * normal(rows, length)).requires_grad_()
        if mask is None:
            lengths = torch.randint(1, length + 1, (rows,), generator=generator)
            lengths[0] = length
            mask = torch.arange(length) < lengths[:, None]
        mask = mask.long()
        inputs = {
            "prompt_ids": torch.zeros(rows, 2, dtype=torch.long),
            "prompt_mask": torch.ones(rows, 2, dtype=torch.long),
            "completion_ids": torch.zeros(rows, length, dtype=torch.long),
            "completion_mask": mask,
            "advantages": normal(rows, length) if per_token else normal(rows),
            "old_per_token_logps": old_logps,
            "num_items_in_batch": mask.sum() * 2,
            "row_ids": torch.arange(rows),
        }
        return logps, inputs

    return make
