"""Numbers of a training configuration that TRL believes, or divides by, without a look."""

import json
import math
from pathlib import Path
from typing import Any


#: Counts, which are at least 1 where they are given.
_COUNTS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "generation_batch_size",
    "steps_per_generation",
    "num_generations",
    "num_iterations",
    "max_completion_length",
    "vllm_tensor_parallel_size",
    "vllm_max_model_length",
)
_VLLM_MODES = ("server", "colocate")


def check_numbers(config: Any) -> None:
    """Check the numbers that decide what a rollout and a step are.

    Args:
        config (`GRPOConfig`): The configuration, before its own `__post_init__`, which divides by some of them.

    Raises:
        ValueError: A count is below 1, or a share or a coefficient is outside its range or not finite.
    """
    for name in _COUNTS:
        value = getattr(config, name)
        if isinstance(value, int) and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    share = config.vllm_gpu_memory_utilization
    if not 0 < share <= 1:
        raise ValueError(f"`vllm_gpu_memory_utilization` is a share of a GPU and must lie in (0, 1], got {share:g}.")
    if not 0 <= config.beta < math.inf:
        raise ValueError(f"`beta` must be finite and not negative, got {config.beta:g}.")
    if not 0 < config.temperature < math.inf:
        raise ValueError(f"`temperature` must be positive and finite, got {config.temperature:g}.")
    if config.vllm_mode not in _VLLM_MODES:
        raise ValueError(f"Unknown `vllm_mode` {config.vllm_mode!r}. Valid: {', '.join(map(repr, _VLLM_MODES))}.")
    if isinstance(config.deepspeed, str) and Path(config.deepspeed).is_file():
        check_deepspeed(config.deepspeed)


def check_deepspeed(file: str) -> dict[str, Any]:
    """Read a DeepSpeed configuration.

    Raises:
        ValueError: It is not JSON, or no mapping of settings.
    """
    try:
        values = json.loads(Path(file).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"The DeepSpeed configuration {file} cannot be read ({error}).") from error
    zero = values.get("zero_optimization", {}) if isinstance(values, dict) else None
    if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
        raise ValueError(
            f"The DeepSpeed configuration {file} is no mapping of settings with a zero_optimization whose stage is 0, "
            "1, 2 or 3."
        )
    for name in ("offload_optimizer", "offload_param"):
        if not isinstance(zero.get(name) or {}, dict):
            raise ValueError(f"The DeepSpeed configuration {file}: {name} must be a mapping, got {zero[name]!r}.")
    return values
