"""`entropy-trl train --dry_run`: everything up to and including one optimizer step, and nothing that stays."""

import resource
import sys
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from entropy_trl.saving.run_settings import RunSettings


if TYPE_CHECKING:
    from entropy_trl.config import CovGRPOConfig
    from entropy_trl.trainer import CovGRPOTrainer

_GIB = 2**30


def leave_no_trace(args: "CovGRPOConfig") -> "TemporaryDirectory[str]":
    """Change a configuration so that its run saves, tracks, uploads and evaluates nothing.

    Returns:
        `TemporaryDirectory`: What the run writes to in place of its folder.
    """
    folder = TemporaryDirectory(prefix="entropy-trl-dry-run-")
    args.output_dir, args.report_to, args.push_to_hub = folder.name, [], False
    args.save_strategy, args.eval_strategy = type(args.save_strategy)("no"), type(args.eval_strategy)("no")
    return folder


class _OneStep(TrainerCallback):
    """End training after the first optimizer step, and log it."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl:
        control.should_log, control.should_training_stop = True, True
        return control


def try_one_step(trainer: "CovGRPOTrainer", checkpoint: str | None) -> str:
    """Make one rollout and one optimizer step, and say what memory they took.

    The weights change in memory only. The optimizer is part of the step, because its states are a large part of the
    memory.

    Args:
        trainer ([`CovGRPOTrainer`]): Made of a configuration that [`leave_no_trace`] has changed.
        checkpoint (`str`, *optional*): The checkpoint to resume from.
    """
    trainer.remove_callback(RunSettings)
    trainer.add_callback(_OneStep())
    device = trainer.accelerator.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    trainer.train(resume_from_checkpoint=checkpoint)
    if device.type == "cuda":
        used = torch.tensor(torch.cuda.max_memory_reserved(device), device=device)
        most = int(trainer.accelerator.gather(used).max())
        total = torch.cuda.get_device_properties(device).total_memory
        memory = f"{most / _GIB:.1f} of {total / _GIB:.1f} GiB on the GPU that took most"
        if trainer.args.use_vllm:
            memory += ", without vLLM's own"
    else:
        # Kilobytes on Linux, bytes on macOS.
        unit = 1 if sys.platform == "darwin" else 1024
        memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB:.1f} GiB of this process"
    return (
        f"Dry run: model, data, one rollout and one optimizer step are fine. Peak memory: {memory}. Nothing was saved."
    )
