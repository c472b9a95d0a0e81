"""How TRL's losses treat one token: the weight their reduction gives it, and whether their ratio clip stopped it.

TRL computes the policy loss itself. These few lines exist for what is added to it (a penalty needs the same token
weights) and for what is asked of it (Clip-Cov spares tokens that the ratio clip has stopped already). The contract
tests compare both with autograd through TRL's own loss.
"""

import torch
from torch import Tensor


#: TRL's loss types whose surrogate is clipped by the probability ratio.
CLIPPED_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
#: All loss types of TRL 1.16.
LOSS_TYPES = (*CLIPPED_LOSS_TYPES, "cispo", "sapo", "vespo")


def token_weights(
    loss_type: str,
    mask: Tensor,
    *,
    accumulation_steps: int,
    max_completion_length: int,
    step_items: Tensor | float,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight `w_t` of each token's loss in a micro-batch's training loss: `loss = sum_t w_t * loss_t`.

    Args:
        loss_type (`str`): `GRPOConfig.loss_type`.
        mask (`Tensor` of shape (B, T), bool): The tokens that the loss counts.
        accumulation_steps (`int`): Micro-batches of this optimizer step.
        max_completion_length (`int`): The constant length of `dr_grpo`.
        step_items (`Tensor` or `float`): Tokens that `dapo`, `cispo` and `vespo` divide by: those of the rollout
            batch over all processes, scaled to one optimizer step of one process.
        dtype (`torch.dtype`): Dtype of the weights.

    Returns:
        `Tensor` of shape (B, T): The weights, 0 at padding.

    Raises:
        ValueError: If the loss type is unknown.
    """
    weights = mask.to(dtype)
    rows = mask.shape[0]
    if loss_type in ("grpo", "sapo"):
        return weights / weights.sum(-1, keepdim=True).clamp(min=1.0) / rows / accumulation_steps
    if loss_type == "bnpo":
        return weights / weights.sum().clamp(min=1.0) / accumulation_steps
    if loss_type == "dr_grpo":
        return weights / (rows * max_completion_length) / accumulation_steps
    if loss_type in ("dapo", "cispo", "vespo"):
        return weights / step_items
    if loss_type == "luspo":
        return weights / rows / accumulation_steps
    raise ValueError(f"Unknown `loss_type` {loss_type!r}: entropy_trl has no token weights for it.")


def clipped_tokens(
    log_ratio: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float, delta: float | None = None
) -> Tensor:
    """Tokens that the clipped surrogate `min(min(r, delta) * A, clip(r) * A)` leaves without gradient.

    Args:
        log_ratio (`Tensor` of shape (B, T)): `log r`.
        advantages (`Tensor`, broadcastable): `A`.
        epsilon_low, epsilon_high (`float`): The ratio is clipped to `[1 - epsilon_low, 1 + epsilon_high]`.
        delta (`float`, *optional*): Upper bound of the unclipped ratio (TRL's two-sided clipping).

    Returns:
        `Tensor` of shape (B, T), bool: True where the loss has no gradient.
    """
    ratio = torch.exp(log_ratio.detach())
    lowest, highest = 1 - epsilon_low, 1 + epsilon_high
    # The smaller of two products is the one with the smaller ratio for A > 0 and with the larger for A < 0.
    stopped = (advantages > 0) & (ratio > (highest if delta is None else min(highest, delta)))
    stopped |= (advantages < 0) & (ratio < lowest)
    if delta is not None:
        stopped |= (advantages < 0) & (ratio > max(highest, delta))
    return stopped
