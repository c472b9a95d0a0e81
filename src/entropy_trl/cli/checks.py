"""What the command line refuses before any work: numbers out of range, and paths that nothing can be written to."""

import argparse
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from entropy_trl.cli.errors import UsageError


if TYPE_CHECKING:
    from trl import ModelConfig

    from entropy_trl.config import CovGRPOConfig


def check_max_steps(steps: int) -> None:
    """Refuse a number of steps that transformers takes for "go by epochs".

    Raises:
        ValueError: It is below 1, and not the default, -1.
    """
    if steps != -1 and steps < 1:
        raise ValueError(
            f"`max_steps` must be at least 1, got {steps}: training would go by num_train_epochs instead. "
            "Leave it out to train by epochs."
        )


def check_precision(options: argparse.Namespace) -> None:
    """Refuse bf16, which is TRL's default, on a machine without a GPU that has it. transformers would stop there.

    Raises:
        ValueError: It says how to train in float32.
    """
    from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available

    is_default = options.bf16 is None and not options.fp16
    wanted = options.bf16 or options.bf16_full_eval or is_default
    if not wanted or options.use_cpu or is_torch_bf16_gpu_available() or is_torch_xla_available():
        return
    name = "bf16" if options.bf16 or is_default else "bf16_full_eval"
    raise ValueError(
        f"--{name} is on{' by default' if is_default else ''}, and this machine has no GPU that supports it. Add "
        f"`--{name} false` to train in float32."
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
