"""majority@k: the score of the most frequent answer, over all subsets of the samples. Pure functions."""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray


Floats = NDArray[np.float64]

#: Cases less likely than this, relative to a subset of size k, are left out: far less than rounding changes.
_NEGLIGIBLE = 1e-18


def majority_of_subsets(n: int, c: int, wrong: Sequence[int], k: int) -> float:
    r"""The mean over all subsets of `k < n` samples, with errors below 1e-10.

    Let every sample be drawn on its own with probability p = k/n. Given that k are drawn, every subset of k is equally
    likely, so that

        majority@k = \sum_v P(right = v) I_v / P(drawn = k)
        I_v = \int_0^1 [x^(k - v)] (1 - p + p x)^u \prod_s (F_s(x) + y G_s(x)) dy

    with v the votes of the right answer, u the samples without an answer, [x^j] the coefficient of x^j, and for each
    wrong answer of s samples F_s = \sum_{m < v} P(m of s) x^m and G_s = P(v of s) x^v, the ties. The integral of y^t is
    1 / (t + 1): ties are drawn from. All terms are probabilities, so that nothing overflows or cancels. Coefficients
    come from a discrete Fourier transform, and the integral from Gauss-Legendre nodes, which are exact for polynomials.

    Args:
        n (`int`): Samples of the problem.
        c (`int`): How many of them are right.
        wrong (`Sequence[int]`): How many samples gave each of the wrong answers, from 1.
        k (`int`): The size of the subsets, below `n`.
    """
    p = k / n
    right, drawn = _binomial(c, p), _binomial(n, p)[k]
    sizes, counts = np.unique(np.asarray(wrong, dtype=np.int64), return_counts=True)
    chances = [_binomial(int(size), p) for size in sizes]
    total = 0.0
    for votes in range(1, min(c, k) + 1):
        at_most = [min(1.0, float(chance[: votes + 1].sum())) for chance in chances]
        bound = math.prod(share**count for share, count in zip(at_most, counts.tolist(), strict=True))
        if right[votes] * bound > _NEGLIGIBLE * drawn:
            total += right[votes] * _unbeaten(votes, k - votes, n - c - sum(wrong), chances, counts, p)
    return float(min(1.0, max(0.0, total / drawn)))


def _unbeaten(
    votes: int, rest: int, unanswered: int, chances: list[Floats], counts: NDArray[np.int64], p: float
) -> float:
    """The probability that `rest` other samples are drawn and no wrong answer has more votes, shared among ties."""
    rivals = [(chance, int(count)) for chance, count in zip(chances, counts, strict=True) if len(chance) > votes]
    # Answers that cannot tie are as good as no answer.
    others = unanswered + sum(
        (len(chance) - 1) * int(count) for chance, count in zip(chances, counts, strict=True) if len(chance) <= votes
    )
    degree = others + votes * sum(count for _, count in rivals)
    if degree < rest:
        return 0.0
    length = max(degree - rest, rest, votes) + 1  # no other power falls on that of `rest`
    x = np.exp(-2j * np.pi * np.arange(length // 2 + 1) / length)
    nodes, weights = _gauss_legendre(min(sum(count for _, count in rivals), rest // votes) // 2 + 1)
    product = weights[:, None] * ((1 - p) + p * x) ** others
    tie = x**votes
    for chance, count in rivals:
        below = np.fft.rfft(chance[:votes], length)
        factor = below + nodes[:, None] * (chance[votes] * tie)
        while count:
            if count & 1:
                product = product * factor
            count >>= 1
            if count:
                factor = factor * factor
    return float(np.fft.irfft(product.sum(axis=0), length)[rest])


def _binomial(n: int, p: float) -> Floats:
    """The probabilities of 0 to n successes in n draws."""
    logs = np.array([math.lgamma(i + 1) for i in range(n + 1)])
    m = np.arange(n + 1)
    chances: Floats = np.exp(logs[n] - logs - logs[::-1] + m * math.log(p) + (n - m) * math.log1p(-p))
    return chances / chances.sum()


@cache
def _gauss_legendre(count: int) -> tuple[Floats, Floats]:
    """Nodes and weights that integrate polynomials of degree up to 2 count - 1 from 0 to 1."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return (nodes + 1) / 2, weights / 2
