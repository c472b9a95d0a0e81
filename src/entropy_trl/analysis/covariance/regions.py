"""The entropy regions E1 to E4 of arXiv 2602.09782 in token records: tokens, gradient and change of entropy of each.

[`entropy_trl.tokens.regions`] defines them. The change of entropy is that of arXiv 2602.03392, Theorem 3.3. The
gradient is that of the objective `r A` of each token, all tokens weighed alike, before a ratio clip and before the
control: the records do not say what the clip stopped.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from entropy_trl.analysis.covariance.records import StepRecords
from entropy_trl.tokens.regions import REGIONS, region_metrics, token_regions
from entropy_trl.tokens.types import TokenBatch


@dataclass(frozen=True)
class StepRegion:
    """A region in one step. A share of nothing is None.

    Args:
        step (`int`): The optimizer step.
        region (`str`): One of `REGIONS`.
        tokens (`float`, *optional*): The region's share of the recorded tokens.
        restrained (`float`, *optional*): Share of its tokens that the control restrains.
        gradient (`float`, *optional*): The region's share of `sum |A| r (1 - p)` over the recorded tokens, the size of
            the gradient by the sampled tokens' own logits.
        entropy_change (`float`, *optional*): The region's part of the change of entropy to first order, nats per
            recorded token and unit of step on the logits: the sum of `-r A p (1 - p) (ln p + H)` over the number of
            all tokens. An estimate whose bias differs by region (docs/methods.md): compare a region with itself, not
            with others.
    """

    step: int
    region: str
    tokens: float | None
    restrained: float | None
    gradient: float | None
    entropy_change: float | None


@dataclass(frozen=True)
class StepMean:
    """A mean over the steps that have a value.

    Args:
        mean (`float`, *optional*): None where no step has one.
        standard_error (`float`, *optional*): That of independent steps, which neighbouring ones are not; None for fewer
            than two.
    """

    mean: float | None
    standard_error: float | None


@dataclass(frozen=True)
class RegionMeans:
    """A region over all steps: the means of [`StepRegion`], every step weighing the same."""

    region: str
    tokens: StepMean
    restrained: StepMean
    gradient: StepMean
    entropy_change: StepMean


@dataclass(frozen=True)
class EntropyRegions:
    """The regions of a run.

    Args:
        steps (`list` of [`StepRegion`]): Each recorded step with each of `REGIONS`.
        means (`list` of [`RegionMeans`]): One for each of `REGIONS`.
    """

    steps: list[StepRegion]
    means: list[RegionMeans]


def entropy_regions(records: Sequence[StepRecords]) -> EntropyRegions:
    """Tokens, gradient and estimated change of entropy by region, of each step and as means over the steps."""
    steps = [region for record in records for region in _step(record)]
    means = []
    for name in REGIONS:
        of_region = [step for step in steps if step.region == name]
        means.append(
            RegionMeans(
                name,
                tokens=_mean(step.tokens for step in of_region),
                restrained=_mean(step.restrained for step in of_region),
                gradient=_mean(step.gradient for step in of_region),
                entropy_change=_mean(step.entropy_change for step in of_region),
            )
        )
    return EntropyRegions(steps, means)


def _step(record: StepRecords) -> list[StepRegion]:
    columns = ("logp", "old_logp", "entropy", "advantage", "selected")
    table = record.table(*columns)
    logps, old_logps, entropies, advantages, selected = (
        torch.tensor(table[name].to_numpy(np.float64)).unsqueeze(0) for name in columns
    )
    mask = torch.ones_like(logps, dtype=torch.bool)
    regions = token_regions(logps, entropies, advantages, mask)
    metrics = region_metrics(TokenBatch(logps, old_logps, advantages, mask, entropies=entropies))
    rows = []
    for number, name in enumerate(REGIONS, start=1):
        region = regions == number
        rows.append(
            StepRegion(
                record.step,
                name,
                tokens=_ratio(*metrics[f"{name}_tokens"]),
                restrained=_ratio(selected[region].sum(), region.sum()),
                gradient=_ratio(*metrics[f"{name}_gradient"]),
                entropy_change=_ratio(*metrics[f"{name}_entropy"]),
            )
        )
    return rows


def _ratio(part: Tensor, whole: Tensor) -> float | None:
    return float(part) / float(whole) if whole else None


def _mean(values: Iterable[float | None]) -> StepMean:
    known = np.array([value for value in values if value is not None])
    return StepMean(
        mean=float(known.mean()) if len(known) else None,
        standard_error=float(known.std(ddof=1) / len(known) ** 0.5) if len(known) > 1 else None,
    )
