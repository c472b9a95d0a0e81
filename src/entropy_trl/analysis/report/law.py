"""The section on the law: R against exp(H) of each run, with the fit, its interval and the ceiling."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from entropy_trl.analysis import figures
from entropy_trl.analysis.law import (
    Array,
    Estimate,
    FormComparison,
    Inference,
    LawFit,
    Spent,
    compare_forms,
    entropy_spent,
    fit_law,
)
from entropy_trl.analysis.law_sizes import over_seeds
from entropy_trl.analysis.pairs import Points, law_points
from entropy_trl.analysis.report.page import Page, PageFigure, full_name
from entropy_trl.analysis.report.values import NONE, gathered, number, spread
from entropy_trl.analysis.runs import Run


_LOW_R2 = 0.5  # below, the law does not describe the run
_HEAD = ["run", "points", "a", "b", "R²", "ceiling [95%]", "R at the end", "exp(H) is"]


@dataclass(frozen=True)
class _Law:
    """The law in one run."""

    group: str
    label: str
    points: Points
    fit: LawFit
    inference: Inference
    forms: FormComparison
    spent: list[Spent] = field(default_factory=list)

    @property
    def name(self) -> str:
        return full_name(self.group, self.label)


def section(page: Page) -> dict[str, Any]:
    """The variables of the template: a figure a group, rows of coefficients, and what is to be said of them."""
    laws: list[_Law] = []
    reasons: list[tuple[str, str]] = []
    chosen = (page.chosen.get("reward"), page.chosen.get("entropy"))
    for group, label, run in page.each():
        metrics = chosen
        if laws and chosen == (None, None):
            # What the first run is fitted on, so are the others that logged it: accuracies are not compared to rewards.
            first = (laws[0].points.reward_metric, laws[0].points.entropy_metric)
            metrics = first if set(first) <= set(run.metrics) else chosen
        found = _fitted(run, group, label, *metrics)
        if isinstance(found, str):
            reasons.append((found, full_name(group, label)))
        else:
            laws.append(found)
    page.numbers["law"] = [_numbers(law) for law in laws] + [{"run": run, "reason": why} for why, run in reasons]
    members = {group: [law for law in laws if law.group == group] for group in page.groups}
    members = {group: of_group for group, of_group in members.items() if of_group}
    rows = [row for group, of_group in members.items() for row in _rows(group, of_group)]
    notes = gathered((note, law.name) for law in laws for note in (*law.points.notes, *_remarks(law)))
    spent = [law for law in laws if law.spent]
    return {
        "figures": [_figure(page, group, of_group) for group, of_group in members.items()],
        "head": _HEAD,
        "rows": rows,
        "notes": notes,
        "reasons": gathered(reasons),
        "spent_head": ["run", *(f"first {100 * s.fraction:.0f}% of the steps" for s in spent[0].spent)]
        if spent
        else [],
        "spent": [[law.name, *(_spent(s) for s in law.spent)] for law in spent],
    }


def _fitted(run: Run, group: str, label: str, reward: str | None, entropy: str | None) -> _Law | str:
    """The law in a run, or the reason why there is none."""
    try:
        points = law_points(run, reward, entropy)
        fit = fit_law(points.entropy, points.reward)
        forms = compare_forms(points.entropy, points.reward)
    except ValueError as error:
        return str(error)
    try:
        spent = entropy_spent(points.entropy, points.reward, points.steps)
    except ValueError:  # the entropy did not fall, or the reward did not rise: the curves say so
        spent = []
    return _Law(group, label, points, fit, fit.inference(), forms, spent)


def _figure(page: Page, group: str, laws: Sequence[_Law]) -> PageFigure:
    bands = [_mean_interval(law.inference) for law in laws]
    drawing = figures.law([law.fit for law in laws], bands, page.styles[group])
    findings = [
        f"{'' if len(laws) == 1 else f'{law.label}: '}ceiling {_interval(law.inference.ceiling)}, "
        f"{number(float(law.fit.reward[-1]))} measured at the end, R² {law.fit.r2:.2f}"
        for law in laws
    ]
    metrics = dict.fromkeys((law.points.reward_metric, law.points.entropy_metric) for law in laws)
    note = " ".join(f"R is {reward}, H is {entropy}." for reward, entropy in metrics)
    rows = [
        [law.label, number(h), number(math.exp(h)), number(r), number(float(law.fit.predict(h)))]
        for law in laws
        for h, r in spread(list(zip(law.fit.entropy.tolist(), law.fit.reward.tolist(), strict=True)))
    ]
    name = f"law-{list(page.groups).index(group) + 1}"
    table = (["run", "H", "exp(H)", "R", "fitted R"], rows)
    return page.figure(drawing, name, f"R against exp(H): {group}", findings, note, table, [group])


def _mean_interval(inference: Inference) -> Callable[[Array], tuple[Array, Array]]:
    """The interval of `b - a x` at values of `x = exp(H)`, from those of `a`, `b` and the ceiling, `b - a`."""
    a, b, ceiling = inference.a, inference.b, inference.ceiling
    covariance = (a.standard_error**2 + b.standard_error**2 - ceiling.standard_error**2) / 2
    quantile = (a.high - a.value) / a.standard_error if a.standard_error > 0 else 0.0

    def interval(x: Array) -> tuple[Array, Array]:
        variance = b.standard_error**2 + x**2 * a.standard_error**2 - 2 * x * covariance
        half = quantile * np.sqrt(np.maximum(variance, 0.0))
        value = b.value - a.value * x
        return value - half, value + half

    return interval


def _rows(group: str, laws: Sequence[_Law]) -> Iterable[tuple[bool, list[str]]]:
    """Whether a row is a group's mean, and its cells."""
    if len(laws) > 1:
        mean = over_seeds([law.fit for law in laws])
        cells = [number(mean.a.value), number(mean.b.value), NONE, _interval(mean.ceiling), NONE, ""]
        yield True, [f"{group}, mean of {len(laws)}", NONE, *cells]
    for law in laws:
        cells = [str(law.fit.points), number(law.fit.a), number(law.fit.b), f"{law.fit.r2:.2f}"]
        end = number(float(law.fit.reward[-1]))
        yield len(laws) == 1, [law.name, *cells, _interval(law.inference.ceiling), end, _verdict(law.forms)]


def _verdict(forms: FormComparison) -> str:
    words = {"better": "better than", "worse": "worse than", "not distinguishable": "not distinguishable from"}
    curves = {"linear": "H", "log": "ln(H)"}
    said: dict[str, list[str]] = {}
    for form, verdict in forms.verdict.items():
        said.setdefault(words[verdict], []).append(curves[form])
    return ", ".join(f"{verdict} {' and '.join(names)}" for verdict, names in said.items())


def _remarks(law: _Law) -> Iterable[str]:
    if law.fit.a <= 0:
        yield "The reward does not rise as the entropy falls: the law does not hold."
    elif law.fit.r2 < _LOW_R2:
        yield "The law explains less than half of the variance: the ceiling means little."
    if law.fit.reward.max() <= 1 < law.fit.ceiling:
        yield "The ceiling is above 1, which no accuracy reaches: the law does not hold down to H = 0."


def _spent(spent: Spent) -> str:
    return f"{100 * spent.entropy:.0f}% of the entropy, {100 * spent.reward:.0f}% of the gain"


def _interval(estimate: Estimate) -> str:
    return f"{number(estimate.value)} [{number(estimate.low)}, {number(estimate.high)}]"


def _numbers(law: _Law) -> dict[str, Any]:
    return {
        "run": law.name,
        "group": law.group,
        "label": law.label,
        "reward_metric": law.points.reward_metric,
        "entropy_metric": law.points.entropy_metric,
        "steps": law.points.steps,
        "entropy": law.points.entropy,
        "reward": law.points.reward,
        **{name: getattr(law.inference, name)._asdict() for name in ("a", "b", "ceiling")},
        "r2": law.fit.r2,
        "rmse": law.fit.rmse,
        "exp_is": law.forms.verdict,
        "spent": [spent._asdict() for spent in law.spent],
        "notes": [*law.points.notes, *_remarks(law)],
    }
