"""The methods and recipes of the quickstart; `configs/quickstart/*.yaml` says the same to the command line.

A rollout is 32 prompts x 8 generations, used for 8 updates of 32 completions (about 224 tokens). The fractions of the
entropy controls are 50 times the paper's, whose updates have about 500,000 tokens.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entropy_trl.quickstart.task import COMPLETION_LENGTH


UPDATES_PER_ROLLOUT = 8
CURVE_POINTS = 10  # evaluations on held-out prompts during a run, besides the one before it
RECORDED_STEPS = 24  # updates whose tokens are recorded, each the first of a rollout


@dataclass(frozen=True)
class Recipe:
    """Length and learning rate of a run.

    Attributes:
        rollouts (`int`): Rollouts, of 8 updates each.
        learning_rate (`float`): Peak learning rate; it warms up for 16 updates and falls linearly to 0.
    """

    rollouts: int
    learning_rate: float


RECIPES: dict[str, Recipe] = {
    "short": Recipe(rollouts=120, learning_rate=6e-4),
    "long": Recipe(rollouts=400, learning_rate=2e-4),
}

# Clip-Cov keeps GRPO's ratio clip here, so that it differs from the baseline in nothing but the tokens that it drops.
# With the published clip of 1 it is not reliable on updates this large: the entropy collapsed in 2 of 3 seeds.
# KL-Cov has no ratio clip, as published. The last two are the null hypotheses: as many tokens, drawn at random.
METHODS: dict[str, dict[str, Any]] = {
    "grpo": {"entropy_control": None, "epsilon": 0.2},
    "clip_higher": {"entropy_control": None, "epsilon": 0.2, "epsilon_high": 0.28},
    "clip_cov": {
        "entropy_control": "clip_cov",
        "entropy_control_kwargs": {"fraction": 0.01, "cov_low": 1.0, "cov_high": 5.0},
        "epsilon": 0.2,
    },
    "kl_cov": {"entropy_control": "kl_cov", "entropy_control_kwargs": {"fraction": 0.1, "coef": 1.0}},
    "clip_random": {
        "entropy_control": "clip_cov",
        "entropy_control_kwargs": {"fraction": 0.01, "cov_low": 1.0, "cov_high": 5.0, "selection": "random"},
        "epsilon": 0.2,
    },
    "kl_random": {
        "entropy_control": "kl_cov",
        "entropy_control_kwargs": {"fraction": 0.1, "coef": 1.0, "selection": "random"},
    },
}
DEFAULT_METHODS = ("grpo", "clip_higher", "clip_cov", "kl_cov")
LABELS = {
    "grpo": "GRPO",
    "clip_higher": "clip-higher",
    "clip_cov": "Clip-Cov",
    "kl_cov": "KL-Cov",
    "clip_random": "Clip-random",
    "kl_random": "KL-random",
}


def steps_between_evaluations(rollouts: int) -> int:
    """Updates between two points of the held-out curve: a whole number of rollouts."""
    return max(1, rollouts // CURVE_POINTS) * UPDATES_PER_ROLLOUT


def training_arguments(method: str, recipe: Recipe, seed: int, output_dir: Path) -> dict[str, Any]:
    """Keyword arguments of `CovGRPOConfig` for one run.

    Args:
        method (`str`): A key of `METHODS`.
        recipe ([`Recipe`]): Length and learning rate.
        seed (`int`): Seed of the run: order of the prompts, sampling, the controls' draws.
        output_dir (`Path`): Where checkpoints go.
    """
    return {
        "output_dir": output_dir.as_posix(),
        **METHODS[method],
        "seed": seed,
        "learning_rate": recipe.learning_rate,
        "max_steps": recipe.rollouts * UPDATES_PER_ROLLOUT,
        "lr_scheduler_type": "linear",
        "warmup_steps": 16,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "per_device_train_batch_size": 32,
        "steps_per_generation": UPDATES_PER_ROLLOUT,
        "gradient_accumulation_steps": 1,
        "num_generations": 8,
        "max_completion_length": COMPLETION_LENGTH,
        "temperature": 1.0,
        "loss_type": "dapo",
        "scale_rewards": "group",
        "beta": 0.0,
        # a tiny model on a CPU: TRL's defaults for these four are for large ones on a GPU
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "logging_steps": UPDATES_PER_ROLLOUT,  # once a rollout
        "token_records": {
            "every": max(1, recipe.rollouts // RECORDED_STEPS) * UPDATES_PER_ROLLOUT,
            "max_tokens": 2000,
            "entropy_change": True,
        },
        # Where the curve is evaluated, so that a run that resumes there evaluates at the same updates.
        "save_strategy": "steps",
        "save_steps": 3 * steps_between_evaluations(recipe.rollouts),
        "save_total_limit": 1,
        "report_to": "none",
    }
