"""A pool over several processes: the same selection, covariance and metrics as the same rows on one process.

Here the processes are threads that exchange tensors, so that every way of spreading the rows is cheap to try;
tests/test_distributed.py does it with real ones.
"""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from entropy_trl import ClipCov, KLCov, TokenBatch, covariance_metrics, draw_mask, token_covariance, top_k_mask
from entropy_trl.tokens.ranks import ONE_PROCESS
from entropy_trl.tokens.selection import highest_values


class Thread:
    """One of several threads that stand for processes."""

    several = True

    def __init__(self, group, index):
        self.group, self.index = group, index

    def _exchange(self, value):
        group = self.group
        group["values"][self.index] = value
        group["barrier"].wait(timeout=20)
        values = list(group["values"])
        group["barrier"].wait(timeout=20)
        assert len({(v.shape, v.dtype) for v in values}) == 1
        if self.index == 0:
            group["bytes"].append(value.numel() * value.element_size())
        return torch.stack(values)

    def sum(self, value):
        return self._exchange(value).sum(0)

    def min(self, value):
        return self._exchange(value).min(0).values


def spread(function, parts):
    """`function(part, ranks)` of each part at the same time, and the bytes that each process sent."""
    group = {"values": [None] * len(parts), "barrier": threading.Barrier(len(parts)), "bytes": []}
    with ThreadPoolExecutor(len(parts)) as pool:
        futures = [pool.submit(function, part, Thread(group, i)) for i, part in enumerate(parts)]
        return [f.result(timeout=30) for f in futures], sum(group["bytes"])


def pool_of(kind, rows=16, length=40):
    generator = torch.Generator().manual_seed(3)
    logps = -torch.rand(rows, length, generator=generator) * 6
    advantages = torch.randn(rows, 1, generator=generator)
    mask = torch.rand(rows, length, generator=generator) < 0.8
    if kind == "ties":
        logps, advantages = logps.round(), advantages.round()
    elif kind == "equal advantages":
        advantages[:] = 0.1
    elif kind == "empty rows":
        mask[:9] = False
    elif kind == "empty":
        mask[:] = False
    elif kind == "per token":
        advantages = torch.randn(rows, length, generator=generator)
    elif kind == "float64":
        logps, advantages = logps.double(), advantages.double()
    return {"logps": logps, "advantages": advantages, "mask": mask, "row_ids": torch.arange(100, 100 + rows)}


KINDS = ["plain", "ties", "equal advantages", "empty rows", "empty", "per token", "float64"]
#: Which rows each process has: halves, an idle process, uneven shares, rows of a group apart.
SPREADS = {
    "halves": [range(8), range(8, 16)],
    "one idle": [range(16), []],
    "uneven": [range(1), range(1, 12), range(12, 16)],
    "interleaved": [range(i, 16, 4) for i in range(4)],
}


def part_of(pool, rows):
    return {k: v[list(rows)] for k, v in pool.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shares", SPREADS)
@pytest.mark.parametrize(
    "control",
    [
        KLCov(fraction=0.1),
        KLCov(fraction=1.0),
        KLCov(fraction=2e-4),
        KLCov(fraction=0.1, selection="random"),
        ClipCov(fraction=0.05, cov_low=0.5),
        ClipCov(fraction=0.9, cov_low=0.5),
        ClipCov(fraction=0.05, cov_low=0.5, selection="random"),
        ClipCov(fraction=0.05, cov_low=0.5, selection="top"),
    ],
    ids=str,
)
def test_selection_does_not_depend_on_the_processes(kind, shares, control):
    pool = pool_of(kind)

    def select(part, ranks=None):
        ranks = {} if ranks is None else {"ranks": ranks}
        return control.select(TokenBatch(old_logps=part["logps"], **part, **ranks, seed=1))

    whole = select(pool)
    parts, _ = spread(select, [part_of(pool, rows) for rows in SPREADS[shares]])
    for rows, part in zip(SPREADS[shares], parts, strict=True):
        assert torch.equal(part.selected, whole.selected[list(rows)])
        torch.testing.assert_close(part.covariance, whole.covariance[list(rows)], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shares", SPREADS)
def test_metrics_add_up(kind, shares):
    pool = pool_of(kind)

    def metrics(part, ranks=None):
        ranks = {} if ranks is None else {"ranks": ranks}
        batch = TokenBatch(old_logps=part["logps"], **part, **ranks)
        covariance = token_covariance(batch.logps, batch.advantages, batch.mask, batch.ranks)
        selected = batch.mask & (batch.logps < -2)
        return covariance_metrics(covariance, batch.mask, selected, batch.ranks)

    whole = metrics(pool)
    parts, _ = spread(metrics, [part_of(pool, rows) for rows in SPREADS[shares]])
    for name, (total, count) in whole.items():
        assert sum(float(part[name][1]) for part in parts) == pytest.approx(float(count), rel=1e-6)
        assert sum(float(part[name][0]) for part in parts) == pytest.approx(float(total), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shares", SPREADS)
def test_highest_values(kind, shares):
    pool = pool_of(kind)
    ks = [1, 3, 40, max(int(pool["mask"].sum()), 1), 999]
    expected = sorted(pool["logps"][pool["mask"]].tolist(), reverse=True)
    expected = [expected[k - 1] if k <= len(expected) else math.inf for k in ks]

    def highest(part, ranks=ONE_PROCESS):
        return highest_values(part["logps"], part["mask"], ks, ranks)

    assert highest(pool) == expected
    for found in spread(highest, [part_of(pool, rows) for rows in SPREADS[shares]])[0]:
        assert found == expected


def test_rows_of_different_lengths():
    # Every process pads to its own longest row.
    pool = pool_of("plain")
    pool["mask"][8:, 10:] = False
    parts = [part_of(pool, range(8)), part_of(pool, range(8, 16))]
    for name in ("logps", "mask"):
        parts[1][name] = parts[1][name][:, :10]
    control = KLCov(fraction=0.1)
    whole = control.select(TokenBatch(old_logps=pool["logps"], **pool)).selected
    (first, second), _ = spread(
        lambda part, ranks: control.select(TokenBatch(old_logps=part["logps"], **part, ranks=ranks)).selected, parts
    )
    assert torch.equal(first, whole[:8]) and torch.equal(second, whole[8:, :10])


@pytest.mark.parametrize("control", [KLCov(fraction=0.5), ClipCov(fraction=0.5, cov_low=0.0)], ids=str)
def test_communication_does_not_grow(control):
    """At most 300 KiB a step for the selection, whatever the tokens and the fraction."""
    sent = []
    for rows in (16, 512):
        pool = pool_of("plain", rows=rows)
        _, size = spread(
            lambda part, ranks: control.select(TokenBatch(old_logps=part["logps"], **part, ranks=ranks)),
            [part_of(pool, range(rows // 2)), part_of(pool, range(rows // 2, rows))],
        )
        sent.append(size)
    assert sent[0] == sent[1] < 300 * 1024


@pytest.mark.parametrize("k", [1, 7, 100])
def test_negative_zero_is_zero(k):
    scores = torch.zeros(4, 30)
    scores[:2] = -0.0
    eligible = torch.ones(4, 30, dtype=torch.bool)
    whole = top_k_mask(scores, eligible, k)
    parts, _ = spread(
        lambda rows, ranks: top_k_mask(scores[rows], eligible[rows], k, torch.tensor(rows), ranks), [[0, 1], [2, 3]]
    )
    assert torch.equal(torch.cat(parts), whole)


def test_a_draw_of_nothing_asks_nobody():
    drawn, size = spread(
        lambda rows, ranks: draw_mask(torch.ones(2, 3, dtype=torch.bool), torch.tensor(rows), 0, 0, ranks),
        [[0, 1], [2, 3]],
    )
    assert size == 0 and not torch.cat(drawn).any()
