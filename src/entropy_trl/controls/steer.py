"""STEER (arXiv 2510.10150)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from entropy_trl.controls.base import TOKEN_WEIGHTS, EntropyControl, check_number
from entropy_trl.tokens.types import Selection, TokenBatch, TokenEdit


@dataclass(frozen=True)
class Steer(EntropyControl):
    """Weigh a token the less, the more its update changes the entropy (STEER, arXiv 2510.10150).

    What a token does to the entropy at its position is measured by

        Omega = A / pi_old * p * (1 - p) * (ln p + H),        p = exp(logp), pi_old = exp(old_logp),

    with the entropy `H` of the next-token distribution there. (Ours: this is the first-order change by the token's own
    logit, [`estimated_entropy_change`], over `-p`; so it gives unlikely tokens more than their part.) Its gradient is
    multiplied by

        w = exp(-kappa * |Omega|),        kappa = -ln(weight_min) / max(max_j |Omega_j|, omega_floor),

    so the token that changes the entropy most has the weight `weight_min`, unless all change it little: below
    `omega_floor` there is nothing to steady. The weight is a detached factor on the advantage: TRL's loss with its
    ratio clip, here that of the paper (0.2, 0.28), stays as it is.

    The source's: everything above, with its constants, as in the authors' code. Ours: the maximum is that of the pool,
    in the authors' code that of a micro-batch on one process (`entropy_control_pool="micro_batch"` here); `H` is that
    of the current policy, like `p`, where their code takes the rollout's. The pool is scored by the current policy,
    so a step of several micro-batches costs one more forward pass without gradient. Their second bound of the ratio
    for negative advantages, 10, is TRL's `delta` and not set here.

    Args:
        weight_min (`float`, *optional*, defaults to `0.8`): The smallest weight, in (0, 1].
        omega_floor (`float`, *optional*, defaults to `0.02`): Maximum of `|Omega|` up to which weights stay above
            `weight_min`; positive.

    Raises:
        ValueError: If a value is out of its range.
    """

    weight_min: float = 0.8
    omega_floor: float = 0.02

    published_epsilon: ClassVar[tuple[float, float]] = (0.2, 0.28)
    drops_tokens: ClassVar[bool] = True  # weighs single tokens, which one ratio for the whole sequence does not allow
    needs_pool: ClassVar[bool] = True
    scores_entropies: ClassVar[bool] = True
    claims: ClassVar[frozenset[str]] = frozenset({TOKEN_WEIGHTS})

    def __post_init__(self) -> None:
        check_number("weight_min", self.weight_min, 0.0, 1.0, low_included=False)
        check_number("omega_floor", self.omega_floor, 0.0, low_included=False)

    def select(self, pool: TokenBatch) -> Selection:
        largest = -pool.ranks.min(-omega(pool).abs().max())
        metrics = {"omega_max": (largest, torch.ones_like(largest))}
        return Selection(torch.zeros_like(pool.mask), metrics=metrics, shared={"omega_max": largest})

    def edit(self, batch: TokenBatch, selected: Tensor) -> TokenEdit:
        kappa = -math.log(self.weight_min) / batch.shared["omega_max"].clamp(min=self.omega_floor)
        # Clamped because the pool's forward pass and the loss's may differ by rounding.
        weights = torch.exp(-kappa * omega(batch).abs()).clamp(min=self.weight_min)
        weights = weights.to(batch.advantages.dtype)
        tokens = batch.mask.sum()
        metrics = {"weight_mean": (weights.where(batch.mask, 0.0).sum(dtype=torch.float64), tokens)}
        return TokenEdit(advantages=weights * batch.advantages, metrics=metrics)


def omega(batch: TokenBatch) -> Tensor:
    """`Omega` of every token, (B, T), nats times advantage, without gradient; 0 at padding."""
    if batch.entropies is None:
        raise ValueError("STEER needs the entropies of the tokens (`TokenBatch.entropies`), which are missing.")
    dtype = torch.promote_types(batch.logps.dtype, torch.float32)
    logps, log_ratio = batch.logps.detach().to(dtype), batch.log_ratio.detach().to(dtype)
    # A / pi_old * p is A * r, and at padding 1 - p is 0.
    return batch.advantages * log_ratio.exp() * -logps.expm1() * (logps + batch.entropies)
