"""Exact top-k and reproducible draws."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_trl import draw_mask, top_k_mask
from entropy_trl.tokens.selection import _FILTER_FROM, draw_keys


def expected_top_k(scores, eligible, k):
    order = sorted((-s, i) for i, (s, e) in enumerate(zip(scores, eligible, strict=True)) if e)
    chosen = {i for _, i in order[:k]}
    return [i in chosen for i in range(len(scores))]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=30),
    st.integers(0, 35),
    st.booleans(),
)
def test_top_k_against_sorting_with_ties(items, k, floating):
    scores, eligible = zip(*items, strict=True)
    tensor = torch.tensor(scores, dtype=torch.float32 if floating else torch.int64)
    marked = top_k_mask(tensor[None], torch.tensor(eligible)[None], k)[0]
    assert marked.tolist() == expected_top_k(scores, eligible, k)


@pytest.mark.parametrize("k", [1, 17, 400, 150_000, 300_000])
@pytest.mark.parametrize("kind", ["normal", "sorted", "ties", "constant", "padded"])
def test_filtered_top_k_is_exact(kind, k):
    size = 200_000
    assert size >= _FILTER_FROM
    generator = torch.Generator().manual_seed(0)
    scores = {
        "normal": torch.randn(size, generator=generator),
        "sorted": torch.arange(float(size)),
        "ties": torch.randint(0, 5, (size,), generator=generator).float(),
        "constant": torch.zeros(size),
        "padded": torch.randn(size, generator=generator),
    }[kind]
    eligible = torch.ones(size, dtype=torch.bool)
    if kind == "padded":
        eligible = (torch.rand(size, generator=generator) < 0.001) | (torch.arange(size) < 300)
    marked = top_k_mask(scores.view(100, -1), eligible.view(100, -1), k).flatten()
    # A stable sort keeps equal scores in order: an independent statement of the rule.
    order = torch.where(eligible, scores, -torch.inf).sort(descending=True, stable=True).indices
    expected = torch.zeros(size, dtype=torch.bool)
    expected[order[: min(k, int(eligible.sum()))]] = True
    assert torch.equal(marked, expected)


def test_a_misleading_sample_does_not_cost_exactness():
    # The strided sample sees only zeros; all the high scores lie between its strides.
    size = _FILTER_FROM * 4
    scores = torch.zeros(size)
    scores[1::16] = torch.arange(1.0, size // 16 + 1)
    marked = top_k_mask(scores.view(4, -1), torch.ones(4, size // 4, dtype=torch.bool), 10).flatten()
    assert sorted(scores[marked].tolist()) == [float(size // 16 - i) for i in range(9, -1, -1)]
    # The sample sees the high scores alone: far fewer lie above its bound than it expects.
    scores = torch.arange(float(size)) + size * (torch.arange(size) % 16 == 0)
    marked = top_k_mask(scores.view(4, -1), torch.ones(4, size // 4, dtype=torch.bool), 50_000).flatten()
    assert torch.equal(marked, scores >= scores.sort(descending=True).values[49_999])


def test_draw_is_a_function_of_seed_row_and_position_alone():
    eligible = torch.rand(12, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    rows = torch.arange(100, 112)
    drawn = draw_mask(eligible, rows, 30, seed=5)
    assert drawn.sum() == 30 and not (drawn & ~eligible).any()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    assert torch.equal(draw_mask(eligible[order], rows[order], 30, seed=5), drawn[order])
    wider = torch.nn.functional.pad(eligible, (0, 9))
    assert torch.equal(draw_mask(wider, rows, 30, seed=5)[:, :40], drawn)
    assert not torch.equal(draw_mask(eligible, rows, 30, seed=6), drawn)


def test_draw_never_takes_more_than_there_are():
    eligible = torch.tensor([[True, False, True]])
    assert torch.equal(draw_mask(eligible, torch.tensor([0]), 10, seed=0), eligible)
    assert not draw_mask(torch.zeros(2, 3, dtype=torch.bool), torch.arange(2), 3, seed=0).any()


def test_draw_is_uniform():
    # 4,000 draws of 5 of 50 tokens: each token is hit 400 times on average, sd 19; 5 sd is 95.
    eligible, rows = torch.ones(5, 10, dtype=torch.bool), torch.arange(5)
    hits = sum(draw_mask(eligible, rows, 5, seed=seed).float() for seed in range(4000))
    assert hits.sum() == 20_000
    assert (hits - 400).abs().max() < 95
    # Pairs must be independent too: two tokens are drawn together 4000 * (5*4)/(50*49) = 32.7 times, sd 5.7.
    together = sum(float(d[0, 0] & d[0, 1]) for d in (draw_mask(eligible, rows, 5, seed=seed) for seed in range(4000)))
    assert 10 < together < 60


def test_keys_do_not_repeat():
    rows, positions = torch.arange(300)[:, None], torch.arange(1000)[None]
    keys = draw_keys(rows, positions, seed=0)
    assert keys.unique().numel() == keys.numel()
    assert keys.min() >= 0
    # Every bit is set in half of the keys: sd of the share is 0.5 / sqrt(300,000) = 0.0009.
    for bit in range(63):
        assert abs(float(((keys >> bit) & 1).double().mean()) - 0.5) < 0.006


def test_ties_go_to_the_lowest_row_id_wherever_the_row_is():
    scores, eligible = torch.zeros(3, 4), torch.ones(3, 4, dtype=torch.bool)
    marked = top_k_mask(scores, eligible, 6, row_ids=torch.tensor([8, 2, 5]))
    assert marked.tolist() == [[False] * 4, [True] * 4, [True, True, False, False]]
