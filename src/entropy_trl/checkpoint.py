"""The rollout in a checkpoint: what TRL does not save, so that a run may stop and go on inside a rollout.

One file a process, `rollout_rank<k>.safetensors`, beside what TRL saves: the tensors of each micro-batch, and in its
header, as JSON, the position in the rollout and what is not a tensor.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file


MicroBatch = dict[str, Any]


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
