"""Advantage estimators beside TRL's: what a completion's reward is compared with, and in what unit.

All of them take the rewards of the whole rollout, of all processes, and give one advantage a completion. A completion
that no reward function could score (NaN) has the advantage 0 and counts in no mean.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor


#: `grpo` is TRL's own and is not computed here.
ESTIMATORS = ("grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "quantile")

_EPSILON = 1e-8
_GROUP_EPSILON = 1e-4  # TRL's, of the standard deviation of a group


def estimate_advantages(name: str, rewards: Tensor, num_generations: int, quantile: float = 0.4) -> Tensor:
    """Advantages of a rollout.

    - `rloo` (arXiv 2402.14740): the reward minus the mean reward of the prompt's other completions,
      `r_i - mean_{j != i} r_j = G / (G - 1) * (r_i - mean_group)`.
    - `reinforce_pp` (REINFORCE++, arXiv 2501.03262): no group baseline; whitened over the rollout,
      `(r_i - mean) / (std + 1e-8)`, with the standard deviation of a sample. The paper's KL to a reference policy
      inside the reward is not part of it: TRL's `beta` adds one to the loss.
    - `reinforce_pp_baseline` (the same): `r_i - mean_group`, then whitened over the rollout.
    - `quantile` (QAE, arXiv 2509.22611, Eq. 3): `(r_i - Q_K) / (std_group + 1e-4)`, with the K-quantile of the group's
      rewards, `Q_K = inf {x : share of rewards <= x is at least K}`, in place of their mean. `Q_K` is one of the
      rewards, and completions with that reward have the advantage 0. Of rewards 0 and 1 with the success rate p it is
      0 where `p <= 1 - K`: only the rare successes count; else 1: only the remaining failures. Differs from the
      authors' code, which interpolates between two rewards where the paper's Eq. 3 takes one of them.

    Args:
        name (`str`): One of the above.
        rewards (`Tensor` of shape (N,)): Weighted sum of the rewards of each completion; the completions of a prompt
            follow each other.
        num_generations (`int`): Completions of a prompt, G.
        quantile (`float`, *optional*, defaults to `0.4`): K of `quantile`, in (0, 1).

    Returns:
        `Tensor` of shape (N,): The advantages.
    """
    scored = ~rewards.isnan()
    if name == "rloo":
        grouped = rewards.view(-1, num_generations)
        count = scored.view(-1, num_generations).sum(1, keepdim=True)
        advantages = (grouped - grouped.nanmean(1, keepdim=True)) * count / (count - 1).clamp(min=1)
        advantages = advantages.flatten()
    elif name == "reinforce_pp":
        advantages = _whitened(rewards, scored)
    elif name == "reinforce_pp_baseline":
        grouped = rewards.view(-1, num_generations)
        advantages = _whitened((grouped - grouped.nanmean(1, keepdim=True)).flatten(), scored)
    elif name == "quantile":
        advantages = torch.cat([_above_quantile(group, quantile) for group in rewards.view(-1, num_generations)])
    else:
        raise ValueError(f"Unknown advantage estimator {name!r}: use one of {', '.join(ESTIMATORS[1:])}.")
    return advantages.where(scored, 0.0)


def _above_quantile(group: Tensor, quantile: float) -> Tensor:
    """The rewards of a prompt's completions above their quantile, in units of their standard deviation."""
    known = group[~group.isnan()].sort().values
    n = known.numel()
    if n < 2:
        return torch.zeros_like(group)
    # The smallest reward whose share of rewards at or below it is at least the quantile. Shares are compared, because
    # the product can round up: 0.07 * 100 is 7.000000000000001.
    count = math.ceil(Fraction(quantile) * n)
    if (count - 1) / n >= quantile:
        count -= 1
    baseline = known[count - 1]
    return (group - baseline) / (known.std() + _GROUP_EPSILON)


def _whitened(values: Tensor, scored: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over the scored values; all 0 if they are equal, but for rounding."""
    known = values[scored]
    if known.numel() < 2 or known.max() - known.min() <= 1e-6:  # otherwise rounding would be blown up to 1
        return torch.zeros_like(values)
    return (values - known.mean()) / (known.std() + _EPSILON)
