"""Figures of `controls.py`. They need matplotlib."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean
from textwrap import wrap
from typing import Any

from control_cases import CASES, GROUPS
from control_data import MARGINS, OPEN_ENTROPY, Methods, from_other_starts, has_collapsed, named_cells


#: A colour for each of the lines of a panel that keep entropy, from the palette of Okabe and Ito.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#777777"
NOTE = {"color": GREY, "ha": "right", "va": "top", "fontsize": 9}
#: Nats a token at the end below which a line is one of many near GRPO's, and grey.
LOW = OPEN_ENTROPY / 4
#: What stands together. A null stands beside the method whose null it is.
FAMILIES = {group: title for group, title in GROUPS.items() if group != "null"}
TITLES = {"final_entropy": "final entropy, nats a token"}
#: Inches. A page shows a figure about as wide as this, so that its text is as large as the page's.
WIDTH = 9.2


def draw(report: Mapping[str, Any], folder: Path) -> None:
    """Draw what the tables cannot show at a glance.

    - `methods.png`: entropy and accuracy of each method, where GRPO collapses.
    - `curves.png`: entropy over training in the last cell where GRPO collapses.
    - `warm_starts.png`: entropy and accuracy of each method from each of the other warm starts.
    """
    for name in ("methods.png", "curves.png", "warm_starts.png"):
        (folder / name).unlink(missing_ok=True)  # of data that are not there any more
    cells = named_cells(report)
    if cells:
        shown = {name: methods for name, methods in cells.items() if has_collapsed(methods)} or cells
        _draw_methods(shown, folder / "methods.png")
        name, methods = list(shown.items())[-1]
        _draw_curves(name, methods, folder / "curves.png")
    from_others = from_other_starts(report)
    if from_others is not None:
        _draw_starts(from_others, report["other_warm_starts"]["warm_starts"], folder / "warm_starts.png")


def _figure(height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _final_entropy(methods: Methods, case: str) -> float:
    return fmean(result["final_entropy"] for result in methods[case])


def _family(case: str) -> str:
    null_of = CASES[case].null_of
    return CASES[null_of or case].group


def _by_family(methods: Methods) -> dict[str, list[str]]:
    """The cases of each family, the one with the highest final entropy first."""
    ranked = sorted(methods, key=lambda case: -_final_entropy(methods, case))
    families = {family: [case for case in ranked if _family(case) == family] for family in FAMILIES}
    return {family: cases for family, cases in families.items() if cases}


def _draw_methods(cells: Mapping[str, Methods], file: Path) -> None:
    """A row a method, sorted within its family: for each cell the mean over seeds, and a line over their range."""
    last = list(cells.values())[-1]
    rows: list[str | None] = []  # None: the line of a family's title
    titles: dict[int, str] = {}
    for family, cases in _by_family(last).items():
        titles[len(rows)] = FAMILIES[family]
        rows += [None, *cases]
    figure = _figure(0.235 * len(rows) + 1.3)
    panels = figure.subplots(1, len(MARGINS), sharey=True)
    for axes, metric in zip(panels, MARGINS, strict=True):
        for i, (colour, (name, methods)) in enumerate(zip(cycle(COLOURS), cells.items(), strict=False)):
            shift = 0.3 * (i - (len(cells) - 1) / 2)
            for row, case in enumerate(rows):
                if case is not None:
                    values = [result[metric] for result in methods[case]]
                    axes.plot([min(values), max(values)], [row + shift] * 2, color=colour, linewidth=1.2, alpha=0.6)
                    axes.plot(fmean(values), row + shift, "o", color=colour, markersize=4.5)
            baseline = fmean(result[metric] for result in methods["grpo"])
            axes.axvline(baseline, color=colour, linestyle=":", linewidth=1)
            axes.plot([], [], "o-", color=colour, label=name)
        _name_rows(axes, metric, ["" if case is None else CASES[case].label for case in rows])
        for row in titles:
            axes.axhspan(row - 0.5, row + 0.5, color="#eeeeee", zorder=0)
    for row, title in titles.items():
        panels[0].text(0.02, row, title, transform=panels[0].get_yaxis_transform(), va="center", weight="bold")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=2,
        frameon=False,
        title="point: mean over seeds, line: their range, dotted: GRPO",
    )
    figure.savefig(file, dpi=130)


def _draw_starts(methods: Methods, starts: Sequence[int], file: Path) -> None:
    """A row a method, sorted by entropy, and in it the number of each warm start."""
    rows = sorted(methods, key=lambda case: -_final_entropy(methods, case))
    figure = _figure(0.36 * len(rows) + 1.1)
    for axes, metric in zip(figure.subplots(1, len(MARGINS), sharey=True), MARGINS, strict=True):
        for row, case in enumerate(rows):
            values = [result[metric] for result in methods[case]]
            axes.plot([min(values), max(values)], [row] * 2, color="#dddddd", linewidth=1, zorder=1)
            axes.plot([fmean(values)] * 2, [row - 0.3, row + 0.3], color="black", linewidth=1.5, zorder=2)
            for colour, start, value in zip(cycle(COLOURS), starts, values, strict=False):
                axes.plot(value, row, marker=f"${start}$", color=colour, markersize=7, zorder=3)
        _name_rows(axes, metric, [CASES[case].label for case in rows])
    figure.suptitle("each digit is the run from that warm start; the bar is their mean", fontsize=10)
    figure.savefig(file, dpi=130)


def _name_rows(axes: Any, metric: str, labels: Sequence[str]) -> None:
    axes.set_yticks([row for row, label in enumerate(labels) if label], [label for label in labels if label])
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(TITLES.get(metric, metric))
    axes.grid(axis="x", alpha=0.3)
    axes.set_ylim(len(labels) - 0.5, -0.5)


def _draw_curves(cell: str, methods: Methods, file: Path) -> None:
    """Entropy over training, a panel a family. Lines that stay above `LOW` have their names at their ends."""
    families = _by_family(methods)
    columns = min(2, len(families))
    lines = -(-len(families) // columns)
    figure = _figure(2.8 * lines + 0.6)
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    # All start at the warm start's entropy, which would set the scale.
    top = 1.1 * max(max(curve[1:] or curve) for curve in (_mean_curve(methods, case) for case in methods))
    for axes, (family, cases) in zip(panels, families.items(), strict=False):
        ends = {case: _mean_curve(methods, case)[-1] for case in cases if case != "grpo"}
        kept = sorted((case for case in ends if ends[case] >= LOW), key=lambda case: -ends[case])
        lost = [case for case in ends if case not in kept]
        for case in lost:
            axes.plot(*_points(methods, case), color=GREY, linewidth=0.9, alpha=0.8)
        axes.plot(*_points(methods, "grpo"), color="black", linestyle=":", linewidth=1.6)
        heights = _apart([ends[case] for case in kept], 0.085 * top)
        for colour, case, height in zip(cycle(COLOURS), kept, heights, strict=False):
            axes.plot(*_points(methods, case), color=colour, linewidth=1.8)
            axes.text(1.02, height, CASES[case].label, color=colour, va="center", fontsize=9.5)
        names = wrap(", ".join(CASES[case].label for case in lost), 40, break_on_hyphens=False)
        axes.text(0.98, 0.97, "\n".join(["grey:", *names] if lost else []), **NOTE, transform=axes.transAxes)
        axes.set_title(FAMILIES[family], fontsize=10, weight="bold", loc="left")
        axes.set_xlim(0, 1.75)
        axes.set_xticks([0, 0.5, 1])
        axes.set_ylim(0, top)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(families) :]:
        axes.set_axis_off()
    for axes in panels[max(len(families) - columns, 0) : len(families)]:
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("share of the training")
    figure.suptitle(f"{cell}; dotted: GRPO, grey: ends below {LOW:.2f}", fontsize=10)
    figure.supylabel("entropy, nats a token, mean over seeds", fontsize=10)
    figure.savefig(file, dpi=130)


def _mean_curve(methods: Methods, case: str) -> list[float]:
    return [fmean(values) for values in zip(*(result["curve"] for result in methods[case]), strict=True)]


def _points(methods: Methods, case: str) -> tuple[list[float], list[float]]:
    mean = _mean_curve(methods, case)
    return [(i + 0.5) / len(mean) for i in range(len(mean))], mean


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """The heights, in descending order, moved down so that neighbours are at least `gap` apart."""
    moved: list[float] = []
    for height in heights:
        moved.append(height if not moved else min(height, moved[-1] - gap))
    return moved
