"""The section on the law: R against exp(H) of each run, with the fit, its interval and the ceiling."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from entropy_trl.analysis import figures
from entropy_trl.analysis.law.compare import Spent
from entropy_trl.analysis.law.fit import Array, Estimate, Inference
from entropy_trl.analysis.law.points import law_points
from entropy_trl.analysis.law.result import RunLaw, law_of
from entropy_trl.analysis.law.sizes import over_seeds
from entropy_trl.analysis.report.page import Page, PageFigure, full_name
from entropy_trl.analysis.report.values import gathered
from entropy_trl.analysis.tables import NONE, number, spread


_HEAD = ["run", "points", "a", "b", "R²", "ceiling [95%]", "R at the end", "exp(H) is"]


@dataclass(frozen=True)
class _Member:
    """The law in one run of a group."""

    group: str
    label: str
    law: RunLaw

    @property
    def name(self) -> str:
        return full_name(self.group, self.label)

    @property
    def spent(self) -> list[Spent]:
        """Empty where the entropy did not fall, or the reward did not rise: the curves say so."""
        return [] if isinstance(self.law.spent, str) else self.law.spent


def section(page: Page) -> dict[str, Any]:
    """The variables of the template: a figure a group, rows of coefficients, and what is to be said of them."""
    laws: list[_Member] = []
    reasons: list[tuple[str, str]] = []
    chosen = (page.chosen.get("reward"), page.chosen.get("entropy"))
    for group, label, run in page.each():
        metrics = chosen
        if laws and chosen == (None, None):
            # What the first run is fitted on, so are the others that logged it: accuracies are not compared to rewards.
            first = (laws[0].law.points.reward_metric, laws[0].law.points.entropy_metric)
            metrics = first if set(first) <= set(run.metrics) else chosen
        try:
            laws.append(_Member(group, label, law_of(run, law_points(run, *metrics))))
        except ValueError as error:
            reasons.append((str(error), full_name(group, label)))
    page.numbers["law"] = [_numbers(one) for one in laws] + [{"run": run, "reason": why} for why, run in reasons]
    members = {group: [one for one in laws if one.group == group] for group in page.groups}
    members = {group: of_group for group, of_group in members.items() if of_group}
    rows = [row for group, of_group in members.items() for row in _rows(group, of_group)]
    notes = gathered((note, one.name) for one in laws for note in one.law.notes)
    spent = [one for one in laws if one.spent]
    return {
        "figures": _figures(page, members),
        "head": _HEAD,
        "rows": rows,
        "notes": notes,
        "reasons": gathered(reasons),
        "spent_head": ["run", *(f"first {100 * s.fraction:.0f}% of the steps" for s in spent[0].spent)]
        if spent
        else [],
        "spent": [[one.name, *(_spent(s) for s in one.spent)] for one in spent],
    }


def _figures(page: Page, members: Mapping[str, Sequence[_Member]]) -> list[PageFigure]:
    """A figure a group. They are compared, so they have one scale."""
    drawings = {
        group: figures.law(
            [one.law.fit for one in laws], [_mean_interval(one.law.inference) for one in laws], page.styles[group]
        )
        for group, laws in members.items()
    }
    by_metric: dict[str, list[Figure]] = {}
    for group, drawing in drawings.items():
        by_metric.setdefault(members[group][0].law.points.reward_metric, []).append(drawing)
    for compared in by_metric.values():
        figures.same_scale(compared, both=True)
    return [_figure(page, group, laws, drawings[group]) for group, laws in members.items()]


def _figure(page: Page, group: str, laws: Sequence[_Member], drawing: Figure) -> PageFigure:
    findings = [f"{'' if len(laws) == 1 else f'{one.label}: '}{_ceiling_in_words(one)}" for one in laws]
    metrics = dict.fromkeys((one.law.points.reward_metric, one.law.points.entropy_metric) for one in laws)
    note = " ".join(f"R is {reward}, H is {entropy}." for reward, entropy in metrics)
    rows = [
        [one.label, number(h), number(math.exp(h)), number(r), number(float(one.law.fit.predict(h)))]
        for one in laws
        for h, r in spread(list(zip(one.law.fit.entropy.tolist(), one.law.fit.reward.tolist(), strict=True)))
    ]
    name = f"law-{list(page.groups).index(group) + 1}"
    table = (["run", "H", "exp(H)", "R", "fitted R"], rows)
    return page.figure(drawing, name, f"R against exp(H): {group}", findings, note, table, [group])


def _ceiling_in_words(one: _Member) -> str:
    ceiling = _ceiling([one])
    return "no ceiling, since the reward does not rise as entropy falls" if ceiling is None else f"ceiling {ceiling}"


def _ceiling(laws: Sequence[_Member]) -> str | None:
    """The ceiling of a run, or of the mean over seeds; None where the sign of a fit makes none."""
    if any(one.law.fit.a <= 0 for one in laws):
        return None
    return _interval(laws[0].law.inference.ceiling if len(laws) == 1 else over_seeds([o.law.fit for o in laws]).ceiling)


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


def _rows(group: str, laws: Sequence[_Member]) -> Iterable[tuple[bool, list[str]]]:
    """Whether a row is a group's mean, and its cells."""
    if len(laws) > 1:
        mean = over_seeds([one.law.fit for one in laws])
        cells = [number(mean.a.value), number(mean.b.value), NONE, _ceiling(laws) or NONE, NONE, ""]
        yield True, [f"{group}, mean of {len(laws)}", NONE, *cells]
    for one in laws:
        cells = [str(one.law.fit.points), number(one.law.fit.a), number(one.law.fit.b), f"{one.law.fit.r2:.2f}"]
        end = number(float(one.law.fit.reward[-1]))
        yield False, [one.name, *cells, _ceiling([one]) or NONE, end, one.law.verdict]


def _spent(spent: Spent) -> str:
    return f"{100 * spent.entropy:.0f}% of the entropy, {100 * spent.reward:.0f}% of the gain"


def _interval(estimate: Estimate) -> str:
    return f"{number(estimate.value)} [{number(estimate.low)}, {number(estimate.high)}]"


def _numbers(one: _Member) -> dict[str, Any]:
    return {
        "run": one.name,
        "group": one.group,
        "label": one.label,
        "reward_metric": one.law.points.reward_metric,
        "entropy_metric": one.law.points.entropy_metric,
        "steps": one.law.points.steps,
        "entropy": one.law.points.entropy,
        "reward": one.law.points.reward,
        **{name: getattr(one.law.inference, name)._asdict() for name in ("a", "b")},
        "ceiling": one.law.inference.ceiling._asdict() if one.law.fit.a > 0 else None,
        "r2": one.law.fit.r2,
        "rmse": one.law.fit.rmse,
        "exp_is": one.law.forms.verdict,
        "spent": [spent._asdict() for spent in one.spent],
        "notes": one.law.notes,
    }
