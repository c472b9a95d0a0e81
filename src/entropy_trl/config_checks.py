"""Numbers of a training configuration that TRL believes, or divides by, without a look."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


_VLLM_MODES = ("server", "colocate")


@dataclass(frozen=True)
class Range:
    """The values that an option may have: from `low`, which is one of them if `closed`, to `high`."""

    low: float
    why: str
    closed: bool = True
    high: float = math.inf

    def __contains__(self, value: float) -> bool:
        above = value >= self.low if self.closed else value > self.low
        return above and value <= self.high and math.isfinite(value)

    def __str__(self) -> str:
        if self.high < math.inf:
            return f"must lie in {'[' if self.closed else '('}{self.low:g}, {self.high:g}]"
        return f"must be {'at least' if self.closed else 'above'} {self.low:g}"


_COUNT = "it counts completions"
_RANGES = {
    "learning_rate": Range(0, "a negative one raises the loss"),
    "temperature": Range(0, "the logits are divided by it", closed=False),
    "top_p": Range(0, "it is a share of the probability", closed=False, high=1),
    "repetition_penalty": Range(0, "the logits are divided by it", closed=False),
    "per_device_train_batch_size": Range(1, _COUNT),
    "per_device_eval_batch_size": Range(1, _COUNT),
    "generation_batch_size": Range(1, _COUNT),
    "num_generations": Range(2, "an advantage compares the completions of a prompt"),
    "num_generations_eval": Range(1, _COUNT),
    "gradient_accumulation_steps": Range(1, "it counts micro-batches"),
    "steps_per_generation": Range(1, "it counts micro-batches"),
    "num_iterations": Range(1, "it counts the passes over a rollout"),
    "max_completion_length": Range(1, "it counts tokens"),
    "max_prompt_length": Range(1, "it counts tokens"),
    "num_train_epochs": Range(0, "it counts passes over the data", closed=False),
    "beta": Range(0, "a negative one rewards distance from the reference"),
    "weight_decay": Range(0, "a negative one lets the weights grow"),
    "max_grad_norm": Range(0, "it is a norm"),
    "warmup_steps": Range(0, "it counts steps"),
    "adam_beta1": Range(0, "it is a share", high=1),
    "adam_beta2": Range(0, "it is a share", high=1),
    "adam_epsilon": Range(0, "it is added to a root"),
    "logging_steps": Range(0, "it counts steps"),
    "save_steps": Range(0, "it counts steps"),
    "eval_steps": Range(0, "it counts steps"),
    "dataloader_num_workers": Range(0, "it counts processes"),
    "vllm_gpu_memory_utilization": Range(0, "it is a share of the memory", closed=False, high=1),
    "vllm_tensor_parallel_size": Range(1, "it counts GPUs"),
    "vllm_max_model_length": Range(1, "it counts tokens"),
}


def check_numbers(values: Mapping[str, Any]) -> None:
    """Refuse numbers of a training configuration that no run can mean.

    Args:
        values (`Mapping[str, Any]`): Options by name. Those without a known range are left alone.

    Raises:
        ValueError: A number is out of its range; in one line.
    """
    for name, value in values.items():
        if name in _RANGES and isinstance(value, (int, float)) and value not in _RANGES[name]:
            allowed = _RANGES[name]
            finite = "" if math.isfinite(value) else " and finite"
            raise ValueError(f"`{name}` {allowed}{finite}, got {value:g}: {allowed.why}.")


def check_config(config: Any) -> None:
    """Check what TRL believes, or divides by, without a look.

    Args:
        config (`GRPOConfig`): Before its own `__post_init__`.

    Raises:
        ValueError: A number is out of its range, vLLM's mode is unknown, or the DeepSpeed file is damaged.
    """
    check_numbers(vars(config))
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
