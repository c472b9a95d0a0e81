"""CE-GPPO (arXiv 2509.20712)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from entropy_trl.controls.base import CLIP_RANGE, EntropyControl, check_number
from entropy_trl.tokens.types import TokenBatch, TokenEdit


@dataclass(frozen=True)
class CEGPPO(EntropyControl):
    """A ratio clip that leaves the tokens outside it a bounded gradient (CE-GPPO, arXiv 2509.20712).

    With `r = exp(logp - old_logp)` and sg the stop-gradient, the loss of a token is

        -beta_low  * (1 - epsilon_low)  * r / sg(r) * A     where A < 0 and r < 1 - epsilon_low,
        -beta_high * (1 + epsilon_high) * r / sg(r) * A     where A > 0 and r > 1 + epsilon_high,
        -r * A                                              elsewhere,

    where PPO has no gradient in the first two cases. Here it is `-beta * (1 -+ epsilon) * A * d logp` there, which does
    not grow with the ratio. The first kind of token (unlikely, and wrong) lowers the entropy, the second (unlikely, and
    right) raises it: `beta_low` and `beta_high` balance the two; 0 and 0 is PPO's clip.

    Here this is an edit of the advantages, `A * beta * (1 -+ epsilon) / r` outside the range, with TRL's own ratio clip
    off, which gives the same loss and the same gradient.

    The source's: the loss, as the authors print it, and the constants: (0.5, 1) for their 1.5B model, (0.75, 1) for 7B,
    epsilon 0.2 both ways. Ours: the names (`beta1`, `beta2` there). Their code also stops negative advantages where
    `r > 10`, which is not in the paper's loss and not here.

    Args:
        beta_low (`float`, *optional*, defaults to `0.75`): Factor below the range, not negative.
        beta_high (`float`, *optional*, defaults to `1.0`): Factor above the range, not negative.
        epsilon_low (`float`, *optional*, defaults to `0.2`): The range begins at `1 - epsilon_low`; in [0, 1].
        epsilon_high (`float`, *optional*, defaults to `0.2`): The range ends at `1 + epsilon_high`; not negative.

    Raises:
        ValueError: If a value is out of its range.
    """

    beta_low: float = 0.75
    beta_high: float = 1.0
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2

    published_epsilon: ClassVar[tuple[float, float]] = (math.inf, math.inf)  # the clip is this control's
    acts_on_policy: ClassVar[bool] = False  # where every ratio is 1 there is nothing to clip
    drops_tokens: ClassVar[bool] = True  # the ratio must be a token's own
    claims: ClassVar[frozenset[str]] = frozenset({CLIP_RANGE})

    def __post_init__(self) -> None:
        check_number("beta_low", self.beta_low, 0.0)
        check_number("beta_high", self.beta_high, 0.0)
        check_number("epsilon_low", self.epsilon_low, 0.0, 1.0)
        check_number("epsilon_high", self.epsilon_high, 0.0)

    def edit(self, batch: TokenBatch, selected: Tensor) -> TokenEdit:
        ratio = batch.log_ratio.detach().to(torch.promote_types(batch.logps.dtype, torch.float32)).exp()
        lowest, highest = 1 - self.epsilon_low, 1 + self.epsilon_high
        below = (ratio < lowest) & (batch.advantages < 0) & batch.mask
        above = (ratio > highest) & (batch.advantages > 0) & batch.mask
        advantages = batch.advantages.expand_as(ratio)
        inverse = 1 / ratio.clamp(min=1e-30)  # of a smaller ratio the advantage would be infinite, and the loss NaN
        advantages = torch.where(below, advantages * (self.beta_low * lowest) * inverse, advantages)
        advantages = torch.where(above, advantages * (self.beta_high * highest) * inverse, advantages)
        tokens = batch.mask.sum()
        metrics = {"outside_low": (below.sum(), tokens), "outside_high": (above.sum(), tokens)}
        return TokenEdit(advantages=advantages.to(batch.advantages.dtype), metrics=metrics)
