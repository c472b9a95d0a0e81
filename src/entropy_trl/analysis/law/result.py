"""What the law says about one run: fitted, judged and worded here for all who show it."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from entropy_trl.analysis.law.compare import (
    EarlyPrediction,
    FormComparison,
    Spent,
    compare_forms,
    entropy_spent,
    predict_early,
)
from entropy_trl.analysis.law.fit import Diagnostics, Inference, LawFit, Method, fit_law
from entropy_trl.analysis.law.points import Points, law_points
from entropy_trl.analysis.logs.runs import Run


#: Below these the law does not show, or its intervals rest on little.
_LOW_R2, _FEW_EFFECTIVE = 0.5, 6.0
_SMALL_P = 0.01


@dataclass(frozen=True)
class RunLaw:
    """The law in one run; from [`law_of`]. What needs SciPy or statsmodels is computed when it is asked for.

    Attributes:
        run ([`Run`]): The run.
        points ([`Points`]): The run's points.
        fit ([`LawFit`]): The fit to them.
        method (`Method`, *optional*, defaults to `"ar1"`): Method of the intervals, as for [`LawFit.inference`].
        confidence (`float`, *optional*, defaults to `0.95`): Confidence of the intervals.
        fit_fraction (`float`, *optional*, defaults to `0.15`): The part of the training that `early` is fitted to.
    """

    run: Run
    points: Points
    fit: LawFit
    method: Method = "ar1"
    confidence: float = 0.95
    fit_fraction: float = 0.15

    @cached_property
    def inference(self) -> Inference:
        """Standard errors and intervals; needs SciPy."""
        return self.fit.inference(self.method, self.confidence)

    @cached_property
    def diagnostics(self) -> Diagnostics:
        """Tests of the residuals; needs statsmodels."""
        return self.fit.diagnostics()

    @cached_property
    def forms(self) -> FormComparison:
        """The law against other curves."""
        return compare_forms(self.fit.entropy, self.fit.reward, self.fit.robust)

    @cached_property
    def early(self) -> EarlyPrediction | str:
        """The rest of the training, predicted from its start; or why it cannot be."""
        fit = self.fit
        try:
            return predict_early(fit.entropy, fit.reward, self.points.steps, self.fit_fraction, robust=fit.robust)
        except ValueError as error:
            return str(error)

    @cached_property
    def spent(self) -> list[Spent] | str:
        """Entropy spent and reward gained by the first parts of the training; or why there is no such share."""
        try:
            return entropy_spent(self.fit.entropy, self.fit.reward, self.points.steps)
        except ValueError as error:
            return str(error)

    @property
    def verdict(self) -> str:
        """How the law compares with the other curves, in words."""
        names = {"linear": "H", "log": "ln(H)"}
        words = {"better": "better than", "worse": "worse than", "not distinguishable": "not distinguishable from"}
        said: dict[str, list[str]] = {}
        for form, verdict in self.forms.verdict.items():
            said.setdefault(words[verdict], []).append(names[form])
        return ", ".join(f"{verdict} {' and '.join(others)}" for verdict, others in said.items())

    @property
    def notes(self) -> list[str]:
        """What was chosen and left out among the points, and where the fit says little; a sentence each."""
        return [*self.points.notes, *self._warnings()]

    @property
    def residual_warnings(self) -> list[str]:
        """What the tests of the residuals warn of, a sentence each; needs statsmodels."""
        if self.diagnostics.jarque_bera < _SMALL_P:
            return ["the residuals are not normal (Jarque-Bera): see whether --robust changes the coefficients."]
        return []

    def _warnings(self) -> Iterable[str]:
        fit = self.fit
        if fit.a <= 0:
            yield "a is not positive: the reward does not rise as the entropy falls, so the law does not hold here."
        elif fit.r2 < _LOW_R2:
            yield f"the law explains less than {_LOW_R2:.0%} of the variance: the ceiling means little."
        if fit.effective_points < _FEW_EFFECTIVE:
            yield "autocorrelated residuals leave fewer than 6 effective points: the intervals are rough."
        if fit.reward.max() <= 1 < fit.ceiling:
            yield "the ceiling is above 1, which no accuracy reaches: the law does not hold down to H = 0 here."


def law_of(
    run: Run,
    points: Points | None = None,
    *,
    robust: bool = False,
    method: Method = "ar1",
    confidence: float = 0.95,
    fit_fraction: float = 0.15,
) -> RunLaw:
    """Fit the law to a run.

    Args:
        run ([`Run`]): The run, from [`read_run`](entropy_trl.analysis.logs.runs.read_run).
        points ([`Points`], *optional*): The points to fit; by default those that [`law_points`] chooses.
        robust (`bool`, *optional*, defaults to `False`): Huber's M-estimator instead of least squares; needs
            statsmodels.
        method (`Method`, *optional*, defaults to `"ar1"`): Method of the intervals, as for [`LawFit.inference`].
        confidence (`float`, *optional*, defaults to `0.95`): Confidence of the intervals.
        fit_fraction (`float`, *optional*, defaults to `0.15`): The part of the training that is fitted to predict the
            rest.

    Raises:
        ValueError: The run has no such points, or the law cannot be fitted to them.
        ImportError: The package statsmodels is missing, with `robust`.
    """
    points = law_points(run) if points is None else points
    fit = fit_law(points.entropy, points.reward, robust=robust)
    return RunLaw(run, points, fit, method, confidence, fit_fraction)
