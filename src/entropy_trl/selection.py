"""Exact selection of tokens on the device that holds them: the k highest scores, and reproducible random draws."""

import torch
from torch import Tensor


#: Below this many tokens one `topk` is faster than filtering first.
_FILTER_FROM = 1 << 16
_SAMPLE = 1 << 14


def top_k_mask(scores: Tensor, eligible: Tensor, k: int) -> Tensor:
    """Mark the `k` eligible entries with the highest scores.

    Exactly `min(k, eligible.sum())` entries are marked. Among equal scores the ones that come first (row-major) win, so
    that the result does not depend on the device or on the algorithm of `topk`.

    Large inputs are filtered first: a strided sample bounds the k-th score from below, and only the entries above the
    bound are ranked. The bound is verified, so the result is exact whatever the sample says.

    Args:
        scores (`Tensor` of any shape, floating or integer): what to rank. Finite at eligible entries, and above the
            dtype's minimum.
        eligible (`Tensor` of the same shape, bool): entries that may be marked.
        k (`int`): how many.

    Returns:
        `Tensor` of the same shape, bool.
    """
    lowest = -torch.inf if scores.is_floating_point() else torch.iinfo(scores.dtype).min
    flat = scores.masked_fill(~eligible, lowest).flatten()
    marked = torch.zeros_like(flat, dtype=torch.bool)
    candidates = _candidates(flat, k, lowest)
    k = min(k, candidates.numel())
    if k > 0:
        ranked = flat[candidates]
        threshold = ranked.topk(k, sorted=False).values.min()
        above, tied = ranked > threshold, ranked == threshold
        marked[candidates[above]] = True
        marked[candidates[tied][: k - int(above.sum())]] = True
    return marked.view_as(scores)


def _candidates(flat: Tensor, k: int, lowest: float) -> Tensor:
    """Indices, ascending, of a superset of the `k` highest entries above `lowest`; all of those if fewer."""
    if flat.numel() >= _FILTER_FROM:
        sample = flat[:: flat.numel() // _SAMPLE]
        expected = k * sample.numel() / flat.numel()
        rank = int(expected + 4 * expected**0.5) + 8  # four standard deviations of a random sample's rank
        if rank < sample.numel():
            bound = sample.topk(rank).values[-1]
            if bound > lowest:
                candidates = (flat >= bound).nonzero().squeeze(1)
                if candidates.numel() >= k:
                    return candidates
    return (flat > lowest).nonzero().squeeze(1)


_MASK_63 = (1 << 63) - 1


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014)."""
    for shift, multiplier in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        # `>>` of int64 keeps the sign; the mask makes it the logical shift that the generator is defined with.
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * multiplier
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def draw_keys(row_ids: Tensor, positions: Tensor, seed: int) -> Tensor:
    """A pseudo-random number for each token, a function of (seed, row, position) alone.

    The tokens with the `n` highest keys are a uniform draw of `n` tokens that repeats exactly after a resume and does
    not depend on how the rows are ordered, split into micro-batches or spread over processes.

    Args:
        row_ids (`Tensor`, int64): row of each token.
        positions (`Tensor`, int64, broadcastable with `row_ids`): position of each token in its row.
        seed (`int`): seed of the draw; give each optimizer step its own.

    Returns:
        `Tensor` of the broadcast shape, int64, uniform on [0, 2^63).
    """
    start = torch.tensor(seed & _MASK_63, dtype=torch.int64, device=row_ids.device)
    rows = _mix(_mix(start) + row_ids)
    return _mix(rows + positions) & _MASK_63


def draw_mask(eligible: Tensor, row_ids: Tensor, n: int, seed: int) -> Tensor:
    """Mark `min(n, eligible.sum())` eligible tokens, drawn uniformly without replacement (see [`draw_keys`]).

    Args:
        eligible (`Tensor` of shape (B, T), bool): tokens that may be drawn.
        row_ids (`Tensor` of shape (B,), int64): identity of each row.
        n (`int`): how many tokens.
        seed (`int`): seed of the draw.

    Returns:
        `Tensor` of shape (B, T), bool.
    """
    rows, positions = eligible.nonzero(as_tuple=True)
    keys = draw_keys(row_ids[rows], positions, seed)
    drawn = torch.zeros_like(eligible)
    drawn[rows, positions] = top_k_mask(keys, torch.ones_like(keys, dtype=torch.bool), n)
    return drawn
