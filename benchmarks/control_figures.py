"""Figures of `controls.py`. They need matplotlib."""

from collections.abc import Callable, Mapping
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import Any

from control_cases import CASES, GROUPS
from control_data import MARGINS, Methods, from_other_starts, named_cells


#: One colour a cell, from the palette of Okabe and Ito.
COLOURS = ("#D55E00", "#0072B2", "#CC79A7", "#009E73", "#E69F00", "#56B4E9")


def draw(report: Mapping[str, Any], folder: Path) -> None:
    """`methods.png`, `warm_starts.png`: entropy and accuracy of each method. `curves.png`: entropy over training."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    for name in ("methods.png", "curves.png", "warm_starts.png"):
        (folder / name).unlink(missing_ok=True)  # of data that are not there any more

    def save(name: str, size: tuple[float, float], dots: int, paint: Callable[..., None], cells: Any) -> None:
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        paint(figure, cells)
        figure.savefig(folder / name, dpi=dots)

    cells = named_cells(report)
    if cells:
        save("methods.png", (11, 0.28 * len(report["chosen"]) + 1.6), 100, _draw_methods, cells)
        save("curves.png", (16, 3.2 * len(cells)), 80, _draw_curves, cells)
    from_others = from_other_starts(report)
    if from_others is not None:
        starts = report["other_warm_starts"]["warm_starts"]
        single = {
            f"warm start {start}": {method: [of[i]] for method, of in from_others.items()}
            for i, start in enumerate(starts)
        }
        save("warm_starts.png", (11, 0.28 * len(from_others) + 1.6), 100, _draw_methods, single)


def _draw_methods(figure: Any, cells: Mapping[str, Methods]) -> None:
    methods = list(next(iter(cells.values())))
    for axes, metric in zip(figure.subplots(1, len(MARGINS), sharey=True), MARGINS, strict=True):
        for shift, (colour, (name, cases)) in enumerate(zip(cycle(COLOURS), cells.items(), strict=False)):
            for row, method in enumerate(methods):
                values = [result[metric] for result in cases[method]]
                y = row + 0.18 * (shift - (len(cells) - 1) / 2)
                axes.plot(values, [y] * len(values), ".", color=colour, markersize=5, label=None if row else name)
        axes.set_yticks(range(len(methods)), [CASES[method].label for method in methods], fontsize=8)
        axes.set_xlabel({"final_entropy": "final entropy, nats a token"}.get(metric, metric))
        axes.grid(alpha=0.3)
        axes.set_ylim(len(methods) - 0.5, -0.5)
    handles, labels = axes.get_legend_handles_labels()
    columns = 2 if len(cells) <= 4 else len(cells)
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, fontsize=8, frameon=False)


def _draw_curves(figure: Any, cells: Mapping[str, Methods]) -> None:
    panels = figure.subplots(len(cells), len(GROUPS), sharex=True, sharey=True, squeeze=False)
    for row, (name, cases) in zip(panels, cells.items(), strict=True):
        for axes, (group, title) in zip(row, GROUPS.items(), strict=True):
            of_group = [case for case in cases if CASES[case].group == group and case != "grpo"]
            for case in ["grpo", *of_group]:
                mean = [fmean(values) for values in zip(*(r["curve"] for r in cases[case]), strict=True)]
                progress = [(i + 0.5) / len(mean) for i in range(len(mean))]
                style: dict[str, Any] = {"color": "black", "linestyle": ":"} if case == "grpo" else {}
                axes.plot(progress, mean, linewidth=1, label=CASES[case].label, **style)
            axes.set_title(title if axes in panels[0] else "", fontsize=9)
            axes.legend(fontsize=6.5, frameon=False, loc="upper right")
            axes.grid(alpha=0.3)
            axes.set_ylim(bottom=0)
        row[0].set_ylabel(name.replace(", ", ",\n"), fontsize=7)
    figure.supxlabel("share of the training", fontsize=9)
    figure.suptitle("entropy, nats a token, mean over seeds", fontsize=9)
