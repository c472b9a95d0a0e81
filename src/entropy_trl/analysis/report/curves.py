"""Curves of what was logged: a figure a metric, a line a group, with the range of its seeds as a band."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from entropy_trl.analysis import figures
from entropy_trl.analysis.figures import Curve
from entropy_trl.analysis.logs.runs import Run, Series
from entropy_trl.analysis.report.page import Page, PageFigure, full_name
from entropy_trl.analysis.tables import NONE, number, spread


COVARIANCE_UNIT = "nats times advantage"


@dataclass(frozen=True)
class Panel:
    """One figure of the curves.

    Attributes:
        key (`str`): Key of the figure.
        title (`str`): Title of the figure.
        unit (`str`): Label of its axis.
        metrics (`str | tuple[str, ...]`): The kind of metric ([`METRIC_NAMES`]), or the names under which it is
            logged.
        noisy (`bool`, *optional*, defaults to `False`): Whether its running mean is drawn.
    """

    key: str
    title: str
    unit: str
    metrics: str | tuple[str, ...]
    noisy: bool = False


SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Entropy, reward and accuracy": (
        Panel("entropy", "Policy entropy", "nats a token", "entropy"),
        Panel("reward", "Training reward", "mean reward", "reward", noisy=True),
        Panel("accuracy", "Accuracy of evaluations", "accuracy", "accuracy"),
        Panel("pass-at-k", "pass@k of evaluations", "share of the prompts", "pass_at_k"),
        Panel("length", "Length of completions", "tokens", "length", noisy=True),
    ),
    "Clipping, selection and updates": (
        Panel("clip", "Tokens stopped by the ratio clip", "share of the tokens", "clip_fraction", noisy=True),
        Panel("selected", "Tokens restrained by the control", "share of the tokens", "selected_fraction"),
        Panel("covariance", "Mean covariance (logged)", COVARIANCE_UNIT, "covariance", noisy=True),
        Panel("kl", "KL divergence from the reference", "nats a token", "kl", noisy=True),
        Panel("grad-norm", "Gradient norm before clipping", "norm", "grad_norm", noisy=True),
    ),
    "Diversity": (
        Panel("distinct", "Distinct completions of a prompt", "completions", "distinct_completions", noisy=True),
        Panel("distinct-correct", "Distinct correct completions", "completions", "distinct_correct", noisy=True),
        Panel(
            "answers",
            "Distinct answers of a prompt",
            "answers",
            ("math_reward/distinct_answers", "train/math_reward/distinct_answers"),
            noisy=True,
        ),
        Panel("solved", "Prompts with a correct completion", "share of the prompts", "solved", noisy=True),
    ),
}


#: Figures of one quantity, which have one scale.
_COMPARED = (("accuracy", "pass-at-k"), ("distinct", "distinct-correct", "answers"))


def sections(page: Page) -> list[tuple[str, list[PageFigure]]]:
    """The sections that have a figure at least."""
    return [(name, drawn) for name, panels in SECTIONS.items() if (drawn := _section(page, panels))]


def has_a_panel(run: Run) -> bool:
    """Whether the run logged a metric that one of the figures draws."""
    panels = (panel for of_section in SECTIONS.values() for panel in of_section)
    return any(_known(panel, run) is not None for panel in panels)


def entropies(page: Page, runs: Iterable[Run]) -> Iterator[tuple[str, Series]]:
    """The name and the finite values of the entropy of each run that has any."""
    (panel,) = (panel for panels in SECTIONS.values() for panel in panels if panel.key == "entropy")
    for run in runs:
        metric = _metric(page, panel, run)
        values = None if metric is None else _finite(run, metric)
        if metric is not None and values is not None:
            yield metric, values


def _section(page: Page, panels: Sequence[Panel]) -> list[PageFigure]:
    drawn = []
    drawings: dict[str, tuple[Panel, Figure, dict[str, Curve], str]] = {}
    for panel in panels:
        lines, names, absent = _lines(page, panel)
        if not lines:
            page.missing.append(f"{panel.title}: not logged.")
            continue
        if absent:
            page.missing.append(f"{panel.title}: not logged by {', '.join(absent)}.")
        note = f"Logged as {', '.join(names)}."
        if panel.noisy and page.smooth > 1:
            note += f" Running mean of {page.smooth} logged points."
        drawings[panel.key] = (panel, figures.curves(lines, page.styles, panel.unit), lines, note)
        page.numbers.setdefault("curves", {})[panel.key] = {
            "title": panel.title,
            "unit": panel.unit,
            "metrics": names,
            "smoothed": panel.noisy and page.smooth > 1,
            "groups": {group: curve_numbers(line) for group, line in lines.items()},
        }
    for keys in _COMPARED:
        figures.same_scale([drawings[key][1] for key in keys if key in drawings])
    for key, (panel, drawing, lines, note) in drawings.items():
        findings = [f"{group} {trend(line)}" for group, line in lines.items()]
        drawn.append(page.figure(drawing, key, panel.title, findings, note, numbers_of(lines), lines))
    return drawn


def _lines(page: Page, panel: Panel) -> tuple[dict[str, Curve], list[str], list[str]]:
    """The lines of the groups, the names of the metrics, and the runs that have none."""
    lines: dict[str, Curve] = {}
    names: dict[str, None] = {}
    absent: list[str] = []
    for group, members in page.groups.items():
        series: dict[str, Series] = {}
        for label, run in members.items():
            metric = _metric(page, panel, run)
            values = None if metric is None else _finite(run, metric)
            if metric is None or values is None:
                absent.append(full_name(group, label))
                continue
            names[metric] = None
            series[label] = _smoothed(values, page.smooth) if panel.noisy else values
            page.last.setdefault(panel.key, {})[group, label] = float(series[label].values[-1])
        if series:
            lines[group] = curve(series)
    return lines, list(names), absent


def _metric(page: Page, panel: Panel, run: Run) -> str | None:
    if panel.key in page.chosen:
        metric = page.chosen[panel.key]
        return metric if metric in run.metrics else None
    return _known(panel, run)


def _known(panel: Panel, run: Run) -> str | None:
    if isinstance(panel.metrics, str):
        return run.find(panel.metrics)
    return next((name for name in panel.metrics if name in run.metrics), None)


def _finite(run: Run, metric: str) -> Series | None:
    """The series without infinite values; None if nothing is left."""
    try:
        series = run.series(metric)
    except ValueError:  # NaN only
        return None
    finite = np.isfinite(series.values)
    return Series(series.steps[finite], series.values[finite]) if finite.any() else None


def _smoothed(series: Series, window: int) -> Series:
    """Average the last `window` points at each point, or all of them where there are fewer.

    Each mean is summed from its own points. A difference of cumulative sums would keep the rounding error of a spike
    for the rest of the series.
    """
    count = len(series.values)
    window = min(window, count)
    # Sums from the start of each block of `window` points, and to its end: a window is one of each.
    blocks = np.pad(series.values, (0, -count % window)).reshape(-1, window)
    with np.errstate(over="ignore"):  # values near the largest float add up to infinity, which is not drawn
        from_start = blocks.cumsum(axis=1).ravel()[:count]
        to_end = blocks[:, ::-1].cumsum(axis=1)[:, ::-1].ravel()[:count]
    starts = np.arange(count) - window + 1
    spans_two = (starts > 0) & (starts % window != 0)
    sums = from_start + np.where(spans_two, to_end[np.maximum(starts, 0)], 0.0)
    return Series(series.steps, sums / np.minimum(np.arange(count) + 1, window))


def curve(runs: dict[str, Series]) -> Curve:
    """Mean and range of the runs over the steps that all of them reach, interpolated where their steps differ."""
    first = max(series.steps[0] for series in runs.values())
    last = min(series.steps[-1] for series in runs.values())
    steps = np.unique(np.concatenate([series.steps for series in runs.values()]))
    steps = steps[(steps >= first) & (steps <= last)]
    values = np.array([np.interp(steps, series.steps, series.values) for series in runs.values()])
    return Curve(steps, values.mean(axis=0), values.min(axis=0), values.max(axis=0), runs)


def trend(line: Curve) -> str:
    """What a line does from its start to its end, in words."""
    if len(line.steps) == 0:
        return "has runs without common steps"
    first, last = float(line.mean[0]), float(line.mean[-1])
    if len(line.steps) == 1:
        return f"is {number(first)}"
    if abs(last - first) <= 0.05 * max(abs(first), abs(last)):
        return f"stays near {number(last)}"
    return f"{'rises' if last > first else 'falls'} from {number(first)} to {number(last)}"


def numbers_of(lines: Mapping[str, Curve]) -> tuple[list[str], list[list[str]]]:
    """The lines as a table of a few steps."""
    steps = spread(np.unique(np.concatenate([line.steps for line in lines.values()])).tolist())
    rows = []
    for step in steps:
        cells = []
        for line in lines.values():
            if len(line.steps) == 0 or not line.steps[0] <= step <= line.steps[-1]:
                cells.append(NONE)
                continue
            mean, low, high = (float(np.interp(step, line.steps, values)) for values in line[1:4])
            of_runs = f" ({number(low)} to {number(high)})" if len(line.runs) > 1 else ""
            cells.append(number(mean) + of_runs)
        rows.append([f"{step:,}", *cells])
    return ["step", *lines], rows


def curve_numbers(line: Curve) -> dict[str, Any]:
    runs = {label: {"steps": series.steps, "values": series.values} for label, series in line.runs.items()}
    return {"steps": line.steps, "mean": line.mean, "low": line.low, "high": line.high, "runs": runs}
