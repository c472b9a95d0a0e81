"""The token covariance of arXiv 2505.22617 over a pool of tokens, and its table by quantile."""

import torch
from torch import Tensor

from entropy_trl.tokens.dense import compact, count_true, exact_sum, row_counts
from entropy_trl.tokens.ranks import ONE_PROCESS, Ranks
from entropy_trl.tokens.selection import selection_count, top_sums
from entropy_trl.tokens.types import MetricSum


#: The shares of tokens, by descending covariance, whose mean covariance Table 1 of arXiv 2505.22617 reports.
TABLE_1_FRACTIONS = (2e-4, 2e-3, 2e-2, 0.2, 0.5)


def token_covariance(logps: Tensor, advantages: Tensor, mask: Tensor, ranks: Ranks = ONE_PROCESS) -> Tensor:
    """Covariance contribution of each token of a pool (arXiv 2505.22617, Eq. 10).

    `cov_i = (logp_i - mean_j logp_j) * (A_i - mean_j A_j)`, the means taken over the valid tokens `j` of the pool.

    Advantages that are equal at all valid tokens give exactly 0, not rounding noise that a selection would then rank.

    Args:
        logps (`Tensor` of shape (B, T)): `logp_i`, nats. Any value at padding. No gradient flows through the result.
        advantages (`Tensor` of shape (B, 1) or (B, T)): `A_i`, before any division by token counts.
        mask (`Tensor` of shape (B, T), bool): The valid tokens.
        ranks ([`Ranks`], *optional*): The processes that share the pool. Communication: 4 numbers of 8 bytes.

    Returns:
        `Tensor` of shape (B, T): Nats times advantage, 0 at padding; float32, or float64 for float64 log-probs.
    """
    dtype = torch.promote_types(logps.dtype, torch.float32)
    zero = logps.new_zeros((), dtype=dtype)
    logps = logps.detach().to(dtype)
    counts = row_counts(mask)

    # The means are sums in float64, so that they do not depend on the order of the rows. Advantages are shifted by
    # their minimum first: then equal advantages have a mean of exactly 0.
    shifted = advantages.detach().double()
    valid = (counts > 0)[:, None] if advantages.shape[1] == 1 else mask
    lowest = torch.where(valid, shifted, torch.inf)
    shifted = shifted - ranks.min(lowest.min() if lowest.numel() else lowest.new_tensor(torch.inf))
    weights = counts[:, None] if advantages.shape[1] == 1 else 1
    sums = [
        exact_sum(compact(logps, mask)),
        (shifted.where(valid, 0.0) * weights).sum(),
        counts.sum().double(),
    ]
    logp_sum, advantage_sum, count = ranks.sum(torch.stack(sums))
    mean_logp, mean_advantage = logp_sum / count.clamp(min=1), advantage_sum / count.clamp(min=1)
    # In place: a fresh tensor of this size costs several times the arithmetic.
    covariance = (logps - mean_logp.to(dtype)).mul_((shifted - mean_advantage).to(dtype))
    return torch.where(mask, covariance, zero, out=covariance)


def covariance_metrics(
    covariance: Tensor, mask: Tensor, selected: Tensor, ranks: Ranks = ONE_PROCESS
) -> dict[str, MetricSum]:
    """The pool's covariance as sums and counts: overall, of the selected tokens, and by quantile (Table 1).

    Args:
        covariance (`Tensor` of shape (B, T)): From [`token_covariance`].
        mask (`Tensor` of shape (B, T), bool): The valid tokens.
        selected (`Tensor` of shape (B, T), bool): The tokens that a control restrains.
        ranks ([`Ranks`], *optional*): The processes that share the pool. Communication: see [`top_sums`].

    Returns:
        `dict[str, MetricSum]`: `cov_mean`, `cov_selected_mean`, `selected_fraction` and, for each `q` of
        `TABLE_1_FRACTIONS`, `cov_top_<q>`: the mean covariance of the `floor(q * N)` (at least one) tokens with the
        highest covariance. This process's part: sums and counts add up to the pool's.
    """
    values = compact(covariance, mask)
    tokens, selected_tokens = count_true(mask), count_true(selected)
    # From the largest share to the smallest. The count of the tokens on top is one of the whole pool: its share of each
    # process is that process's share of the pool's tokens, so that the counts add up.
    pool_tokens = int(ranks.sum(tokens))
    fractions = TABLE_1_FRACTIONS[::-1]
    tops = [selection_count(fraction, pool_tokens) for fraction in fractions]
    whole, totals = top_sums(values, tops, ranks)
    sums: dict[str, MetricSum] = {
        "cov_mean": (whole, tokens),
        "cov_selected_mean": (exact_sum(compact(covariance, selected)), selected_tokens),
        "selected_fraction": (selected_tokens, tokens),
    }
    for fraction, top, total in zip(fractions, tops, totals, strict=True):
        sums[f"cov_top_{fraction:g}"] = (total, top * tokens / max(pool_tokens, 1))
    return sums
