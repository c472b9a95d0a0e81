"""The token covariance of arXiv 2505.22617 over a pool of tokens, and its table by quantile."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from entropy_trl.types import MetricSum


#: The shares of tokens, by descending covariance, whose mean covariance Table 1 of arXiv 2505.22617 reports.
TABLE_1_FRACTIONS = (2e-4, 2e-3, 2e-2, 0.2, 0.5)


def token_covariance(logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Covariance contribution of each token of a pool (arXiv 2505.22617, Eq. 10).

    `cov_i = (logp_i - mean_j logp_j) * (A_i - mean_j A_j)`, the means taken over the valid tokens `j` of the pool.

    Advantages that are equal at all valid tokens give exactly 0, not rounding noise that a selection would then rank.

    Args:
        logps (`Tensor` of shape (B, T)): `logp_i`, nats. Any value at padding. No gradient flows through the result.
        advantages (`Tensor` of shape (B, 1) or (B, T)): `A_i`, before any division by token counts.
        mask (`Tensor` of shape (B, T), bool): the valid tokens.

    Returns:
        `Tensor` of shape (B, T), nats times advantage, 0 at padding; float32, or float64 for float64 log-probs.
    """
    dtype = torch.promote_types(logps.dtype, torch.float32)
    logps = logps.detach().to(dtype).where(mask, 0.0)
    row_counts = mask.sum(-1)
    count = row_counts.sum().clamp(min=1)

    # The means are sums in float64, so that they do not depend on the order of the rows. Advantages are shifted by one
    # of their own values first: then equal advantages have a mean of exactly 0.
    shifted = advantages.detach().double()
    if advantages.shape[1] == 1:
        shifted = shifted - shifted[(row_counts > 0).int().argmax()]
        mean_advantage = (shifted[:, 0] * row_counts).sum() / count
    else:
        shifted = shifted - shifted.flatten()[mask.flatten().int().argmax()]
        mean_advantage = shifted.where(mask, 0.0).sum() / count
    mean_logp = logps.sum(dtype=torch.float64) / count
    covariance = (logps - mean_logp.to(dtype)) * (shifted - mean_advantage).to(dtype)
    return covariance.where(mask, 0.0)


def covariance_metrics(covariance: Tensor, mask: Tensor, selected: Tensor) -> dict[str, MetricSum]:
    """The pool's covariance as sums and counts: overall, of the selected tokens, and by quantile (Table 1).

    Args:
        covariance (`Tensor` of shape (B, T)): from [`token_covariance`].
        mask (`Tensor` of shape (B, T), bool): the valid tokens.
        selected (`Tensor` of shape (B, T), bool): the tokens that a control restrains.

    Returns:
        `cov_mean`, `cov_selected_mean`, `selected_fraction` and, for each `q` of `TABLE_1_FRACTIONS`, `cov_top_<q>`:
        the mean covariance of the `floor(q * N)` (at least one) tokens with the highest covariance.
    """
    ordered = covariance[mask].sort(descending=True).values
    sums = {
        "cov_mean": (ordered.sum(dtype=torch.float64), mask.sum()),
        "cov_selected_mean": (covariance.where(selected, 0.0).sum(dtype=torch.float64), selected.sum()),
        "selected_fraction": (selected.sum(), mask.sum()),
    }
    for fraction, top in zip(TABLE_1_FRACTIONS, top_counts(TABLE_1_FRACTIONS, ordered.numel()), strict=True):
        sums[f"cov_top_{fraction:g}"] = (ordered[:top].sum(dtype=torch.float64), torch.tensor(top))
    return sums


def top_counts(fractions: Sequence[float], total: int) -> list[int]:
    """`floor(fraction * total)` for each fraction, at least one token while there is any."""
    return [min(max(math.floor(fraction * total), 1), total) for fraction in fractions]
