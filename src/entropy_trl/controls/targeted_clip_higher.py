"""Entropy-targeted clip-higher (MAI-Thinking-1; ADAPO, arXiv 2603.11682)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from entropy_trl.controls.base import CLIP_RANGE, ENTROPY_TARGET, EntropyControl, check_number
from entropy_trl.tokens.types import TokenBatch, TokenEdit


@dataclass(frozen=True)
class TargetedClipHigher(EntropyControl):
    """Clip-higher whose upper bound follows the entropy (MAI-Thinking-1, "adaptive entropy control").

    The ratio `r = exp(logp - old_logp)` is clipped to `[1 - epsilon, 1 / (1 - epsilon) + k]`, which for `k = 0` is
    symmetric in `log r`. A token is stopped, with neither loss gradient nor a change of the loss's denominator, where
    `A > 0` and `r > 1 / (1 - epsilon) + k`, or `A < 0` and `r < 1 - epsilon`. After every optimizer step, with the mean
    entropy `H` of its tokens,

        k <- min(max(k + delta * sign(entropy_target - H), 0), k_max),        k = 0 at first:

    below the target the bound widens, so that unlikely tokens may rise; above it the bound narrows again.

    The source's: the bounds, the rule, the constants (the report's production values, from a summary of it), and `k`
    moving once a step. Two things differ. The report estimates `H` by importance weighting of sampled tokens; here it
    is the entropy of the whole next-token distribution, which TRL computes anyway, over all micro-batches and processes
    of the step. And its second change of the objective, which clips every ratio at 50, is not part of this control.
    ADAPO is the same idea, found independently: the upper bound grows where the entropy is too low.

    Args:
        epsilon (`float`, *optional*, defaults to `0.6`): The ratio is clipped below at `1 - epsilon`; in (0, 1).
        delta (`float`, *optional*, defaults to `0.25`): How far the upper bound moves in a step, positive.
        k_max (`float`, *optional*, defaults to `2.5`): How far it may be widened at most, not negative.
        entropy_target (`float`, *optional*, defaults to `0.3`): Mean entropy to hold, nats a token, not negative.

    Raises:
        ValueError: If a value is out of its range.
    """

    epsilon: float = 0.6
    delta: float = 0.25
    k_max: float = 2.5
    entropy_target: float = 0.3

    published_epsilon: ClassVar[tuple[float, float]] = (math.inf, math.inf)  # the clip is this control's
    acts_on_policy: ClassVar[bool] = False  # where every ratio is 1 there is nothing to clip
    drops_tokens: ClassVar[bool] = True
    claims: ClassVar[frozenset[str]] = frozenset({CLIP_RANGE, ENTROPY_TARGET})

    def __post_init__(self) -> None:
        check_number("epsilon", self.epsilon, 0.0, 1.0, low_included=False)
        if self.epsilon == 1:
            raise ValueError("`epsilon` 1 leaves no upper bound: 1 / (1 - epsilon) is infinite. The report uses 0.6.")
        check_number("delta", self.delta, 0.0, low_included=False)
        check_number("k_max", self.k_max, 0.0)
        check_number("entropy_target", self.entropy_target, 0.0)

    def edit(self, batch: TokenBatch, selected: Tensor) -> TokenEdit:
        ratio = batch.log_ratio.detach().exp()
        above = (ratio > 1 / (1 - self.epsilon) + batch.state["k"]) & (batch.advantages > 0) & batch.mask
        below = (ratio < 1 - self.epsilon) & (batch.advantages < 0) & batch.mask
        tokens = batch.mask.sum()
        metrics = {"clipped_high": (above.sum(), tokens), "clipped_low": (below.sum(), tokens)}
        return TokenEdit(advantages=torch.where(above | below, 0.0, batch.advantages), metrics=metrics)

    def initial_state(self) -> dict[str, float]:
        return {"k": 0.0}

    def next_state(self, state: Mapping[str, float], entropy: float, progress: float) -> dict[str, float]:
        direction = (entropy < self.entropy_target) - (entropy > self.entropy_target)
        return {"k": min(max(state["k"] + self.delta * direction, 0.0), self.k_max)}
