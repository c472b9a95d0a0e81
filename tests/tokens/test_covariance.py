"""Eq. 10 against a loop, its invariances, and the quantile table."""

from fractions import Fraction

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_trl import covariance_metrics, token_covariance
from entropy_trl.tokens.selection import selection_count


def random_pool(seed, rows=5, length=7, per_token=False):
    generator = torch.Generator().manual_seed(seed)
    logps = -torch.rand(rows, length, generator=generator, dtype=torch.float64) * 5
    advantages = torch.randn(rows, length if per_token else 1, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, length, generator=generator) < 0.7
    return logps, advantages, mask


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_matches_the_equation(seed, per_token):
    logps, advantages, mask = random_pool(seed, per_token=per_token)
    expected = torch.zeros_like(logps)
    for (b, t), value in oracle.covariances(logps, advantages.expand_as(logps), mask).items():
        expected[b, t] = value
    torch.testing.assert_close(token_covariance(logps, advantages, mask), expected, rtol=1e-12, atol=1e-12)


def test_golden():
    # logp -1, -3 (mean -2), A 1, 2 (mean 1.5): (1)(-0.5) and (-1)(0.5).
    logps, mask = torch.tensor([[-1.0], [-3.0]]), torch.ones(2, 1, dtype=torch.bool)
    assert token_covariance(logps, torch.tensor([[1.0], [2.0]]), mask).tolist() == [[-0.5], [-0.5]]


@pytest.mark.parametrize("per_token", [False, True])
def test_padding_does_not_matter(per_token):
    logps, advantages, mask = random_pool(1, per_token=per_token)
    expected = token_covariance(logps, advantages, mask)
    for garbage in (float("nan"), float("-inf"), float("inf"), 1e30):
        dirty = torch.where(mask, logps, garbage)
        dirty_advantages = torch.where(mask, advantages, garbage) if per_token else advantages
        assert torch.equal(token_covariance(dirty, dirty_advantages, mask), expected)


def test_row_order_does_not_matter():
    logps, advantages, mask = random_pool(2)
    order = torch.tensor([3, 0, 4, 1, 2])
    expected = token_covariance(logps, advantages, mask)[order]
    torch.testing.assert_close(
        token_covariance(logps[order], advantages[order], mask[order]), expected, rtol=0, atol=1e-15
    )


@pytest.mark.parametrize("value", [0.0, 0.1, -1.7, 1e6])
@pytest.mark.parametrize("per_token", [False, True])
def test_equal_advantages_give_exactly_zero(value, per_token):
    logps, advantages, mask = random_pool(3, rows=97, per_token=per_token)
    advantages = torch.full_like(advantages, value).float()
    for of_no_token in (value, -9.7, float("nan")):
        mask[5], advantages[5] = False, of_no_token
        assert token_covariance(logps.float(), advantages, mask).count_nonzero() == 0


@pytest.mark.parametrize("valid", [0, 1])
def test_empty_and_single_token_pools(valid):
    mask = torch.zeros(2, 3, dtype=torch.bool)
    mask[1, :valid] = True
    covariance = token_covariance(torch.randn(2, 3), torch.randn(2, 1), mask)
    assert covariance.count_nonzero() == 0


def test_half_precision_is_computed_in_float32():
    logps, advantages, mask = random_pool(4)
    half = token_covariance(logps.bfloat16(), advantages, mask)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, token_covariance(logps.bfloat16().float(), advantages, mask))


def test_no_gradient_flows_through():
    logps, advantages, mask = random_pool(5)
    assert not token_covariance(logps.requires_grad_(), advantages, mask).requires_grad


def test_metrics_are_the_means_by_quantile():
    # 10,000 covariances 0..9999: the top 2e-4 are 2 tokens (9999, 9998), the top 0.5 are 5000 tokens.
    covariance = torch.arange(10_000.0)[torch.randperm(10_000, generator=torch.Generator().manual_seed(0))]
    covariance = torch.cat([covariance, torch.full((50,), 1e9)]).view(2, -1)
    mask = (torch.arange(10_050) < 10_000).view(2, -1)
    selected = (covariance < 4) & mask
    metrics = {name: float(s) / float(n) for name, (s, n) in covariance_metrics(covariance, mask, selected).items()}
    assert metrics == {
        "cov_mean": 4999.5,
        "cov_selected_mean": 1.5,
        "selected_fraction": 4 / 10_000,
        "cov_top_0.0002": 9998.5,
        "cov_top_0.002": 9989.5,
        "cov_top_0.02": 9899.5,
        "cov_top_0.2": 8999.5,
        "cov_top_0.5": 7499.5,
    }


def test_metrics_of_an_empty_pool_count_nothing():
    empty = torch.zeros(2, 3)
    metrics = covariance_metrics(empty, empty.bool(), empty.bool())
    assert all(float(count) == 0 for _, count in metrics.values())


def test_counts_have_a_floor_of_one():
    assert [selection_count(fraction, 100) for fraction in (2e-4, 0.5)] == [1, 50]
    assert [selection_count(fraction, 0) for fraction in (2e-4, 0.5)] == [0, 0]


@pytest.mark.parametrize(
    ("fraction", "tokens", "count"),
    [
        (0.29, 200_000, 58_000),  # 57,999.999 as a product of floats
        (0.57, 100, 57),
        (1 / 3, 300, 100),
        (2e-4, 15_000, 3),
        (0.29, 199_999, 57_999),
        (1.0, 7, 7),
        (np.float32(0.5), torch.tensor(10), 5),
    ],
)
def test_counts_are_the_floor_of_the_number_as_written(fraction, tokens, count):
    assert selection_count(fraction, tokens) == count


def test_counts_agree_with_decimal_arithmetic():
    for percent in range(1, 101):
        for tokens in (1, 7, 100, 12_345, 200_000, 10**9):
            for fraction in (percent / 100, percent / 10_000):
                assert selection_count(fraction, tokens) == max(int(Fraction(str(fraction)) * tokens), 1)
