"""Scores from counts: pass@k, majority@k and bootstrap confidence intervals. Pure functions."""

from collections.abc import Callable, Hashable, Sequence
from fractions import Fraction
from math import comb
from typing import TypeVar
from zlib import crc32

import numpy as np
from numpy.typing import NDArray


Answer = TypeVar("Answer", bound=Hashable)


def pass_at_k(n: int, c: int, k: int) -> float:
    """The unbiased estimate of the probability that at least one of `k` samples is right.

        pass@k = 1 - C(n - c, k) / C(n, k)

    the share of the subsets of `k` of the `n` samples that hold one of the `c` right ones (arXiv 2107.03374, Eq. 1).
    """
    _check(n, c, k)
    return 1.0 - comb(n - c, k) / comb(n, k)


def majority_at_k(n: int, c: int, wrong: Sequence[int], k: int) -> float:
    """The unbiased estimate of the probability that the most frequent answer of `k` samples is right.

    The mean over all subsets of `k` of the `n` samples. Answers that are equally frequent are drawn from: a subset in
    which the right answer ties with t others counts 1 / (t + 1). Samples without an answer have no vote.

    Args:
        n (`int`): Samples of the problem.
        c (`int`): How many of them are right.
        wrong (`Sequence[int]`): How many samples gave each of the wrong answers.
        k (`int`): The size of the subsets.
    """
    _check(n, c, k)
    if c + sum(wrong) > n:
        raise ValueError(f"{c} right and {sum(wrong)} wrong answers are more than {n} samples")
    if k == n:  # one subset, which the sum below takes half a minute for at 1,100 samples
        most = max(wrong, default=0)
        return 0.0 if c < max(most, 1) else 1 / (1 + list(wrong).count(c))
    total = Fraction(0)  # exact: the counts of subsets are beyond the range of floats from about 1,030 samples on
    for votes in range(1, min(c, k) + 1):
        # Ways to draw the other k - votes samples such that no wrong answer has more votes, by number of ties. Answers
        # that cannot tie are as good as no answer.
        rivals = [size for size in wrong if size >= votes]
        ways = {(0, 0): 1}
        for size in rivals:
            after: dict[tuple[int, int], int] = {}
            for (drawn, ties), number in ways.items():
                for more in range(min(votes, k - votes - drawn) + 1):
                    key = (drawn + more, ties + (more == votes))
                    after[key] = after.get(key, 0) + number * comb(size, more)
            ways = after
        others = n - c - sum(rivals)
        won: dict[int, int] = {}  # ways by number of ties
        for (drawn, ties), number in ways.items():
            won[ties] = won.get(ties, 0) + number * comb(others, k - votes - drawn)
        total += comb(c, votes) * sum(Fraction(number, ties + 1) for ties, number in won.items())
    return float(total / comb(n, k))


def _check(n: int, c: int, k: int) -> None:
    if not 0 <= c <= n:
        raise ValueError(f"c={c} right samples out of n={n}: c must lie between 0 and n")
    if not 1 <= k <= n:
        raise ValueError(f"k={k} cannot be estimated from n={n} samples: k must lie between 1 and n")


def group_sizes(answers: Sequence[Answer], equal: Callable[[Answer, Answer], bool]) -> list[int]:
    """How many of the answers are the same, for each different one: the first that an answer equals is its group."""
    groups: dict[Answer, int] = {}
    known: dict[Answer, Answer] = {}
    for answer in answers:
        if answer not in known:
            known[answer] = next((first for first in groups if equal(first, answer)), answer)
        groups[known[answer]] = groups.get(known[answer], 0) + 1
    return list(groups.values())


def bootstrap_means(values: Sequence[float], name: str, resamples: int = 10_000, seed: int = 0) -> NDArray[np.float64]:
    """Means of (resamples) sets of problems, each drawn with replacement from the given problems' scores.

    The same values, name and seed give the same means; another name gives independent ones.
    """
    scores = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng([seed, crc32(name.encode())])
    means = [
        scores[generator.integers(len(scores), size=(count, len(scores)))].mean(axis=1)
        for count in np.diff([*range(0, resamples, 500), resamples])  # in parts: all indices at once are gigabytes
    ]
    return np.concatenate(means)


def interval(means: NDArray[np.float64], level: float = 0.95) -> tuple[float, float]:
    """The central interval that holds `level` of the means (the percentile bootstrap)."""
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
