"""Analysis of what a run has logged. Reads files only and never imports the trainer.

Here are the logs of runs and the law; importing them needs numpy only.
"""

from entropy_trl.analysis.law import (
    LawFit,
    Points,
    RunLaw,
    SizeLaw,
    compare_forms,
    cross_validated_rmse,
    entropy_accuracy_pairs,
    entropy_spent,
    fit_law,
    fit_sizes,
    law_of,
    law_points,
    over_seeds,
    predict_early,
)
from entropy_trl.analysis.logs.runs import Run, Series, read_run, read_runs


__all__ = [
    "LawFit",
    "Points",
    "Run",
    "RunLaw",
    "Series",
    "SizeLaw",
    "compare_forms",
    "cross_validated_rmse",
    "entropy_accuracy_pairs",
    "entropy_spent",
    "fit_law",
    "fit_sizes",
    "law_of",
    "law_points",
    "over_seeds",
    "predict_early",
    "read_run",
    "read_runs",
]
