"""The law of arXiv 2505.22617, `R = -a exp(H) + b`: its points in a log, its fit, and what the fit says."""

from entropy_trl.analysis.law.compare import compare_forms, cross_validated_rmse, entropy_spent, predict_early
from entropy_trl.analysis.law.fit import FORMS, METHODS, LawFit, check_entropy, fit_law
from entropy_trl.analysis.law.points import Points, entropy_accuracy_pairs, law_points
from entropy_trl.analysis.law.result import RunLaw, law_of
from entropy_trl.analysis.law.sizes import SizeLaw, fit_sizes, over_seeds


__all__ = [
    "FORMS",
    "METHODS",
    "LawFit",
    "Points",
    "RunLaw",
    "SizeLaw",
    "check_entropy",
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
]
