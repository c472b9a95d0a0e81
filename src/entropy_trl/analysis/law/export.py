"""The results of `entropy-trl law` for programs."""

from typing import Any

from entropy_trl.analysis.law.result import RunLaw
from entropy_trl.analysis.law.sizes import Coefficients, parse_params
from entropy_trl.analysis.law.text import Results
from entropy_trl.analysis.tables import plain


def as_dict(results: Results) -> dict[str, Any]:
    """The results for programs; what is not a number is null."""
    options = results.options
    content = {
        "law": "R = -a exp(H) + b, H in nats a token",
        "method": options.intervals,
        "confidence": options.confidence,
        "robust": options.robust,
        "fit_fraction": options.fit_fraction,
        "runs": [_run_dict(one) for one in results.runs],
        "groups": {name: _coefficients_dict(c) for name, c in results.groups.items()},
        "params": results.params,
        "extrapolated": None
        if results.extrapolated is None
        else {"params": parse_params(options.extrapolate)} | _coefficients_dict(results.extrapolated),
    }
    if results.sizes is not None:
        lines = {"a": results.sizes.a, "b": results.sizes.b, "ceiling": results.sizes.ceiling}
        content["sizes"] = {
            name: {"slope": line.slope, "intercept": line.intercept, "r2": line.r2} for name, line in lines.items()
        }
    numbers: dict[str, Any] = plain(content)
    return numbers


def _run_dict(one: RunLaw) -> dict[str, Any]:
    early = one.early
    return {
        "name": one.run.name,
        "group": one.run.group,
        "seed": one.run.seed,
        "reward_metric": one.points.reward_metric,
        "entropy_metric": one.points.entropy_metric,
        "steps": one.points.steps,
        "entropy": one.points.entropy,
        "reward": one.points.reward,
        **{name: getattr(one.inference, name)._asdict() for name in ("a", "b", "ceiling")},
        "r2": one.fit.r2,
        "rmse": one.fit.rmse,
        "effective_points": one.inference.effective_points,
        "diagnostics": one.diagnostics._asdict(),
        "forms": {
            form: {"a": s.fit.a, "b": s.fit.b, "r2": s.fit.r2, "rmse": s.fit.rmse, "aic": s.aic, "cv_rmse": s.cv_rmse}
            for form, s in one.forms.scores.items()
        },
        "exp_is": one.forms.verdict,
        "early": early
        if isinstance(early, str)
        else {name: value for name, value in early._asdict().items() if name != "fit"}
        | {"a": early.fit.a, "b": early.fit.b, "points": early.fit.points},
        "spent": one.spent if isinstance(one.spent, str) else [s._asdict() for s in one.spent],
        "notes": [*one.notes, *one.residual_warnings],
    }


def _coefficients_dict(coefficients: Coefficients) -> dict[str, Any]:
    return {name: estimate._asdict() for name, estimate in coefficients._asdict().items()}
