"""The four entropy regions of arXiv 2602.09782: which tokens raise entropy, and by how much. Needs torch only.

A token belongs to a region by its surprisal `-ln p` against the entropy `H` of its distribution, and by the sign of its
advantage `A`:

    e1: -ln p < H, A > 0   lowers entropy      e3: -ln p < H, A < 0   raises entropy
    e2: -ln p > H, A > 0   raises entropy      e4: -ln p > H, A < 0   lowers entropy

A token with `A = 0`, or whose surprisal is the entropy, belongs to none.

To first order, a step `eta` on the logits of one state along the gradient of the token's objective `J = r A` changes
that state's entropy by `eta <grad_z J, grad_z H> = -eta r A [p (ln p + H) - S]`, `S = sum_x p_x^2 (ln p_x + H)`
([`entropy_change`]). This is Theorem 3.3 of arXiv 2602.03392; see also arXiv 2605.11775 and arXiv 2606.19236.

What we add: `S` is the covariance of `p_x` and `ln p_x` under the policy and hence never negative. So for e2 and e4 the
sign above is certain. For e1 and e3 it is wrong exactly where `0 < p (ln p + H) < S`, that is for tokens that are not
much less surprising than the mean.
"""

from typing import Final

import torch
from torch import Tensor

from entropy_trl.tokens.types import MetricSum, TokenBatch


REGIONS: Final = ("e1", "e2", "e3", "e4")


def token_regions(logps: Tensor, entropies: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """The region of each token.

    Args:
        logps (`Tensor` of shape (B, T)): `ln p` of the tokens under the current policy, nats.
        entropies (`Tensor` of shape (B, T)): `H` of their distributions, nats.
        advantages (`Tensor` of shape (B, 1) or (B, T)): `A`.
        mask (`Tensor` of shape (B, T), bool): The valid tokens.

    Returns:
        `Tensor` of shape (B, T), int8: 1 to 4 for `REGIONS`, 0 for none and at padding.
    """
    surprise = -logps.detach() - entropies.detach()
    expected, surprising = mask & (surprise < 0), mask & (surprise > 0)
    regions = torch.zeros_like(mask, dtype=torch.int8)
    for number, tokens in enumerate(
        (
            expected & (advantages > 0),
            surprising & (advantages > 0),
            expected & (advantages < 0),
            surprising & (advantages < 0),
        ),
        start=1,
    ):
        regions = regions.masked_fill(tokens, number)
    return regions


def entropy_change(logits: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
    """`<grad_z J, grad_z H>` of each token: the first-order change of its state's entropy, from the full distribution.

    `-w [p (ln p + H) - sum_x p_x^2 (ln p_x + H)]`, with `w = r A` the derivative of the token's objective by `ln p`
    (arXiv 2602.03392, Theorem 3.3). Times the step `eta` on the logits it is the change in nats.

    Args:
        logits (`Tensor` of shape (..., V)): Logits of the next-token distributions.
        tokens (`Tensor` of shape (...), int64): The sampled tokens.
        weights (`Tensor` of shape (...)): `w`.

    Returns:
        `Tensor` of shape (...): The change of each distribution's entropy.
    """
    logps = logits.log_softmax(-1)
    probabilities = logps.exp()
    # A token that cannot come has no part in any of the sums.
    entropies = torch.special.entr(probabilities).sum(-1, keepdim=True)
    terms = (probabilities * (logps + entropies)).where(probabilities > 0, 0.0)
    chosen = terms.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return -weights * (chosen - (probabilities * terms).sum(-1))


def estimated_entropy_change(logps: Tensor, entropies: Tensor, weights: Tensor) -> Tensor:
    """[`entropy_change`] without the full distribution, as a loss knows its tokens: `-w p (1 - p) (ln p + H)`.

    Of the sum over the vocabulary only the token's own term is kept. With `w = r A` the sign is that of the token's
    region, always (another `w`, with a penalty in it, can turn it); see docs/methods.md for how far the size is from
    the exact one.

    Args:
        logps, entropies, weights (`Tensor` of shape (B, T)): `ln p`, `H` and `w = r A` of the tokens.
    """
    probabilities = logps.exp()
    return -weights * probabilities * (1 - probabilities) * (logps + entropies)


def region_metrics(batch: TokenBatch, weights: Tensor | None = None) -> dict[str, MetricSum]:
    """What each region has in a micro-batch: tokens, gradient, and the change of entropy to be expected from it.

    For each region `e` of `REGIONS`, with the derivative `w` of each token's objective by `ln p`:

    - `<e>_tokens`: its share of the valid tokens.
    - `<e>_stopped`: the share of its tokens that have no gradient, `w = 0`.
    - `<e>_gradient`: its share of `sum |w| (1 - p)`, the size of the gradient by the sampled token's own logit (its
      norm over all logits is 1 to sqrt(2) times that).
    - `<e>_entropy`: its part of the change of entropy per token and unit of step on the logits, nats
      ([`estimated_entropy_change`]).

    Args:
        batch ([`TokenBatch`]): The tokens, with their entropies; the advantages before any edit.
        weights (`Tensor` of shape (B, T), *optional*): `w`. Defaults to that of the unclipped surrogate, `r A`.

    Raises:
        ValueError: If the batch has no entropies.
    """
    if batch.entropies is None:
        raise ValueError("`region_metrics` needs the entropies of the tokens, which `batch.entropies` has not.")
    dtype = torch.promote_types(batch.logps.dtype, torch.float32)
    logps, entropies = batch.logps.detach().to(dtype), batch.entropies.to(dtype)
    regions = token_regions(logps, entropies, batch.advantages, batch.mask)
    if weights is None:
        weights = batch.advantages * batch.log_ratio.detach().to(dtype).exp()
    weights = weights.to(dtype).where(batch.mask, 0.0)
    gradient = weights.abs() * (1 - logps.exp())
    change = estimated_entropy_change(logps, entropies, weights)
    tokens, whole = batch.mask.sum(), gradient.sum(dtype=torch.float64)
    metrics: dict[str, MetricSum] = {}
    for number, name in enumerate(REGIONS, start=1):
        region = regions == number
        metrics[f"{name}_tokens"] = (region.sum(), tokens)
        metrics[f"{name}_stopped"] = ((region & (weights == 0)).sum(), region.sum())
        metrics[f"{name}_gradient"] = (gradient.where(region, 0.0).sum(dtype=torch.float64), whole)
        metrics[f"{name}_entropy"] = (change.where(region, 0.0).sum(dtype=torch.float64), tokens)
    return metrics
