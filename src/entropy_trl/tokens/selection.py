"""Exact selection of tokens on the devices that hold them: the k highest scores, and reproducible random draws.

Over several processes a selection is a radix select: a few histograms of fixed size are summed, whatever the number of
tokens and however many are selected, and no process sees another's tokens.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from entropy_trl.tokens.dense import compact, exact_sum, highest_sums, true_indices
from entropy_trl.tokens.ranks import ONE_PROCESS, Ranks


#: Below this many tokens one `topk` is faster than filtering first.
_FILTER_FROM = 1 << 16
_SAMPLE = 1 << 14

#: A radix select fixes this many bits of the threshold in each round, with a histogram of 2^bits counts.
_ROUND_BITS = 11
_MASK_63 = (1 << 63) - 1


def selection_count(fraction: float, tokens: int) -> int:
    """Count the tokens that a fraction means: `floor(fraction * tokens)`, at least one while there is a token.

    The minimum of one is the authors'. On a small pool it makes the realised fraction larger than the nominal one.

    The floor is that of the number as written: 0.29 of 200,000 tokens are 58,000, although the product of the floats is
    57,999.999. It is the largest count `n` with `n / tokens <= fraction`.

    Args:
        fraction (`float`): Share of the tokens, in (0, 1].
        tokens (`int`): Tokens in the pool.

    Returns:
        `int`: The count, at most `tokens`.
    """
    fraction, tokens = float(fraction), int(tokens)
    count = math.floor(Fraction(fraction) * tokens)
    # The binary value of a fraction can lie just below the number as written; the division rounds as that number did.
    if tokens and (count + 1) / tokens <= fraction:
        count += 1
    return min(max(count, 1), tokens)


def top_k_mask(
    scores: Tensor, eligible: Tensor, k: int, row_ids: Tensor | None = None, ranks: Ranks = ONE_PROCESS
) -> Tensor:
    """Mark the `k` eligible entries with the highest scores, over all `ranks`.

    Exactly `min(k, eligible entries)` entries are marked. Of equal scores the ones with the lowest (row id, position)
    win, so that the result depends neither on the device, nor on the order of the rows, nor on how they are spread over
    processes.

    Args:
        scores (`Tensor` of shape (B, T), floating or non-negative integer): What to rank; not NaN at eligible entries.
        eligible (`Tensor` of shape (B, T), bool): Entries that may be marked.
        k (`int`): How many, over all processes.
        row_ids (`Tensor` of shape (B,), int64, *optional*): Identity of each row, below 2^31. Defaults to `0..B-1`.
        ranks ([`Ranks`], *optional*): The processes that share the pool.

    Returns:
        `Tensor` of shape (B, T), bool: The marked entries.
    """
    if k == 0:
        return torch.zeros_like(eligible)
    row_ids = torch.arange(scores.shape[0], device=scores.device) if row_ids is None else row_ids
    if ranks.several:
        keys, bits = _sortable(scores)
        (threshold,), (above,), (equal,) = _kth_keys(compact(keys, eligible), bits, [k], ranks)
        if above + equal <= k:  # the usual case: no tie to resolve
            return eligible & (keys >= threshold)
        marked = eligible & (keys > threshold)
        return marked | _first_of_equals(eligible & (keys == threshold), row_ids, k - above, ranks)

    values, allowed = scores.flatten(), eligible.flatten()
    marked = torch.zeros_like(allowed)
    candidates = _candidates(values, allowed, k)
    if candidates.numel():
        ranked = values[candidates]
        lowest = ranked.topk(min(k, candidates.numel()), sorted=False).values.min()
        higher, tied = candidates[ranked > lowest], candidates[ranked == lowest]
        order = _order(row_ids, tied // scores.shape[1], tied % scores.shape[1])
        first = order.topk(min(k - higher.numel(), tied.numel()), largest=False, sorted=False).indices
        marked[higher] = True
        marked[tied[first]] = True
    return marked.view_as(scores)


def _candidates(scores: Tensor, eligible: Tensor, k: int) -> Tensor:
    """Indices of a superset of the `k` highest eligible entries; of all eligible ones if fewer.

    A strided sample bounds the k-th score from below, and only the entries above the bound are ranked. The bound is
    verified, so the result is right whatever the sample says.
    """
    if scores.numel() >= _FILTER_FROM:
        stride = scores.numel() // _SAMPLE
        sample = scores[::stride][eligible[::stride]]
        expected = k / stride
        rank = int(expected + 4 * expected**0.5) + 8  # four standard deviations of a random sample's rank
        if rank < sample.numel():
            above = scores >= sample.topk(rank).values[-1]
            candidates = true_indices(above.logical_and_(eligible))
            if candidates.numel() >= k:
                return candidates
    return true_indices(eligible)


def _order(row_ids: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """A number for each token that orders tokens by (row id, position) and differs between any two."""
    return (row_ids[rows] << 32) + positions


def _first_of_equals(tied: Tensor, row_ids: Tensor, n: int, ranks: Ranks) -> Tensor:
    """The `n` of the tied tokens with the lowest (row id, position)."""
    rows, positions = tied.nonzero(as_tuple=True)
    keys = _MASK_63 - _order(row_ids, rows, positions)
    (threshold,), _, _ = _kth_keys(keys, 63, [n], ranks)
    first = torch.zeros_like(tied)
    first[rows, positions] = keys >= threshold
    return first


def _sortable(scores: Tensor) -> tuple[Tensor, int]:
    """Non-negative int64 keys in the order of the scores, and how many bits they have.

    Floats are compared by their bits, as IEEE 754 allows once the negative ones are flipped. Of float64 the last bit is
    dropped, to keep the key positive: scores that differ in it alone count as equal.
    """
    if not scores.is_floating_point():
        return scores.long(), 63
    if scores.dtype == torch.float64:
        bits = (scores + 0.0).view(torch.int64)  # + 0.0 makes -0.0 equal to 0.0
        return (torch.where(bits < 0, bits ^ _MASK_63, bits) >> 1) + (1 << 62), 63
    bits = (scores.float() + 0.0).view(torch.int32).long()
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) + (1 << 31), 32


def _kth_keys(keys: Tensor, bits: int, ks: Sequence[int], ranks: Ranks) -> tuple[list[int], list[int], list[int]]:
    """For each `k >= 1`: the k-th highest key over all ranks (0 if fewer), how many are above it and how many equal it.

    Communication: `ceil(bits / 11)` sums of `len(ks)` histograms of 2^11 int64, 16 KiB each.
    """
    thresholds, above, equal = [0] * len(ks), [0] * len(ks), [0] * len(ks)
    for shift in range(_ROUND_BITS * (math.ceil(bits / _ROUND_BITS) - 1), -1, -_ROUND_BITS):
        digits = (keys >> shift) & ((1 << _ROUND_BITS) - 1)
        prefixes = keys >> (shift + _ROUND_BITS) if shift + _ROUND_BITS < 64 else torch.zeros_like(keys)
        counts = ranks.sum(
            torch.stack([digits[prefixes == t].bincount(minlength=1 << _ROUND_BITS) for t in thresholds])
        )
        from_top = counts.flip(1).cumsum(1).tolist()
        for i, k in enumerate(ks):
            # The highest digit at which, with what is above it, k keys are reached; digit 0 if there are not k.
            index = next((j for j, c in enumerate(from_top[i]) if above[i] + c >= k), (1 << _ROUND_BITS) - 1)
            higher = from_top[i][index - 1] if index else 0
            above[i] += higher
            equal[i] = from_top[i][index] - higher
            thresholds[i] = (thresholds[i] << _ROUND_BITS) | ((1 << _ROUND_BITS) - 1 - index)
    return thresholds, above, equal


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
        row_ids (`Tensor`, int64): Row of each token.
        positions (`Tensor`, int64, broadcastable with `row_ids`): Position of each token in its row.
        seed (`int`): Seed of the draw; give each optimizer step its own.

    Returns:
        `Tensor` of the broadcast shape, int64: Uniform on [0, 2^63).
    """
    start = torch.tensor(seed & _MASK_63, dtype=torch.int64, device=row_ids.device)
    rows = _mix(_mix(start) + row_ids)
    return _mix(rows + positions) & _MASK_63


def draw_mask(eligible: Tensor, row_ids: Tensor, n: int, seed: int, ranks: Ranks = ONE_PROCESS) -> Tensor:
    """Mark `min(n, eligible tokens)` eligible tokens of all `ranks`, drawn uniformly without replacement.

    Args:
        eligible (`Tensor` of shape (B, T), bool): Tokens that may be drawn.
        row_ids (`Tensor` of shape (B,), int64): Identity of each row, unique over all processes.
        n (`int`): How many tokens, over all processes.
        seed (`int`): Seed of the draw (see [`draw_keys`]).
        ranks ([`Ranks`], *optional*): The processes that share the pool.

    Returns:
        `Tensor` of shape (B, T), bool: The marked entries.
    """
    return draw_from(true_indices(eligible.flatten()), eligible.shape, row_ids, n, seed, ranks)


def draw_from(
    indices: Tensor, shape: Sequence[int], row_ids: Tensor, n: int, seed: int, ranks: Ranks = ONE_PROCESS
) -> Tensor:
    """Mark tokens as [`draw_mask`] does, of those at the given flat indices.

    Args:
        indices (`Tensor` of shape (M,), int64): Tokens that may be drawn, as indices into the flattened `shape`.
        shape (`Sequence[int]`): (B, T).
        row_ids (`Tensor` of shape (B,), int64): Identity of each row, unique over all processes.
        n (`int`): How many tokens, over all processes.
        seed (`int`): Seed of the draw (see [`draw_keys`]).
        ranks ([`Ranks`], *optional*): The processes that share the pool.

    Returns:
        `Tensor` of shape (B, T), bool: The marked entries.
    """
    drawn = torch.zeros(*shape, dtype=torch.bool, device=row_ids.device)
    if n == 0:
        return drawn
    width = max(shape[1], 1)
    rows = indices.div(width, rounding_mode="floor")
    keys = draw_keys(row_ids[rows], indices - rows * width, seed)
    if ranks.several:
        (threshold,), _, _ = _kth_keys(keys, 63, [n], ranks)
        drawn.view(-1)[indices] = keys >= threshold
    elif keys.numel():
        drawn.view(-1)[indices] = keys >= keys.topk(min(n, keys.numel()), sorted=False).values.min()
    return drawn


def highest_values(values: Tensor, eligible: Tensor, ks: Sequence[int], ranks: Ranks = ONE_PROCESS) -> list[float]:
    """Return the k-th highest eligible value for each `k`, over all `ranks`; infinite if there are fewer than `k`.

    Args:
        values (`Tensor` of shape (B, T), floating): The values; not NaN at eligible entries.
        eligible (`Tensor` of shape (B, T), bool): Entries that count.
        ks (`Sequence[int]`): Numbers from 1.
        ranks ([`Ranks`], *optional*): The processes that share the pool.
    """
    values = compact(values, eligible)
    if not ranks.several:
        top = values.topk(min(max(ks), values.numel())).values.tolist()
        return [top[k - 1] if k <= len(top) else math.inf for k in ks]
    count = int(ranks.sum(eligible.count_nonzero()))
    keys, bits = _sortable(values)
    found = []
    for k, threshold in zip(ks, _kth_keys(keys, bits, ks, ranks)[0], strict=True):
        at_least = values.where(keys >= threshold, math.inf)
        lowest = ranks.min(torch.cat([at_least, at_least.new_tensor([math.inf])]).min())
        found.append(float(lowest) if k <= count else math.inf)
    return found


def top_sums(values: Tensor, ks: Sequence[int], ranks: Ranks = ONE_PROCESS) -> tuple[Tensor, list[Tensor]]:
    """Return this process's part of the sum of all values, and of the `k` highest for each `k`.

    Args:
        values (`Tensor` of shape (N,), float32 or float64): This process's values; with several processes of any
            number, none included. They may be reordered in place.
        ks (`Sequence[int]`): Numbers in descending order; each at most the number of values over all processes.
        ranks ([`Ranks`], *optional*): The processes that share the pool.

    Returns:
        `tuple[Tensor, list[Tensor]]`: Float64 scalars: one for all values, and one for each `k`. Summed over the
        processes they are the sums of all values and of the `k` highest.
    """
    if not ranks.several:
        total, *sums = highest_sums(values, [values.numel(), *ks])
        return total, sums
    keys, bits = _sortable(values)
    thresholds, above, equal = _kth_keys(keys, bits, ks, ranks)
    sums = []
    for k, threshold, higher, ties in zip(ks, thresholds, above, equal, strict=True):
        # Of the values equal to the k-th each process takes its share.
        share = (k - higher) / max(ties, 1)
        sums.append(
            values.where(keys > threshold, 0.0).sum(dtype=torch.float64)
            + values.where(keys == threshold, 0.0).sum(dtype=torch.float64) * share
        )
    return exact_sum(values), sums
