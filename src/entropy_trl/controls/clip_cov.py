"""Clip-Cov (arXiv 2505.22617, Eqs. 11-12)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from entropy_trl.controls.base import (
    SELECTIONS,
    check_fraction,
    check_selection,
)
from entropy_trl.controls.target import CovarianceControl, select_signed, target_of
from entropy_trl.tokens.covariance import token_covariance
from entropy_trl.tokens.dense import count_true, true_indices
from entropy_trl.tokens.selection import draw_from, draw_mask, selection_count, top_k_mask
from entropy_trl.tokens.types import Selection, TokenBatch, TokenEdit


@dataclass(frozen=True)
class ClipCov(CovarianceControl):
    """Take a few high-covariance tokens out of the policy gradient (arXiv 2505.22617, Eqs. 11-12).

    Of the pool's `N` tokens, `floor(fraction * N)` are drawn uniformly from those with
    `cov_low < cov_i < cov_high`. A drawn token contributes neither loss nor gradient: its advantage is set to 0, the
    loss's denominator stays. The other tokens keep TRL's loss.

    At least one token is drawn if the band has any, and never more than the band has. Tokens that the ratio clip
    already leaves without gradient are not drawn, where the pool's scores can tell (`TokenBatch.clipped`).

    Differs from the authors' code: the draw is a function of (seed, step, row, position), so it repeats after a resume
    and does not depend on the micro-batches; the pool may be the whole optimizer step.

    Args:
        fraction (`float`, *optional*, defaults to `2e-4`): Share of the pool's tokens to drop, in (0, 1].
        cov_low (`float`, *optional*, defaults to `1.0`): Lower bound of the band, excluded; nats times advantage.
        cov_high (`float`, *optional*, defaults to `5.0`): Upper bound of the band, excluded.
        selection (`str`, *optional*, defaults to `"covariance"`): `"random"` drops as many tokens, drawn from all
            tokens instead of the band: the null hypothesis that the covariance does not matter. In a pool of one
            sequence, which has no band, it drops `floor(fraction * N)`. `"top"` drops as many tokens too, those with
            the highest covariance, above the band or in it: a comparison that shows what the draw is for.
        entropy_target (`float` or `Mapping`, *optional*): The entropy to hold, in nats a token, or `{"share": 0.5}` of
            the entropy at the start. The fraction then moves, through 0, from `-max_fraction` to `max_fraction`; the
            tokens are those with the highest covariance (the lowest where the fraction is negative), and the band does
            not matter. `fraction` is the controller's unit. See [`EntropyTarget`].
        entropy_controller (`Mapping[str, float]`, *optional*): Gains and bounds of the [`EntropyTarget`].

    Raises:
        ValueError: If a value is out of its range or the band is empty.
    """

    fraction: float = 2e-4
    cov_low: float = 1.0
    cov_high: float = 5.0
    selection: str = "covariance"
    entropy_target: float | Mapping[str, float] | None = None
    entropy_controller: Mapping[str, float] | None = None

    published_epsilon: ClassVar[tuple[float, float]] = (1.0, 1.0)
    drops_tokens: ClassVar[bool] = True
    needs_pool: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fraction(self.fraction)
        check_selection(self.selection, (*SELECTIONS, "top"))
        if not self.cov_low < self.cov_high or math.isinf(self.cov_low):
            raise ValueError(
                f"The covariance band ({self.cov_low}, {self.cov_high}) is empty or has no finite lower bound: no "
                "token can be told from the rest. Give `cov_low` < `cov_high`; the paper uses 1 and 5."
            )
        target_of(self.entropy_target, self.fraction, self.entropy_controller, self.selection)

    def select(self, pool: TokenBatch) -> Selection:
        covariance = token_covariance(pool.logps, pool.advantages, pool.mask, pool.ranks)
        if self.target is not None:
            return Selection(select_signed(covariance, _eligible(pool), pool.state["actuator"], pool), covariance)
        # By index: few tokens lie above the lower bound, and each further mask costs a pass over the pool.
        band = true_indices((covariance > self.cov_low).flatten())
        allowed = (covariance.flatten()[band] < self.cov_high) & pool.mask.flatten()[band]
        if pool.clipped is not None:
            allowed &= ~pool.clipped.flatten()[band]
        band = band[allowed]
        tokens, in_band = count_true(pool.mask), torch.tensor(band.numel(), device=pool.mask.device)
        pool_tokens, pool_in_band = pool.ranks.sum(torch.stack([tokens, in_band])).tolist()
        n = selection_count(self.fraction, pool_tokens)
        one_sequence = pool.mask.shape[0] == 1 and not pool.ranks.several
        has_band = self.compares_sequences or not one_sequence
        if has_band:
            n = min(n, pool_in_band)
        if self.selection == "covariance":
            selected = draw_from(band, pool.mask.shape, pool.row_ids, n, pool.seed, pool.ranks)
        elif self.selection == "top":
            selected = top_k_mask(covariance, _eligible(pool), n, pool.row_ids, pool.ranks)
        else:
            selected = draw_mask(_eligible(pool), pool.row_ids, n, pool.seed, pool.ranks)
        metrics = {"in_band_fraction": (in_band, tokens)}
        return Selection(selected, covariance, metrics, candidates=int(pool_in_band) if has_band else None)

    def edit(self, batch: TokenBatch, selected: Tensor) -> TokenEdit:
        # The metric that a pool scored with the rollout's policy needs: draws that the ratio clip made redundant.
        clipped = torch.zeros_like(selected) if batch.clipped is None else batch.clipped
        metrics = {"selected_already_clipped": ((clipped & selected).sum(), selected.sum())}
        return TokenEdit(advantages=batch.advantages.masked_fill(selected, 0.0), metrics=metrics)


def _eligible(pool: TokenBatch) -> Tensor:
    """The tokens that the ratio clip has left in the loss."""
    return pool.mask if pool.clipped is None else pool.mask & ~pool.clipped
