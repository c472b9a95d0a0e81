"""The weights of a sharded run (ZeRO, FSDP), compared with those that were saved, shard by shard.

DeepSpeed and torch restore shards by their own names and formats. Each process keeps a sample of its shards beside
them, and compares it with what it has after a resume.
"""

import json
import logging
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.integrations import is_deepspeed_zero3_enabled

from entropy_trl.files import write_text


logger = logging.getLogger(__name__)


def shards_file(checkpoint: str | Path, rank: int) -> Path:
    """Where process `rank` keeps the sample of its shards."""
    return Path(checkpoint) / f"weights_rank{rank}.json"


def save_shard_sample(model: nn.Module, checkpoint: Path, rank: int, processes: int) -> None:
    """Keep the size and the first, middle and last element of each shard of this process."""
    stored = {"processes": processes, "weights": _sample(model)}
    write_text(shards_file(checkpoint, rank), json.dumps(stored) + "\n")


def check_shards(model: nn.Module, checkpoint: Path, rank: int, processes: int) -> None:
    """Compare the weights of this process with the sample in a checkpoint.

    Args:
        model (`nn.Module`): The model after DeepSpeed or torch restored it.
        checkpoint (`Path`): The checkpoint folder.
        rank, processes (`int`): This process, of how many. Shards of another number of processes are not compared.

    Raises:
        ValueError: If they differ.
    """
    file = shards_file(checkpoint, rank)
    stored = json.loads(file.read_text()) if file.exists() else {}
    if stored.get("processes") != processes:
        if rank == 0:
            logger.warning(
                f"The restored weights were not compared with {checkpoint}: it has no sample of the shards of "
                f"{processes} processes."
            )
        return
    before, now = stored["weights"], json.loads(json.dumps(_sample(model)))
    # As text, in which NaN equals itself.
    names = sorted(n for n in before.keys() | now.keys() if json.dumps(before.get(n)) != json.dumps(now.get(n)))
    if names:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise ValueError(
            f"The weights restored from {checkpoint} are not those that were saved ({shown}): training would go on "
            "from other weights. Resume with the model, adapter and versions that wrote the checkpoint, or from "
            "another one."
        )


def _sample(model: nn.Module) -> dict[str, list[Any]]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not is_peft_model(model):  # a checkpoint of an adapter has no other weights
            shard = _local(parameter).detach().reshape(-1)
            places = sorted({0, len(shard) // 2, len(shard) - 1}) if len(shard) else []
            found[name] = [len(shard), *(float(shard[i]) for i in places)]
    return found


def _local(parameter: Any) -> Tensor:
    if is_deepspeed_zero3_enabled():
        shard: Tensor = parameter.ds_tensor
        return shard
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
