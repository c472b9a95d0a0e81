"""The law against other curves, what its start says about the rest of a training, and what entropy has bought."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from entropy_trl.analysis.law.fit import FORMS, MIN_POINTS, Array, Form, LawFit, check_entropy, fit_law


#: Models whose AIC differs by less are both supported by the data (Burnham and Anderson, 2002).
AIC_MARGIN = 2.0
#: Where the paper reads off what was spent and gained: the first 200 and 800 of 2,400 steps.
SPENT_AT = (1 / 12, 1 / 3)


class FormScore(NamedTuple):
    """How well one curve fits.

    Attributes:
        fit ([`LawFit`]): The curve.
        aic (`float`): Akaike's criterion relative to the law: above 0 where the law is better. In units of independent
            points, `n_eff ln(RSS / RSS_exp)`: with `n` in place of `n_eff`, autocorrelated points would count as new
            evidence.
        cv_rmse (`float`): Root mean squared error on contiguous blocks that were left out, in the reward's unit.
    """

    fit: LawFit
    aic: float
    cv_rmse: float


class FormComparison(NamedTuple):
    """The law against other curves through the same points.

    Attributes:
        scores (`dict[Form, FormScore]`): The scores by form; the law first.
        verdict (`dict[Form, str]`): For each other form, `"better"`: the law fits better, by AIC (2 or more) and on
            blocks left out; `"worse"`: the other one does; `"not distinguishable"`: neither.
    """

    scores: dict[Form, FormScore]
    verdict: dict[Form, str]


def compare_forms(entropy: npt.ArrayLike, reward: npt.ArrayLike, robust: bool = False) -> FormComparison:
    """Compare the law with curves linear in `H` and in `ln(H)`.

    Over a small range of `H` the three are nearly the same curve: then they are not distinguishable, and this says so.
    So are curves that all pass through every point, as with two different entropies. `"log"` is left out where an
    entropy is 0.

    Raises:
        ValueError: As for [`fit_law`].
    """
    h, r = check_entropy(entropy), np.asarray(reward, dtype=np.float64)
    fits = {form: fit_law(h, r, form, robust) for form in FORMS if form != "log" or h.min() > 0}
    law = fits["exp"]
    points = law.effective_points
    best = _squares(law)
    scores: dict[Form, FormScore] = {}
    verdict: dict[Form, str] = {}
    for form, fit in fits.items():
        squares = _squares(fit)
        if squares == best:  # both 0, where both pass through every point
            aic = 0.0
        elif min(squares, best) > 0:
            aic = points * math.log(squares / best)
        else:
            aic = math.copysign(math.inf, squares - best)
        scores[form] = FormScore(fit, 0.0 if form == "exp" else aic, cross_validated_rmse(h, r, form, robust))
        if form != "exp":
            cv_gain = scores[form].cv_rmse - scores["exp"].cv_rmse
            verdict[form] = "not distinguishable"
            if aic >= AIC_MARGIN and cv_gain > 0:
                verdict[form] = "better"
            if aic <= -AIC_MARGIN and cv_gain < 0:
                verdict[form] = "worse"
    return FormComparison(scores, verdict)


def _squares(fit: LawFit) -> float:
    """The sum of squared residuals, without rounding errors."""
    return 0.0 if fit.exact else float((fit.residuals**2).sum())


def cross_validated_rmse(
    entropy: npt.ArrayLike, reward: npt.ArrayLike, form: Form = "exp", robust: bool = False, blocks: int = 5
) -> float:
    """Error on contiguous blocks of the training, each predicted from the others; NaN with fewer than 6 points.

    Blocks, since a point beside those that were fitted shares their noise.
    """
    h, r = check_entropy(entropy, form), np.asarray(reward, dtype=np.float64)
    if len(h) < 2 * MIN_POINTS:
        return math.nan
    errors = []
    for block in np.array_split(np.arange(len(h)), min(blocks, len(h) // 2)):
        rest = np.setdiff1d(np.arange(len(h)), block)
        if np.ptp(h[rest]) <= 1e-6 * max(1.0, float(h[rest].max())):
            return math.nan  # the entropy moved within this block only
        errors.append(r[block] - fit_law(h[rest], r[rest], form, robust).predict(h[block]))
    return float(np.sqrt((np.concatenate(errors) ** 2).mean()))


class EarlyPrediction(NamedTuple):
    """What a fit to the start of a training says about the rest of it.

    Attributes:
        fit ([`LawFit`]): The fit to the start.
        last_step (`int`): The last step that it has seen.
        rmse (`float`): Root mean squared error of the later points, predicted from their entropies, in the
            reward's unit.
        last_error (`float`): Predicted minus measured reward at the last point.
        predicted (`Array`): The rewards predicted for the later points.
        unchanged_rmse (`float`): The same error if the reward were predicted to stay what it was at the end of the
            start.
        mean_rmse (`float`): The same error of the later points' own mean: what a constant can reach at best.
    """

    fit: LawFit
    last_step: int
    rmse: float
    last_error: float
    predicted: Array
    unchanged_rmse: float
    mean_rmse: float


def predict_early(
    entropy: npt.ArrayLike,
    reward: npt.ArrayLike,
    steps: npt.ArrayLike | None = None,
    fraction: float = 0.15,
    form: Form = "exp",
    robust: bool = False,
) -> EarlyPrediction:
    """Fit the first part of a training and predict the rest, as the paper does from 36 of 236 steps.

    The reward of a later point is predicted from the *measured* entropy of that point: the law says what reward an
    entropy buys, not when it will be reached.

    Args:
        entropy (`npt.ArrayLike`): As for [`fit_law`].
        reward (`npt.ArrayLike`): As for [`fit_law`].
        steps (`npt.ArrayLike`, *optional*): Steps of the points; their numbers if not given.
        fraction (`float`, *optional*, defaults to `0.15`): Share of the steps between the first and the last point.
        form (`Form`, *optional*, defaults to `"exp"`): As for [`fit_law`].
        robust (`bool`, *optional*, defaults to `False`): As for [`fit_law`].

    Raises:
        ValueError: Fewer than 3 points in the first part or none after it, or as for [`fit_law`].
    """
    if not 0 < fraction < 1:
        raise ValueError(f"The fraction to fit must be between 0 and 1, got {fraction:g}.")
    h, r = check_entropy(entropy, form), np.asarray(reward, dtype=np.float64)
    at = np.arange(len(h)) if steps is None else np.asarray(steps)
    # Shares are compared, since the product `fraction * steps` can round to just below a whole step.
    early = (at - at[0]) / (at[-1] - at[0]) <= fraction if len(at) > 1 else np.zeros(len(at), dtype=bool)
    if early.sum() < MIN_POINTS or early.all():
        raise ValueError(
            f"The first {fraction:.0%} of the training has {early.sum()} of {len(h)} points: {MIN_POINTS} are the "
            "least for a fit, and one must be left to predict. Fit a larger fraction, or evaluate more often."
        )
    fit = fit_law(h[early], r[early], form, robust)
    later = r[~early]
    predicted = fit.predict(h[~early])
    return EarlyPrediction(
        fit,
        int(at[early][-1]),
        float(np.sqrt(((predicted - later) ** 2).mean())),
        float(predicted[-1] - later[-1]),
        predicted,
        float(np.sqrt(((r[early][-1] - later) ** 2).mean())),
        float(later.std()),
    )


class Spent(NamedTuple):
    """Shares of the entropy that is spent, and of the reward that is gained, by a part of the training."""

    fraction: float
    step: float
    entropy: float
    reward: float


def entropy_spent(
    entropy: npt.ArrayLike,
    reward: npt.ArrayLike,
    steps: npt.ArrayLike | None = None,
    at: Sequence[float] = SPENT_AT,
) -> list[Spent]:
    """What part of the whole fall of entropy, and of the whole gain of reward, came in the first parts of a training.

    The paper's statement: the first 200 of 2,400 steps use 73% of the entropy and give 76% of the gain; the first 800,
    94% and 93%. Whole fall and gain are from the first to the last point; between points, linear interpolation.

    Args:
        entropy (`npt.ArrayLike`): As for [`fit_law`].
        reward (`npt.ArrayLike`): As for [`fit_law`].
        steps (`npt.ArrayLike`, *optional*): Steps of the points; their numbers if not given.
        at (`Sequence[float]`, *optional*, defaults to `SPENT_AT`): The parts of the training.

    Raises:
        ValueError: The entropy did not fall, or the reward did not rise, from the first to the last point.
    """
    h, r = check_entropy(entropy), np.asarray(reward, dtype=np.float64)
    if len(h) < 2:
        raise ValueError(f"{len(h)} points have no start and end.")
    when = np.arange(len(h), dtype=np.float64) if steps is None else np.asarray(steps, dtype=np.float64)
    for name, first, last, moved in (("entropy", h[0], h[-1], h[0] > h[-1]), ("reward", r[0], r[-1], r[0] < r[-1])):
        if not moved:
            verb = "fall" if name == "entropy" else "rise"
            raise ValueError(f"The {name} did not {verb} ({first:.4g} at the start, {last:.4g} at the end).")
    spent = []
    for fraction in at:
        step = when[0] + fraction * (when[-1] - when[0])
        gone = (h[0] - np.interp(step, when, h)) / (h[0] - h[-1])
        gained = (np.interp(step, when, r) - r[0]) / (r[-1] - r[0])
        spent.append(Spent(fraction, float(step), float(gone), float(gained)))
    return spent
