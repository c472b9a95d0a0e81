"""Restore TRL's clip metrics to those of the advantages before the control edited them."""

from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer
from trl.trainer.utils import nanmax, nanmin

from entropy_trl.loss.reduction import CLIPPED_LOSS_TYPES
from entropy_trl.tokens.types import TokenBatch


def restore_clip_metrics(trainer: GRPOTrainer, batch: TokenBatch, inputs: dict[str, Any]) -> None:
    """Replace the clip metrics that TRL has just logged, which it computed from the edited advantages.

    Args:
        trainer ([`~trl.GRPOTrainer`]): The trainer. Its last logged values are replaced.
        batch ([`TokenBatch`]): The micro-batch, with the advantages before the edit.
        inputs (`dict`): TRL's inputs of the loss.
    """
    metrics = trainer._metrics["train"]
    if trainer.loss_type in CLIPPED_LOSS_TYPES:
        ratio = batch.log_ratio.detach().exp()
        if trainer.args.delta is not None:
            ratio = ratio.clamp(max=trainer.args.delta)  # TRL counts what is left after it
        low = (ratio < 1 - trainer.epsilon_low) & (batch.advantages < 0)
        high = (ratio > 1 + trainer.epsilon_high) & (batch.advantages > 0)
        means = _means(trainer, batch.mask, low, high, low | high)
        for name, mean in zip(("low", "high", "region"), means, strict=True):
            metrics[f"clip_ratio/{name}_mean"][-1] = mean
        # By row; a row without tokens has no ratio and does not count.
        rows = [side.where(batch.mask, False).sum(-1) / batch.mask.sum(-1) for side in (low, high)]
        low_rows, high_rows = trainer.accelerator.gather(torch.stack(rows, dim=1)).unbind(1)
        metrics["clip_ratio/low_min"][-1] = nanmin(low_rows).item()
        metrics["clip_ratio/high_max"][-1] = nanmax(high_rows).item()
    elif trainer.loss_type == "cispo":
        clipped = (batch.log_ratio.detach().exp() > trainer.epsilon_high) & (batch.advantages > 0)
        (metrics["cispo_clip_ratio"][-1],) = _means(trainer, batch.mask, clipped)
    elif trainer.loss_type == "vespo":
        weights = trainer.get_gamma_weights(
            advantages=batch.advantages,
            log_ratio_per_token=batch.log_ratio,
            mask=batch.mask,
            importance_sampling_ratio=inputs.get("importance_sampling_ratio"),
            k_pos=trainer.args.vespo_k_pos,
            lambda_pos=trainer.args.vespo_lambda_pos,
            k_neg=trainer.args.vespo_k_neg,
            lambda_neg=trainer.args.vespo_lambda_neg,
        )
        # One weight a row, unless the advantages are one a token.
        mask = batch.mask if weights.shape[1] > 1 else torch.ones_like(weights, dtype=torch.bool)
        (metrics["vespo/phi_seq_mean"][-1],) = _means(trainer, mask, weights)


def _means(trainer: GRPOTrainer, mask: Tensor, *values: Tensor) -> list[float]:
    """Means over the valid tokens of all ranks, in one collective."""
    sums = torch.stack([*((value * mask).sum() for value in values), mask.sum()]).double()
    *totals, count = trainer.accelerator.reduce(sums, reduction="sum").tolist()
    return [total / max(count, 1.0) for total in totals]
