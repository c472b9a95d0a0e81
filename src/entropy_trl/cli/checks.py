"""What the command line refuses before any work: numbers out of range, and paths that nothing can be written to."""

import argparse
import math
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from entropy_trl.cli.errors import UsageError


if TYPE_CHECKING:
    from trl import ModelConfig

    from entropy_trl.config import CovGRPOConfig


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
            return f"lie in {'[' if self.closed else '('}{self.low:g}, {self.high:g}]"
        if self.closed:
            return f"be finite and at least {self.low:g}"
        return f"be finite and above {self.low:g}"


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
    "save_total_limit": Range(1, "it counts checkpoints"),
    "dataloader_num_workers": Range(0, "it counts processes"),
    "max_bad_rows": Range(0, "it is a share of the rows", high=1),
    "overlap_threshold": Range(0, "it is a share of 13-grams", high=1),
    "vllm_gpu_memory_utilization": Range(0, "it is a share of the memory", closed=False, high=1),
    "vllm_tensor_parallel_size": Range(1, "it counts GPUs"),
}


def check_numbers(options: argparse.Namespace) -> None:
    """Refuse numbers of a training configuration that no run can mean.

    Raises:
        ValueError: A number is out of its range; in one line.
    """
    for name, value in vars(options).items():
        if name in _RANGES and isinstance(value, (int, float)) and value not in _RANGES[name]:
            allowed = _RANGES[name]
            raise ValueError(f"--{name} must {allowed}, got {value:g}: {allowed.why}.")
    steps = options.max_steps
    if steps != -1 and steps < 1:
        raise ValueError(
            f"--max_steps must be at least 1, got {steps}: training would go by --num_train_epochs instead. "
            "Leave it out to train by epochs."
        )


def check_sources(options: argparse.Namespace) -> None:
    """Refuse a training without a model or data. This comes first: whoever gives neither wants to know what to give.

    Raises:
        ValueError: There is no model or no data; in one line.
    """
    if options.model_name_or_path is None and options.model_factory is None:
        raise ValueError("No model: give --model_name_or_path (a hub id or a folder), or --model_factory.")
    if not options.datasets and options.dataset_name is None and options.dataset_factory is None:
        raise ValueError("No data: give --dataset_name (a file, a folder or a hub data set), or --dataset_factory.")


def check_packages(training_args: "CovGRPOConfig", model_args: "ModelConfig") -> None:
    """Refuse settings whose optional package is not installed.

    Raises:
        UsageError: It names the extra that installs the package.
    """
    wanted = {
        "vllm": ("use_vllm", training_args.use_vllm),
        "peft": ("use_peft", model_args.use_peft),
        "deepspeed": ("deepspeed", training_args.deepspeed),
    }
    for package, (option, is_on) in wanted.items():
        if is_on and find_spec(package) is None:
            raise UsageError(
                f"--{option} needs the package {package}, which is not installed. Run "
                f"`pip install 'entropy-trl[{package}]'`, or leave the option out."
            )


def check_model(name: str, revision: str | None, trust_remote_code: bool) -> None:
    """Refuse a model that is neither a folder nor on the Hub, before the data is read.

    Raises:
        UsageError: It says what was looked for.
    """
    from transformers import AutoConfig

    path = Path(name).expanduser()
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise UsageError(f"--model_name_or_path: the folder {name!r} has no config.json: it holds no model.")
        return
    if path.is_file():
        raise UsageError(f"--model_name_or_path: {name!r} is a file. Give the folder of a model, or a hub id.")
    is_path = name.startswith(("/", ".", "~")) or name.count("/") > 1 or name.endswith("/")
    if is_path or ("/" in name and path.parent.is_dir()):
        raise UsageError(f"--model_name_or_path: there is no folder {name!r}. Give the folder of a model, or a hub id.")
    try:
        AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except OSError as error:
        first_line = str(error).strip().splitlines()[0].rstrip(".")
        raise UsageError(
            f"--model_name_or_path: there is no folder {name!r}, and no model of this name can be had from the Hub: "
            f"{first_line}."
        ) from error


def check_folder(path: str | Path, option: str) -> None:
    """Refuse an output folder that cannot be made or written to.

    Raises:
        UsageError: The message has one line.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{option}: {str(path)!r} is a file, and the output needs a folder. Give another name.")
    existing = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    if not existing.is_dir():
        raise UsageError(f"{option}: {str(path)!r} cannot be made, because {str(existing)!r} is a file.")
    if not os.access(existing, os.W_OK):
        raise UsageError(f"{option}: {str(path)!r} cannot be written to: {str(existing)!r} is read-only for this user.")


def check_file(path: Path, option: str) -> None:
    """Refuse an output file that cannot be written.

    Raises:
        UsageError: The message has one line.
    """
    if path.is_dir():
        raise UsageError(f"{option}: {str(path)!r} is a folder. Give the name of a file.")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{option}: {str(path)!r} cannot be written. There is no folder {str(path.parent)!r}.")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise UsageError(f"{option}: {str(path)!r} cannot be written: permission denied.")
