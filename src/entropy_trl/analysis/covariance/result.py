"""All that `entropy-trl covariance` computes from token records."""

from collections.abc import Sequence
from dataclasses import dataclass

from entropy_trl.analysis.covariance.records import StepRecords
from entropy_trl.analysis.covariance.regions import EntropyRegions, entropy_regions
from entropy_trl.analysis.covariance.relation import EntropyChange, entropy_change
from entropy_trl.analysis.covariance.steps import (
    DifficultyGroup,
    Level,
    QuantileTable,
    StepCovariance,
    by_difficulty,
    covariance_over_training,
    quantile_table,
)
from entropy_trl.analysis.covariance.tokens import SelectedTokens, selected_tokens


#: The share of the tokens with the highest covariance that is looked at where no control restrained any.
HIGHEST = 0.02


@dataclass(frozen=True)
class Results:
    """The analyses.

    `entropy_change` is None where too few steps measured it, and `difficulty` where a reward is not in [0, 1].
    """

    run: str
    level: Level
    quantiles: list[QuantileTable]
    training: list[StepCovariance]
    entropy_change: EntropyChange | None
    difficulty: list[DifficultyGroup] | None
    regions: EntropyRegions
    tokens: SelectedTokens


def covariance_of(
    run: str, records: Sequence[StepRecords], level: Level = "token", window: int = 1, fraction: float | None = None
) -> Results:
    """Compute all analyses.

    Args:
        run (`str`): What the records were read from.
        records (`Sequence[StepRecords]`): The steps.
        level (`str`, *optional*): Level of the covariance.
        window (`int`, *optional*, defaults to `1`): Recorded steps that a point of the entropy change averages.
        fraction (`float`, *optional*): The share of the tokens to look at. Defaults to those that the control
            restrained, or the highest 2% without one.
    """
    training = covariance_over_training(records, level)
    measured = sum(record.mean_entropy_after is not None for record in records)
    low, high = _accuracy_range(records)
    return Results(
        run=run,
        level=level,
        quantiles=quantile_table(records, level),
        training=training,
        entropy_change=entropy_change(records, level, window) if measured // window >= 3 else None,
        difficulty=by_difficulty(records, level) if 0 <= low <= high <= 1 else None,
        regions=entropy_regions(records),
        tokens=chosen_tokens(records, fraction),
    )


def chosen_tokens(records: Sequence[StepRecords], fraction: float | None = None) -> SelectedTokens:
    """The tokens with this share of the highest covariance; by default those that the control restrained."""
    if fraction is None and not any(record.table("selected")["selected"].any() for record in records):
        fraction = HIGHEST
    return selected_tokens(records, fraction)


def _accuracy_range(records: Sequence[StepRecords]) -> tuple[float, float]:
    columns = [record.table("group_accuracy")["group_accuracy"] for record in records]
    return min(float(column.min()) for column in columns), max(float(column.max()) for column in columns)
