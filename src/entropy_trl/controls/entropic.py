"""EntroPIC (arXiv 2511.15248)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from entropy_trl.controls.base import ENTROPY_TARGET, EntropyControl, check_number
from entropy_trl.tokens.types import TokenBatch, TokenEdit


@dataclass(frozen=True)
class EntroPIC(EntropyControl):
    """Hold the entropy at a target by a proportional-integral controller (EntroPIC, arXiv 2511.15248).

    To the loss of the tokens with a probability above `min_probability`, `alpha * (-r * |A|)` is added, with
    `r = exp(logp - old_logp)`, under the token weights of the policy loss. Inside the ratio clip that is a factor
    `1 + alpha` on the gradient of such a token where `A > 0` and `1 - alpha` where `A < 0`; the term itself is not
    clipped. With `e_t = H_t - entropy_target` of step `t`, `H_t` the mean entropy of its tokens,

        alpha_{t+1} = clip(k_p * e_t + k_i * sum_{s <= t} e_s, -1, 1),        alpha_1 = 0.

    Above the target alpha is positive: the likely tokens that were right rise faster, those that were wrong fall less,
    and the entropy falls. Below it is the other way round.

    The source's: the loss term, the threshold 0.95, the clip of alpha, `k_p`, `k_i`, the target 0.1 (the authors'
    code and its launch script). Three things differ from that code. It averages the term over the likely tokens alone,
    of a micro-batch; here it has the weights of the policy loss, so that `1 + alpha` and `1 - alpha` above hold
    exactly (for token-level ratios, a loss type with a ratio clip and no importance correction of vLLM's), and the term
    is weaker by the share of the likely tokens (`high_probability`). It takes `e_t` from the
    micro-batch at hand; here alpha is one number for the whole step, known before it, hence from the entropy of the
    step before, of all micro-batches and processes. And its sum of errors ends before `e_t`, here it includes it.

    Args:
        entropy_target (`float`, *optional*, defaults to `0.1`): Mean entropy to hold, nats a token, not negative.
        k_p (`float`, *optional*, defaults to `1.0`): Gain of the error, not negative.
        k_i (`float`, *optional*, defaults to `0.01`): Gain of the sum of errors, not negative.
        min_probability (`float`, *optional*, defaults to `0.95`): Tokens with a higher probability under the current
            policy get the term; in [0, 1].

    Raises:
        ValueError: If a value is out of its range.
    """

    entropy_target: float = 0.1
    k_p: float = 1.0
    k_i: float = 0.01
    min_probability: float = 0.95

    claims: ClassVar[frozenset[str]] = frozenset({ENTROPY_TARGET})

    def __post_init__(self) -> None:
        check_number("entropy_target", self.entropy_target, 0.0)
        check_number("k_p", self.k_p, 0.0)
        check_number("k_i", self.k_i, 0.0)
        check_number("min_probability", self.min_probability, 0.0, 1.0)

    def edit(self, batch: TokenBatch, selected: Tensor) -> TokenEdit:
        threshold = math.log(self.min_probability) if self.min_probability > 0 else -math.inf
        likely = (batch.logps.detach() > threshold) & batch.mask
        term = -batch.state["alpha"] * batch.log_ratio.exp() * batch.advantages.abs()
        return TokenEdit(
            penalty=term.where(likely, 0.0), metrics={"high_probability": (likely.sum(), batch.mask.sum())}
        )

    def initial_state(self) -> dict[str, float]:
        return {"alpha": 0.0, "integral": 0.0}

    def next_state(self, state: Mapping[str, float], entropy: float, progress: float) -> dict[str, float]:
        error = entropy - self.entropy_target
        integral = state["integral"] + error
        return {"alpha": min(max(self.k_p * error + self.k_i * integral, -1.0), 1.0), "integral": integral}
