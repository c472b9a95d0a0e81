"""Boolean indexing and the largest values of big tensors. Needs torch and NumPy.

On a CPU, NumPy does these several times faster than torch, with the same result: it copies runs of true entries at
once, and its partial sort is vectorised. Elsewhere torch does them on the device.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


#: Values that a sum in float64 takes at a time: torch copies its input to float64 first.
_BLOCK = 1 << 18


def compact(values: Tensor, mask: Tensor) -> Tensor:
    """Return `values[mask]`, a copy of the values at the true entries in their order.

    Args:
        values (`Tensor` of shape (B, T)): Any type that NumPy has. No gradient flows through the result.
        mask (`Tensor` of shape (B, T), bool): The entries to take.

    Returns:
        `Tensor` of shape (N,): The values, in the order of the mask.
    """
    values = values.detach()
    if values.device.type != "cpu":
        return values[mask]
    return torch.from_numpy(values.numpy()[mask.numpy()])


def true_indices(mask: Tensor) -> Tensor:
    """Return the indices of the true entries of a flat mask, ascending, int64."""
    if mask.device.type != "cpu":
        return mask.nonzero().squeeze(1)
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def count_true(mask: Tensor) -> Tensor:
    """Count the true entries of a mask, a scalar, int64."""
    if mask.device.type != "cpu":
        return mask.count_nonzero()
    return torch.tensor(int(np.count_nonzero(mask.numpy())))


def row_counts(mask: Tensor) -> Tensor:
    """Count the true entries of each row of a mask, (B, T) to (B,), int64."""
    if mask.device.type != "cpu":
        return mask.sum(-1)
    return torch.from_numpy(np.count_nonzero(mask.numpy(), axis=1))


def exact_sum(values: Tensor) -> Tensor:
    """Return the sum of flat values in float64."""
    return torch.stack([block.sum(dtype=torch.float64) for block in values.split(_BLOCK)]).sum()


def highest_sums(values: Tensor, ks: Sequence[int]) -> list[Tensor]:
    """Return the sum of the `k` highest of flat values for each `k`, in float64. Nothing is sorted.

    Args:
        values (`Tensor` of shape (N,), floating): On a CPU, float32 or float64. They are reordered in place there.
        ks (`Sequence[int]`): Numbers in descending order, each at most N.
    """
    if values.device.type != "cpu":
        sums = []
        for k in ks:  # each looks only at the values of the one before
            values = values.topk(k, sorted=False).values
            sums.append(exact_sum(values))
        return sums
    starts = [values.numel() - k for k in ks]
    for outer, start in zip([0, *starts], starts, strict=False):
        if outer < start < values.numel():
            values[outer:].numpy().partition(start - outer)
    # Each value is summed once: what lies between two starts belongs to all larger counts.
    ends = [*starts[1:], values.numel()]
    parts = [exact_sum(values[start:end]) for start, end in zip(starts, ends, strict=True)]
    return [torch.stack(parts[i:]).sum() for i in range(len(parts))]
