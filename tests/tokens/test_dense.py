"""Boolean indexing and the sums of the highest values, against sorting."""

import math

import pytest
import torch

from entropy_trl.tokens.dense import compact, count_true, exact_sum, highest_sums, row_counts, true_indices


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["normal", "ties", "constant", "negative"])
def test_the_sums_of_the_highest_values_are_those_of_a_sort(kind, dtype):
    size = 5_000
    generator = torch.Generator().manual_seed(0)
    values = {
        "normal": torch.randn(size, generator=generator),
        "ties": torch.randint(-2, 3, (size,), generator=generator).float(),
        "constant": torch.zeros(size),
        "negative": -torch.rand(size, generator=generator),
    }[kind].to(dtype)
    ks = [size, size // 2, size // 2, 100, 1, 0]
    ordered = sorted(values.tolist(), reverse=True)
    found = highest_sums(values.clone(), ks)
    assert [float(total) for total in found] == pytest.approx([math.fsum(ordered[:k]) for k in ks], rel=1e-12)
    assert all(total.dtype == torch.float64 for total in found)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_indexing_is_that_of_torch(share):
    generator = torch.Generator().manual_seed(0)
    # A view with gaps, as a slice of a padded batch is.
    values = torch.randn(40, 60, generator=generator, requires_grad=True)[:, 3:50]
    mask = (torch.rand(40, 60, generator=generator) < share)[:, 3:50]
    assert torch.equal(compact(values, mask), values.detach()[mask])
    assert torch.equal(true_indices(mask.flatten()), mask.flatten().nonzero().squeeze(1))
    assert torch.equal(row_counts(mask), mask.sum(-1))
    assert torch.equal(count_true(mask), mask.count_nonzero())
    assert float(exact_sum(compact(values, mask))) == pytest.approx(math.fsum(values.detach()[mask].tolist()))


def test_nothing_sums_to_zero():
    assert [float(total) for total in highest_sums(torch.zeros(0), [0, 0])] == [0.0, 0.0]
