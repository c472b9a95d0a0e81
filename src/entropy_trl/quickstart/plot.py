"""The picture of the quickstart: entropy, reward and pass@16 over updates. Needs matplotlib (the `plot` extra)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from entropy_trl.analysis.figures import STYLES
from entropy_trl.files import replacing
from entropy_trl.quickstart.recipe import LABELS


Log = Sequence[Mapping[str, Any]]

# (key in the training log, title of the panel, label of its axis, points in the running mean)
PANELS = (
    ("entropy", "Policy entropy", "nats a token", 1),
    ("reward", "Training reward (mean of 5 rollouts)", "share of right answers", 5),
    ("held_out/pass@16", "Held-out pass@16", "share of prompts", 1),
)


def draw(logs: Mapping[str, Sequence[Log]], path: Path) -> None:
    """Draw three panels with one colour a method: a thin line a seed, a thick one for their mean.

    Args:
        logs (`Mapping[str, Sequence[Log]]`): For each method its training logs, one a seed: lists of entries with
            `step` and the metrics.
        path (`Path`): Where the PNG goes.
    """
    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (key, title, label, window) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for method, runs in logs.items():
            _draw_method(axes, method, [_series(log, key, window) for log in runs])
        axes.set_title(title)
        axes.set_xlabel("updates")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(logs))
    with replacing(path) as part:
        figure.savefig(part, dpi=150, format="png")


def _draw_method(axes: Axes, method: str, runs: Sequence[dict[int, float]]) -> None:
    colour, style, _ = STYLES[method]
    if len(runs) > 1:
        for run in runs:
            axes.plot(list(run), list(run.values()), color=colour, linestyle=style, linewidth=0.6, alpha=0.5)
    # every seed logs at the same steps
    means = {step: fmean(run[step] for run in runs) for step in runs[0]}
    axes.plot(list(means), list(means.values()), color=colour, linestyle=style, linewidth=2, label=LABELS[method])


def _series(log: Log, key: str, window: int) -> dict[int, float]:
    """Step to value of `key`, as the mean of the last `window` logged values."""
    points = [(entry["step"], entry[key]) for entry in log if key in entry]
    return {
        step: fmean(value for _, value in points[max(0, i + 1 - window) : i + 1]) for i, (step, _) in enumerate(points)
    }
