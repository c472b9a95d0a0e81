"""The entropy change of an update against the covariance (Fig. 8 of arXiv 2505.22617), on token records."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from entropy_trl.analysis.covariance.records import StepRecords
from entropy_trl.analysis.covariance.steps import Floats, Level, mean, prompt_means


_BOOTSTRAP_DRAWS = 1000
_FEWEST_CLUSTERS = 8  # fewer do not show how much a correlation varies


@dataclass(frozen=True)
class Relation:
    """How the entropy change goes with learning rate times covariance.

    Args:
        points (`int`): Pairs.
        pearson (`float`): Correlation; None where one of the two does not vary.
        pearson_ci95 (`tuple`, *optional*): Bootstrap interval of `pearson`; None where there is too little to resample.
        spearman (`float`): The same for ranks.
        spearman_ci95 (`tuple`, *optional*): The same for ranks.
        slope (`float`, *optional*): Slope of the least-squares line. A tabular softmax policy has -1 to first order.
        resampled (`str`): What the bootstrap draws.
    """

    points: int
    pearson: float | None
    pearson_ci95: tuple[float, float] | None
    spearman: float | None
    spearman_ci95: tuple[float, float] | None
    slope: float | None
    resampled: str


@dataclass(frozen=True)
class StepChange:
    """The entropy change of one step (or of a window of steps, by its last one), measured on the same states."""

    step: int
    learning_rate: float
    covariance: float
    change: float


@dataclass(frozen=True)
class EntropyChange:
    """Fig. 8 of arXiv 2505.22617: the measured entropy change against the covariance.

    Args:
        level (`str`): The level of the covariance.
        window (`int`): Recorded steps that one point averages.
        steps (`list` of [`StepChange`]): The points.
        over_steps ([`Relation`]): The relation over these points.
        over_prompts ([`Relation`]): The relation over the prompts of all steps, each with its own covariance and
            entropy change.
        within_steps ([`Relation`]): The same after the step's mean is taken off both.
        covariance_positive (`float`): Share of the points whose covariance is above 0.
        entropy_fell (`float`): Share of the points at which the entropy fell.
        sign_agrees (`float`): Share of the points at which the entropy moved as the sign of the covariance says, of
            those whose covariance and learning rate are not 0.
    """

    level: Level
    window: int
    steps: list[StepChange]
    over_steps: Relation
    over_prompts: Relation
    within_steps: Relation
    covariance_positive: float
    entropy_fell: float
    sign_agrees: float


def entropy_change(
    records: Sequence[StepRecords], level: Level = "token", window: int = 1, seed: int = 0
) -> EntropyChange:
    """The entropy change of an update, measured on its own states, against learning rate times covariance (Fig. 8).

    The theory predicts a negative relation: `dH = -eta * Cov`. Its step size is that of the policy's logits. The one
    of an optimizer of shared weights is another, so that the sign and the correlation can be compared, not the slope.

    Args:
        records (`Sequence[StepRecords]`): Steps without `entropy_after` are passed over.
        level (`str`, *optional*): The level of the covariance.
        window (`int`, *optional*, defaults to `1`): Recorded steps that a point averages, for less noise.
        seed (`int`, *optional*, defaults to `0`): Seed of the bootstrap.

    Raises:
        ValueError: Fewer than three points were measured.
    """
    measured = [record for record in records if record.mean_entropy_after is not None]
    if window < 1:
        raise ValueError(f"`window` must be at least 1 step, got {window}.")
    if len(measured) // window < 3:
        raise ValueError(
            f"The entropy after an update is recorded in {len(measured)} of {len(records)} steps: that makes "
            f"{len(measured) // window} points with a window of {window}, and a correlation needs three. A recorder "
            "measures it with `entropy_change: true`."
        )
    points, prompts = [], []
    for record in measured:
        groups = prompt_means(record, level)
        covariance = record.mean_covariance if level == "token" else mean(groups["covariance"].to_numpy(np.float64))
        assert record.mean_entropy_after is not None
        change = record.mean_entropy_after - record.mean_entropy
        points.append(StepChange(record.step, record.learning_rate, covariance, change))
        prompts.append(groups.assign(x=record.learning_rate * groups["covariance"], step=record.step))
    points = [_average(points[i : i + window]) for i in range(0, len(points) - window + 1, window)]
    x = np.array([point.learning_rate * point.covariance for point in points])
    y = np.array([point.change for point in points])

    # Neighbouring steps are alike, as are the prompts of one step: they are drawn together.
    block = round(len(points) ** (1 / 3))
    blocks = np.arange(len(points)) // block
    of_prompts = pd.concat(prompts, ignore_index=True)
    clusters, resampled = of_prompts["step"].to_numpy(), "steps"
    if len(measured) < _FEWEST_CLUSTERS:
        clusters, resampled = np.arange(len(of_prompts)), "prompts"
    centred = of_prompts[["x", "change"]] - of_prompts.groupby("step")[["x", "change"]].transform("mean")

    return EntropyChange(
        level=level,
        window=window,
        steps=points,
        over_steps=_relation(x, y, blocks, f"blocks of {block} points", seed),
        over_prompts=_relation(of_prompts["x"].to_numpy(), of_prompts["change"].to_numpy(), clusters, resampled, seed),
        within_steps=_relation(centred["x"].to_numpy(), centred["change"].to_numpy(), clusters, resampled, seed),
        covariance_positive=mean(np.array([point.covariance > 0 for point in points])),
        entropy_fell=mean(y < 0),
        sign_agrees=mean((x * y < 0)[x != 0]),
    )


def _average(points: Sequence[StepChange]) -> StepChange:
    """One point of several: means, the covariance weighted by the learning rates so that their product stays."""
    rates = np.array([point.learning_rate for point in points])
    rate, change = float(rates.mean()), mean(np.array([point.change for point in points]))
    products = float((rates * [point.covariance for point in points]).mean())
    covariance = products / rate if rate else mean(np.array([point.covariance for point in points]))
    return StepChange(points[-1].step, rate, covariance, change)


def _relation(x: Floats, y: Floats, clusters: NDArray[np.int64], resampled: str, seed: int) -> Relation:
    """Correlations with the percentile interval of a bootstrap that draws whole clusters.

    For Spearman's the ranks are drawn as they are, not ranked again.
    """
    finite = np.isfinite(x) & np.isfinite(y)
    x, y, clusters = x[finite], y[finite], clusters[finite]
    pearson, spearman = _pearson(x, y), _pearson(_ranks(x), _ranks(y))
    return Relation(
        points=len(x),
        pearson=pearson,
        pearson_ci95=None if pearson is None else _interval(x, y, clusters, seed),
        spearman=spearman,
        spearman_ci95=None if spearman is None else _interval(_ranks(x), _ranks(y), clusters, seed),
        slope=None if pearson is None else float(pearson * y.std() / x.std()),
        resampled=resampled,
    )


def _interval(x: Floats, y: Floats, clusters: NDArray[np.int64], seed: int) -> tuple[float, float] | None:
    """The middle 95% of Pearson's correlation over draws of as many clusters; None for too few clusters."""
    names, cluster = np.unique(clusters, return_inverse=True)
    if len(names) < _FEWEST_CLUSTERS:
        return None
    x, y = (x - x.mean()) / x.std(), (y - y.mean()) / y.std()
    # A correlation needs six sums, and those of a draw are sums of the clusters' own.
    sums = np.stack([np.bincount(cluster, term) for term in (np.ones_like(x), x, y, x * x, y * y, x * y)], axis=1)
    drawn = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), _BOOTSTRAP_DRAWS)
    n, x1, y1, x2, y2, xy = (drawn @ sums).T
    spread = (n * x2 - x1**2) * (n * y2 - y1**2)
    varied = spread > 0
    low, high = np.quantile((n * xy - x1 * y1)[varied] / np.sqrt(spread[varied]), (0.025, 0.975))
    return float(low), float(high)


def _pearson(x: Floats, y: Floats) -> float | None:
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def _ranks(x: Floats) -> Floats:
    ranks: Floats = pd.Series(x).rank().to_numpy()
    return ranks
