"""How much the completions of a prompt differ: what entropy is meant to protect."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def completion_digests(completion_ids: Sequence[Sequence[int]]) -> Tensor:
    """A 64-bit digest of each completion's tokens, so that processes can count distinct ones without exchanging them.

    Args:
        completion_ids (`Sequence` of B token id sequences): As generated, without padding. The loss's mask does not
            do: `mask_truncated_completions` empties it.

    Returns:
        `Tensor` of shape (B,), int64: The digests. Equal tokens have equal digests, and different ones differ
        up to chance (1e-12 for ten thousand completions).
    """
    digests = [
        hashlib.blake2b(np.asarray(ids, dtype=np.int64).tobytes(), digest_size=8).digest() for ids in completion_ids
    ]
    return torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests], dtype=torch.int64)


def diversity_metrics(digests: Tensor, correct: Tensor, group_size: int) -> dict[str, float]:
    """Distinct completions, distinct correct ones, and solved prompts, as means over the groups.

    Args:
        digests (`Tensor` of shape (N,), int64): One for each completion, the completions of a prompt side by side.
        correct (`Tensor` of shape (N,), bool): Whether the completion is right.
        group_size (`int`): Completions a prompt.

    Returns:
        `dict[str, float]`: `distinct_completions`: different completions of a prompt, from 1 to `group_size`.
        `distinct_correct`: different correct ones, from 0. `solved`: share of the prompts with a correct one.
    """
    groups = list(zip(digests.view(-1, group_size).tolist(), correct.view(-1, group_size).tolist(), strict=True))
    right = [{digest for digest, is_right in zip(*group, strict=True) if is_right} for group in groups]
    return {
        "distinct_completions": sum(len(set(of_prompt)) for of_prompt, _ in groups) / len(groups),
        "distinct_correct": sum(map(len, right)) / len(groups),
        "solved": sum(map(bool, right)) / len(groups),
    }
