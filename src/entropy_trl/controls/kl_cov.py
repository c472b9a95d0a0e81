"""KL-Cov (arXiv 2505.22617, Eqs. 13-14)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from entropy_trl.controls.base import check_fraction, check_selection
from entropy_trl.controls.target import CovarianceControl, select_signed, target_of
from entropy_trl.tokens.covariance import token_covariance
from entropy_trl.tokens.dense import count_true
from entropy_trl.tokens.selection import draw_mask, selection_count, top_k_mask
from entropy_trl.tokens.types import Selection, TokenBatch, TokenEdit


@dataclass(frozen=True)
class KLCov(CovarianceControl):
    """Penalise the highest-covariance tokens for leaving the rollout's policy (arXiv 2505.22617, Eqs. 13-14).

    The `floor(fraction * N)` tokens of the pool (at least one) with the largest covariance get
    `-A * r + coef * |logp - old_logp|`, with `r = exp(logp - old_logp)`; the others `-A * r`. As published, neither is
    clipped by the ratio: `CovGRPOConfig(epsilon=None)`, the default, gives exactly that.

    The penalty carries gradient through `logp` only; its sign is that of `logp - old_logp`, full strength however
    small the difference. While the policy is still the one that made the rollout the gradient is 0, so the method needs
    several updates a rollout; and where two forward passes of one policy differ, by rounding or by dropout, the sign is
    noise. The metric `selected_at_rounding` is the share of penalised tokens whose difference is no larger than that.

    Differs from the authors' code: the pool may be the whole optimizer step; ties go to the first token.

    Args:
        fraction (`float`, *optional*, defaults to `2e-3`): Share of the pool's tokens to penalise, in (0, 1]. The paper
            uses 2e-3 for 7B and 2e-4 for 32B models.
        coef (`float`, *optional*, defaults to `1.0`): Weight of the penalty, not negative.
        selection (`str`, *optional*, defaults to `"covariance"`): `"random"` penalises as many tokens drawn from all
            of them: the null hypothesis that the covariance does not matter.
        entropy_target (`float` or `Mapping`, *optional*): The entropy to hold, in nats a token, or `{"share": 0.5}` of
            the entropy at the start. The fraction then moves, through 0, from `-max_fraction` to `max_fraction`; where
            it is negative, the tokens are those with the lowest covariance. With a target the marked tokens lose their
            policy gradient, as in Clip-Cov; those with the highest covariance have the penalty alone. (Ours: the
            penalty beside the policy gradient slows a fall of the entropy and cannot raise it, and on the lowest
            covariances it slows a fall too.) `fraction` is the controller's unit. See [`EntropyTarget`].
        entropy_controller (`Mapping[str, float]`, *optional*): Gains and bounds of the [`EntropyTarget`].

    Raises:
        ValueError: If a value is out of its range.
    """

    fraction: float = 2e-3
    coef: float = 1.0
    selection: str = "covariance"
    entropy_target: float | Mapping[str, float] | None = None
    entropy_controller: Mapping[str, float] | None = None

    published_epsilon: ClassVar[tuple[float, float]] = (math.inf, math.inf)
    acts_on_policy: ClassVar[bool] = False
    needs_pool: ClassVar[bool] = True

    @property
    def drops_tokens(self) -> bool:  # type: ignore[override]
        return self.target is not None

    def __post_init__(self) -> None:
        check_fraction(self.fraction)
        check_selection(self.selection)
        if not (math.isfinite(self.coef) and self.coef >= 0):
            raise ValueError(
                f"`coef` must be finite and not negative, got {self.coef!r}: a negative penalty would drive the "
                "selected tokens away from the rollout's policy. The paper uses 1."
            )
        target_of(self.entropy_target, self.fraction, self.entropy_controller, self.selection)

    def select(self, pool: TokenBatch) -> Selection:
        covariance = token_covariance(pool.logps, pool.advantages, pool.mask, pool.ranks)
        if self.target is not None:
            return Selection(select_signed(covariance, pool.mask, pool.state["actuator"], pool), covariance)
        k = selection_count(self.fraction, int(pool.ranks.sum(count_true(pool.mask))))
        if self.selection == "covariance":
            selected = top_k_mask(covariance, pool.mask, k, pool.row_ids, pool.ranks)
        else:
            selected = draw_mask(pool.mask, pool.row_ids, k, pool.seed, pool.ranks)
        return Selection(selected, covariance)

    def edit(self, batch: TokenBatch, selected: Tensor) -> TokenEdit:
        dropped = None
        if self.target is not None:
            dropped = batch.advantages.masked_fill(selected, 0.0)
            if batch.state["actuator"] < 0:
                return TokenEdit(advantages=dropped)
        distance = batch.log_ratio.abs()
        noise = batch.rounding * batch.logps.detach().abs().clamp(min=1.0)
        at_rounding = (distance.detach() <= noise) & selected
        metrics = {
            "selected_abs_log_ratio": (distance.detach().where(selected, 0.0).sum(dtype=torch.float64), selected.sum()),
            "selected_at_rounding": (at_rounding.sum(), selected.sum()),
        }
        return TokenEdit(dropped, (self.coef * distance).where(selected, 0.0), metrics)
