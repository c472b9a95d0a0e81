"""What TRL's checkpoints lack: the rollout, for a run that stops inside one, and the proof that all was written.

Beside what TRL saves, a checkpoint folder has

- `rollout_rank<k>.safetensors`, one a process, inside a rollout: the tensors of each micro-batch, and in its header, as
  JSON, the position in the rollout and what is not a tensor;
- `manifest.json`, written when everything else is on the disk: every file with its size and checksum, the run, and how
  it was cut into processes and micro-batches. A checkpoint without it, or with other files, is not complete.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import zipfile
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from entropy_trl.files import replacing
from entropy_trl.saving.manifest import (
    MANIFEST,
    TRAINER_STATE,
    UNFINISHED,
    DamagedManifest,
    Layout,
    Run,
    how_to_accept,
    read_manifest,
    why_incomplete,
)


logger = logging.getLogger(__name__)

MicroBatch = dict[str, Any]

#: What a run leaves in its folder beside its checkpoints.
_TRACES = (
    *(TRAINER_STATE, "training_args.bin", "*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "*_results.json"),
    *("train_log.jsonl", "completions", "runs", "_token_records"),
)
_ZIP = b"PK\3\4"
_WITHOUT_OPTIMIZER = (
    "{} has no optimizer state (`save_only_model`): the learning-rate schedule and the optimizer would start afresh, "
    "which is another run. Resume from a checkpoint saved without `save_only_model`, or start a new run from its "
    "weights (model_name_or_path)"
)


def rollout_file(checkpoint: str | Path, rank: int) -> Path:
    """Where process `rank` keeps its rollout in a checkpoint folder."""
    return Path(checkpoint) / f"rollout_rank{rank}.safetensors"


def save_rollout(path: Path, step: int, micro_batches: list[MicroBatch]) -> None:
    """Write a rollout, all of it or nothing.

    Args:
        path (`Path`): The file; its folder is made if it is missing.
        step (`int`): TRL's count of micro-batches since the start of training.
        micro_batches (`list[dict]`): TRL's rollout buffer: tensors, and values that JSON can hold.
    """
    tensors: dict[str, torch.Tensor] = {}
    others = []
    for i, micro_batch in enumerate(micro_batches):
        others.append({k: v for k, v in micro_batch.items() if not isinstance(v, torch.Tensor)})
        # Micro-batches are views of one tensor: a copy holds its own part only.
        tensors |= {f"{i}/{k}": v.detach().clone() for k, v in micro_batch.items() if isinstance(v, torch.Tensor)}
    header = {"step": step, "others": others, "sha256": _checksum(tensors)}
    with replacing(path) as part:
        save_file(tensors, part, metadata={"rollout": json.dumps(header)})


def load_rollout(path: Path, device: torch.device) -> tuple[int, list[MicroBatch]]:
    """Read what [`save_rollout`] wrote: the step and the rollout buffer, its tensors on `device`.

    Raises:
        ValueError: If the tensors are not those that were written.
    """
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["rollout"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    if "sha256" in header and header["sha256"] != _checksum(tensors):
        raise ValueError(
            f"{path} is damaged (its checksum is another one): the run cannot go on inside this rollout. Resume from "
            "an older checkpoint."
        )
    micro_batches: list[MicroBatch] = header["others"]
    for name, tensor in tensors.items():
        index, key = name.split("/", maxsplit=1)
        micro_batches[int(index)][key] = tensor.to(device)
    return header["step"], micro_batches


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode())
        sha.update(tensors[name].cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The complete checkpoint of a run's folder that was saved last, by the time in its manifest.

    The highest step may be an earlier run's. Checkpoints of versions that kept no time count as older, by their step.
    Says which it passes over, and why.
    """
    checkpoints = sorted(_checkpoints(output_dir), key=_saved_at)  # stable: then by step
    for i, checkpoint in reversed(list(enumerate(checkpoints))):
        problem = why_incomplete(checkpoint)
        if problem is not None:
            warn_once(f"{checkpoint} is passed over: {problem}. {how_to_accept(checkpoint)}.")
            continue
        if higher := [c for c in checkpoints[:i] if _step(c) > _step(checkpoint)]:
            names = ", ".join(f"{c.name} ({_run_of(c)})" for c in higher)
            warn_once(
                f"{checkpoint} ({_run_of(checkpoint)}) was saved last. Passed over, because they were saved before "
                f"it: {names}. Name one of them to resume from it."
            )
        return checkpoint
    return None


def checkpoint_to_resume(choice: str | bool | None, output_dir: str | Path, layout: Layout) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means, checked; `None` for a new run.

    Args:
        choice (`str`, `bool` or `None`): A checkpoint folder, `True` for the newest complete one in `output_dir`, or
            `"auto"` for that one if there is one, and a new run if there is none.
        output_dir (`str` or `Path`): The run's folder.
        layout ([`Layout`]): Layout of the run that is to go on.

    Raises:
        ValueError: If there is no complete checkpoint, the one named is not complete, or the run cannot go on from it
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
        if (checkpoint / MANIFEST).exists():
            problem, remedy = why_incomplete(checkpoint), f" {how_to_accept(checkpoint)}."
        else:
            warn_once(
                f"{checkpoint} has no {MANIFEST}: whether it is complete is judged by its files alone, and options "
                "that you changed are not named."
            )
            problem, remedy = _why_unreadable(checkpoint), ""
        if problem is not None:
            raise ValueError(f"resume_from_checkpoint: {choice!r} is not complete: {problem}.{remedy}")
    _check_layout(checkpoint, layout)
    if not _has_optimizer(checkpoint):
        problem = _WITHOUT_OPTIMIZER.format(checkpoint)
        if choice is True or choice == "auto":
            raise ValueError(f"resume_from_checkpoint: {problem}, or name it.")
        warn_once(f"{problem}. It goes on all the same, because you named it.")
    return checkpoint


def rotate(output_dir: str | Path, limit: int | None, best: str | None, newest: Path | None = None) -> None:
    """Delete surplus checkpoints as transformers does (`save_total_limit`), broken ones before any other one.

    A checkpoint without a manifest, as stock TRL writes it, or with an edited file is not broken.

    Args:
        output_dir (`str` or `Path`): The run's folder.
        limit (`int`, *optional*): How many to keep; `None` or 0 keeps all.
        best (`str`, *optional*): The best checkpoint, which is never deleted.
        newest (`Path`, *optional*): The checkpoint just written, which is never deleted. By default the youngest one.
    """
    if limit is None or limit <= 0:
        return
    checkpoints = [Path(path) for path in sort_checkpoints(str(output_dir), use_mtime=True)]
    surplus = len(checkpoints) - limit
    if surplus <= 0:
        return
    kept = {path.resolve() for path in (newest or checkpoints[-1], *([Path(best)] if best else []))}
    deletable = [c for c in checkpoints if c.resolve() not in kept]
    deletable.sort(key=lambda c: not _is_broken(c))  # stable: then by age
    for checkpoint in deletable[:surplus]:
        shutil.rmtree(checkpoint, ignore_errors=True)


def warn_of_another_run(output_dir: str | Path, resumed: Path | None = None) -> None:
    """Name in one line the other run that lies where a run is about to write.

    Args:
        output_dir (`str` or `Path`): The run's folder.
        resumed (`Path`, *optional*): The checkpoint that the run goes on from. Its own run is not another one.
    """
    folder = Path(output_dir)
    checkpoints = sorted(_checkpoints(folder), key=_saved_at)
    inside = resumed is not None and resumed.resolve().parent == folder.resolve()
    if resumed is not None:
        run = _run_of(resumed)
        checkpoints = [c for c in checkpoints if _run_of(c) != run]
        if inside:  # one that was cut off names no run, and is this run's own
            checkpoints = [c for c in checkpoints if _step(c) > _step(resumed) and not (c / UNFINISHED).exists()]
    found = [f"{checkpoints[-1].name} is its last checkpoint, {_run_of(checkpoints[-1])}"] if checkpoints else []
    if not inside and folder.is_dir():
        traces = sorted(path.name for path in folder.iterdir() if any(fnmatch(path.name, trace) for trace in _TRACES))
        found += [", ".join(traces[:4]) + (f" and {len(traces) - 4} more" if len(traces) > 4 else "")] if traces else []
    if found:
        warn_once(
            f"{output_dir} already holds another run ({'; '.join(found)}): this run overwrites files of the same "
            "names and checkpoints of the same steps, and save_total_limit deletes older ones. Choose another "
            "output_dir to keep them" + ("." if resumed else ", or resume with resume_from_checkpoint true.")
        )


@cache
def warn_once(message: str) -> None:
    """Warn on the first rank, and the first time: the command line checks a checkpoint, and the trainer again.

    There is no process group yet, so the launcher's number tells the rank.
    """
    if os.environ.get("RANK", "0") == "0":
        logger.warning(message)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", maxsplit=1)[1])


def _saved_at(checkpoint: Path) -> float:
    """When a checkpoint was written, by its manifest, or by its folder if it has none."""
    try:
        return float(read_manifest(checkpoint)["saved_at"])
    except (FileNotFoundError, DamagedManifest):
        return checkpoint.stat().st_mtime


def _run_of(checkpoint: Path) -> str:
    try:
        return str(Run(**read_manifest(checkpoint)["run"]))
    except (FileNotFoundError, DamagedManifest):
        return "unknown run"


def _has_optimizer(checkpoint: Path) -> bool:
    """Whether a checkpoint has an optimizer's state: torch's, or the shards of FSDP (`optimizer_0`) or DeepSpeed."""
    return (checkpoint / "latest").exists() or any(checkpoint.glob("optimizer*"))


def _is_broken(checkpoint: Path) -> bool:
    """Whether a checkpoint is cut off for sure: not the lack of a proof that it is whole, nor an edited file."""
    try:
        files = read_manifest(checkpoint)["files"]
    except FileNotFoundError:
        if (checkpoint / UNFINISHED).exists() or not (checkpoint / TRAINER_STATE).exists():
            return True
    except DamagedManifest:
        pass  # the files tell
    else:
        if not all((checkpoint / name).is_file() for name in files):
            return True
    return _why_unreadable(checkpoint) is not None


def _checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders of a run, by step."""
    found = {}
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if path.is_dir() and (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)):
            found[int(match[1])] = path
    return [found[step] for step in sorted(found)]


def _why_unreadable(checkpoint: Path) -> str | None:
    """What shows that a checkpoint without a manifest was cut off: JSON, safetensors and zip files know their end."""
    if (checkpoint / UNFINISHED).exists():
        return "it was not written to the end"
    for path in sorted(checkpoint.rglob("*")):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
            elif path.suffix in (".pt", ".pth", ".bin") and path.is_file():
                with path.open("rb") as file:
                    start = file.read(len(_ZIP))
                # torch's older format, and files of others, do not tell their end.
                if not start.strip(b"\0") or (start == _ZIP and not zipfile.is_zipfile(path)):
                    return f"{path.name} is truncated"
        except (ValueError, RecursionError, SafetensorError) as error:
            return f"{path.name} cannot be read ({error})"
    return None


def _check_layout(checkpoint: Path, layout: Layout) -> None:
    if not (checkpoint / MANIFEST).exists():
        return
    manifest = read_manifest(checkpoint)
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
        warn_once(
            f"{checkpoint} was saved with {saved}; now it is {layout}. The run goes on with the same prompts in the "
            "same steps; random numbers of the processes (sampling) are not those of a run that was not interrupted."
        )
        return
    raise ValueError(
        f"resume_from_checkpoint: {checkpoint} was saved with {saved}; now it is {layout}. {problem}, or start a new "
        "run from its weights (model_name_or_path)."
    )
