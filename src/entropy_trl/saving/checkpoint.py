"""What TRL's checkpoints lack: the rollout, for a run that stops inside one, and the proof that all was written.

Beside what TRL saves, a checkpoint folder has

- `rollout_rank<k>.safetensors`, one a process, inside a rollout: the tensors of each micro-batch, and in its header, as
  JSON, the position in the rollout and what is not a tensor;
- `manifest.json`, written when everything else is there: every file with its size, and how the run was cut into
  processes and micro-batches. A checkpoint without it, or whose files are not of these sizes, is not complete.
"""

import json
import logging
import re
import shutil
import zipfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl import GRPOConfig

from entropy_trl._version import __version__


logger = logging.getLogger(__name__)

MicroBatch = dict[str, Any]

MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.json"


def rollout_file(checkpoint: str | Path, rank: int) -> Path:
    """Where process `rank` keeps its rollout in a checkpoint folder."""
    return Path(checkpoint) / f"rollout_rank{rank}.safetensors"


def save_rollout(path: Path, step: int, micro_batches: list[MicroBatch]) -> None:
    """Write a rollout, all of it or nothing.

    Args:
        path (`Path`): the file; its folder is made if it is missing.
        step (`int`): TRL's count of micro-batches since the start of training.
        micro_batches (`list[dict]`): TRL's rollout buffer: tensors, and values that JSON can hold.
    """
    tensors: dict[str, torch.Tensor] = {}
    others = []
    for i, micro_batch in enumerate(micro_batches):
        others.append({k: v for k, v in micro_batch.items() if not isinstance(v, torch.Tensor)})
        # Micro-batches are views of one tensor: a copy holds its own part only.
        tensors |= {f"{i}/{k}": v.detach().clone() for k, v in micro_batch.items() if isinstance(v, torch.Tensor)}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    save_file(tensors, unfinished, metadata={"rollout": json.dumps({"step": step, "others": others})})
    unfinished.rename(path)


def load_rollout(path: Path, device: torch.device) -> tuple[int, list[MicroBatch]]:
    """Read what [`save_rollout`] wrote: the step and the rollout buffer, its tensors on `device`."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["rollout"])
        micro_batches: list[MicroBatch] = header["others"]
        for name in file.keys():  # noqa: SIM118  # not a mapping
            index, key = name.split("/", maxsplit=1)
            micro_batches[int(index)][key] = file.get_tensor(name).to(device)
    return header["step"], micro_batches


@dataclass(frozen=True)
class Layout:
    """How a run is cut into processes and micro-batches: what a checkpoint's counts and rollouts refer to."""

    processes: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    steps_per_generation: int
    num_iterations: int
    num_generations: int

    @classmethod
    def of(cls, args: GRPOConfig) -> "Layout":
        """The layout that a configuration has in this launch."""
        return cls(
            processes=args.world_size,
            per_device_train_batch_size=args.per_device_train_batch_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            steps_per_generation=args.steps_per_generation,
            num_iterations=args.num_iterations,
            num_generations=args.num_generations,
        )

    @property
    def amounts(self) -> tuple[int, int, int, int]:
        """Completions of an optimizer step, of a rollout, how often a rollout is used, and completions of a prompt."""
        rows = self.processes * self.per_device_train_batch_size
        return (
            rows * self.gradient_accumulation_steps,
            rows * self.steps_per_generation,
            self.num_iterations,
            self.num_generations,
        )

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in asdict(self).items())


def write_manifest(checkpoint: Path, layout: Layout, inside_rollout: bool) -> None:
    """Declare a checkpoint complete. Call it when every process has written its files."""
    # Opened, not only looked up: a network file system then asks for the size that another machine's file really has.
    files = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            with path.open("rb") as file:
                files[path.relative_to(checkpoint).as_posix()] = file.seek(0, 2)
    manifest = {
        "entropy_trl": __version__,
        "layout": asdict(layout),
        "inside_rollout": inside_rollout,
        "files": files,
    }
    unfinished = checkpoint / f"{MANIFEST}.unfinished"
    unfinished.write_text(json.dumps(manifest, indent=2) + "\n")
    unfinished.rename(checkpoint / MANIFEST)


def why_incomplete(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; `None` if its manifest says that all of it is there."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    except FileNotFoundError:
        return f"it has no {MANIFEST}: it was not written to the end, or not by CovGRPOTrainer"
    except (ValueError, KeyError, TypeError):
        return f"its {MANIFEST} cannot be read"
    for name, size in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} of {size} bytes"
    return None


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The complete checkpoint of the highest step in a run's folder. Says which newer ones it passes over, and why."""
    for checkpoint in reversed(_checkpoints(output_dir)):
        problem = why_incomplete(checkpoint)
        if problem is None:
            return checkpoint
        logger.warning(f"{checkpoint} is passed over: {problem}.")
    return None


def checkpoint_to_resume(choice: str | bool | None, output_dir: str | Path, layout: Layout) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means, checked; `None` for a new run.

    Args:
        choice (`str`, `bool` or `None`): a checkpoint folder, `True` for the newest complete one in `output_dir`, or
            `"auto"` for that one if there is one, and a new run if there is none.
        output_dir (`str` or `Path`): the run's folder.
        layout (`Layout`): of the run that is to go on.

    Raises:
        ValueError: if there is no complete checkpoint, the one named is not complete, or the run cannot go on from it
            with this layout.
    """
    if choice is None or choice is False:
        return None
    if choice is True or choice == "auto":
        checkpoint = last_complete_checkpoint(output_dir)
        if checkpoint is None and choice == "auto":
            return None
        if checkpoint is None:
            passed_over = "; ".join(f"{c.name}: {why_incomplete(c)}" for c in _checkpoints(output_dir))
            raise ValueError(
                f"resume_from_checkpoint is true, but there is no complete checkpoint in {str(output_dir)!r}"
                + (f" ({passed_over}). Name one to use it all the same." if passed_over else ".")
            )
    else:
        checkpoint = Path(choice)
        if not (checkpoint / TRAINER_STATE).is_file():
            raise ValueError(f"resume_from_checkpoint: {choice!r} is not a checkpoint (it has no {TRAINER_STATE}).")
        if not (checkpoint / MANIFEST).exists():
            _warn_once(f"{checkpoint} has no {MANIFEST}: whether it is complete is judged by its files alone.")
        problem = why_incomplete(checkpoint) if (checkpoint / MANIFEST).exists() else _why_unreadable(checkpoint)
        if problem is not None:
            raise ValueError(f"resume_from_checkpoint: {choice!r} is not complete: {problem}.")
    _check_layout(checkpoint, layout)
    return checkpoint


def rotate(output_dir: str | Path, limit: int | None, best: str | None) -> None:
    """Delete surplus checkpoints as transformers does (`save_total_limit`), incomplete ones before any complete one."""
    if limit is None or limit <= 0:
        return
    checkpoints = _checkpoints(output_dir)
    incomplete = [c for c in checkpoints if why_incomplete(c) is not None]
    for checkpoint in incomplete[: max(len(checkpoints) - limit, 0)]:
        shutil.rmtree(checkpoint, ignore_errors=True)
    rotate_checkpoints(str(output_dir), limit, best, use_mtime=True)


@cache
def _warn_once(message: str) -> None:
    """The command line checks a checkpoint before the model is loaded, and the trainer does again."""
    logger.warning(message)


def _checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders of a run, by step."""
    found = {}
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if path.is_dir() and (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)):
            found[int(match[1])] = path
    return [found[step] for step in sorted(found)]


def _why_unreadable(checkpoint: Path) -> str | None:
    """What shows that a checkpoint without a manifest was cut off: JSON, safetensors and zip files know their end."""
    for path in sorted(checkpoint.rglob("*")):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
            elif path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
                return f"{path.name} is truncated"
        except (ValueError, SafetensorError) as error:
            return f"{path.name} cannot be read ({error})"
    return None


def _check_layout(checkpoint: Path, layout: Layout) -> None:
    if not (checkpoint / MANIFEST).exists():
        return
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    saved = Layout(**manifest["layout"])
    if saved == layout:
        return
    if saved.amounts != layout.amounts:
        problem = (
            "The two differ in the completions of a step or of a rollout, on which the place in the data depends. Keep "
            "processes x per_device_train_batch_size x gradient_accumulation_steps, and the same with "
            "steps_per_generation, as they were"
        )
    elif manifest["inside_rollout"]:
        problem = "It lies inside a rollout, whose rows belong to processes and micro-batches. Resume with the same cut"
    elif (checkpoint / "latest").exists() and saved.processes != layout.processes:
        problem = "DeepSpeed's shards are for that number of processes. Resume with the same"
    else:
        _warn_once(
            f"{checkpoint} was saved with {saved}; now it is {layout}. The run goes on with the same prompts in the "
            "same steps; random numbers of the processes (sampling) are not those of a run that was not interrupted."
        )
        return
    raise ValueError(
        f"resume_from_checkpoint: {checkpoint} was saved with {saved}; now it is {layout}. {problem}, or start a new "
        "run from its weights (model_name_or_path)."
    )
