"""The covariance of arXiv 2505.22617 in token records: by quantile, over training, by difficulty, against entropy."""

from entropy_trl.analysis.covariance.relation import EntropyChange, Relation, StepChange, entropy_change
from entropy_trl.analysis.covariance.steps import (
    DifficultyGroup,
    DistributionCovariance,
    QuantileRow,
    QuantileTable,
    StepCovariance,
    by_difficulty,
    covariance_over_training,
    distribution_covariance,
    quantile_table,
)


__all__ = [
    "DifficultyGroup",
    "DistributionCovariance",
    "EntropyChange",
    "QuantileRow",
    "QuantileTable",
    "Relation",
    "StepChange",
    "StepCovariance",
    "by_difficulty",
    "covariance_over_training",
    "distribution_covariance",
    "entropy_change",
    "quantile_table",
]
