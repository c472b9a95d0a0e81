"""The command `entropy-trl env`: what a bug report needs to know of the machine."""

import argparse
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

from entropy_trl._version import __version__


DESCRIPTION = "Print versions, devices, optional packages and the sandbox of this machine, for a bug report."

PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "huggingface_hub", "math-verify", "numpy")
OPTIONAL = ("vllm", "deepspeed", "peft", "matplotlib", "Jinja2", "statsmodels", "scipy", "wandb", "trackio")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no option."""


def prepare(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Return each fact with its name."""
    import torch

    facts = [
        ("entropy-trl", __version__),
        ("Python", platform.python_version()),
        ("platform", platform.platform()),
        ("CPU cores", str(os.cpu_count())),
        *((name, _version(name)) for name in PACKAGES),
        ("CUDA of torch", str(torch.version.cuda or "none (a CPU build)")),
    ]
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    facts += [
        (f"GPU {i}", f"{device.name}, {device.total_memory / 2**30:.0f} GiB") for i, device in enumerate(devices)
    ] or [("GPU", "none")]
    facts += [(f"{name} (optional)", _version(name)) for name in OPTIONAL]
    facts.append(("bubblewrap (sandbox)", shutil.which("bwrap") or "not installed"))
    return facts


def run(prepared: list[tuple[str, str]], options: argparse.Namespace) -> int:
    """Print the facts. Returns the exit code, 0."""
    width = max(len(name) for name, _ in prepared)
    for name, value in prepared:
        print(f"{name:<{width}}  {value}")
    return 0


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
