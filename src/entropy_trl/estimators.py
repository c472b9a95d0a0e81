"""Advantage estimators beside TRL's: what a completion's reward is compared with, and in what unit.

All of them take the rewards of the whole rollout, of all processes, and give one advantage a completion. A completion
that no reward function could score (NaN) has the advantage 0 and counts in no mean.
"""

import torch
from torch import Tensor


#: `grpo` is TRL's own and is not computed here.
ESTIMATORS = ("grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline")

_EPSILON = 1e-8


def estimate_advantages(name: str, rewards: Tensor, num_generations: int) -> Tensor:
    """Advantages of a rollout.

    - `rloo` (arXiv 2402.14740): the reward minus the mean reward of the prompt's other completions,
      `r_i - mean_{j != i} r_j = G / (G - 1) * (r_i - mean_group)`.
    - `reinforce_pp` (REINFORCE++, arXiv 2501.03262): no group baseline; whitened over the rollout,
      `(r_i - mean) / (std + 1e-8)`, with the standard deviation of a sample. The paper's KL to a reference policy
      inside the reward is not part of it: TRL's `beta` adds one to the loss.
    - `reinforce_pp_baseline` (the same): `r_i - mean_group`, then whitened over the rollout.

    Args:
        name (`str`): one of the above.
        rewards (`Tensor` of shape (N,)): weighted sum of the rewards of each completion; the completions of a prompt
            follow each other.
        num_generations (`int`): completions of a prompt, G.

    Returns:
        `Tensor` of shape (N,).
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
    else:
        raise ValueError(f"Unknown advantage estimator {name!r}: use one of {', '.join(ESTIMATORS[1:])}.")
    return advantages.where(scored, 0.0)


def _whitened(values: Tensor, scored: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over the scored values; all 0 if they are equal, but for rounding."""
    known = values[scored]
    if known.numel() < 2 or known.max() - known.min() <= 1e-6:  # otherwise rounding would be blown up to 1
        return torch.zeros_like(values)
    return (values - known.mean()) / (known.std() + _EPSILON)
