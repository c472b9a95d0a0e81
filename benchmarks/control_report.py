"""Tables, figures and data of `controls.py`, from the results of its runs."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from control_cases import CASES, GROUPS, Setting
from scipy.stats import t as student
from statsmodels.stats.multitest import multipletests


Result = Mapping[str, Any]
Methods = Mapping[str, Sequence[Result]]  # the results of each method, by seed in one order
Cell = tuple[str, float]  # recipe and learning rate

#: What an entropy control is to raise together.
TOGETHER = ("final_entropy", "avg@16", "pass@16")
#: Metrics of the tables of differences.
COMPARED = ("final_entropy", "greedy", "avg@16", "pass@16")
#: One colour a cell, from the palette of Okabe and Ito.
COLOURS = ("#D55E00", "#0072B2", "#CC79A7", "#009E73", "#E69F00", "#56B4E9")


@dataclass(frozen=True)
class Difference:
    """The mean of differences paired by seed.

    Attributes:
        mean: of the differences.
        half: half of its 95% interval, Student's; NaN for one seed.
        p: of the two-sided paired t-test; 1 for one seed.
    """

    mean: float
    half: float
    p: float


def difference(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """By how much `values` differ from `baseline`, in the order of the seeds."""
    differences = [a - b for a, b in zip(values, baseline, strict=True)]
    mean, free = fmean(differences), len(differences) - 1
    if free == 0:
        return Difference(mean, math.nan, 1.0)
    error = stdev(differences) / math.sqrt(len(differences))
    p = 2 * float(student.sf(abs(mean) / error, free)) if error > 0 else float(mean == 0)
    return Difference(mean, float(student.ppf(0.975, free)) * error, p)


def tuning_scores(results: Iterable[Result]) -> dict[tuple[str, int], dict[float, float]]:
    """What the settings are tuned for: for each case and setting, by rate, avg@16 and pass@16's mean over the seeds."""
    scores: dict[tuple[str, int], dict[float, list[float]]] = {}
    for result in results:
        by_rate = scores.setdefault((result["case"], result["setting"]), {})
        by_rate.setdefault(result["rate"], []).append((result["avg@16"] + result["pass@16"]) / 2)
    return {key: {rate: fmean(values) for rate, values in by_rate.items()} for key, by_rate in scores.items()}


def by_cell(report: Mapping[str, Any]) -> dict[Cell, Methods]:
    """The results of each recipe and rate, for each method those of all seeds in one order.

    A cell of which a run is missing is left out.
    """
    cells: dict[Cell, dict[tuple[str, int], Result]] = {}
    for result in report["results"]:
        cells.setdefault((result["recipe"], result["rate"]), {})[result["case"], result["seed"]] = result
    runs = set(product(report["chosen"], report["seeds"]))
    return {
        cell: {method: [found[method, seed] for seed in report["seeds"]] for method in report["chosen"]}
        for cell, found in cells.items()
        if runs <= found.keys()
    }


def undominated(cell: Methods) -> list[str]:
    """Methods of which none other is at least as good on all of `TOGETHER` and better on one, by means over seeds."""
    means = {method: [fmean(result[metric] for result in of) for metric in TOGETHER] for method, of in cell.items()}
    return [
        method
        for method, own in means.items()
        if not any(other != own and all(b >= a for a, b in zip(own, other, strict=True)) for other in means.values())
    ]


def describe(setting: Setting, others: Sequence[Setting]) -> str:
    """The values of a setting that differ among those that it was chosen from."""
    flat = [dict(_flatten(other)) for other in others]
    keys = dict.fromkeys(key for other in flat for key in other)
    varying = [key for key in keys if len({json.dumps(other.get(key)) for other in flat}) > 1]
    own = dict(_flatten(setting))
    return ", ".join(f"{key} {_plain(own[key])}" for key in varying if key in own) or "defaults"


def _flatten(values: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value)
        elif value is not None:  # as TRL's `epsilon` beside that of a control
            yield key, value


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _digits(value: float) -> str:
    """Three digits after the point, without the zero before it."""
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.3f}"


def _cell_name(cell: Cell, hot: float) -> str:
    recipe, rate = cell
    return f"{recipe} recipe, {'hot' if rate == hot else 'tuned'} learning rate ({rate:g})"


def tables(report: Mapping[str, Any]) -> str:
    """All tables, as Markdown."""
    parts = ["# Controls and baselines: tables", "", _head(report)]
    for cell, methods in by_cell(report).items():
        title = _cell_name(cell, report["hot_rate"])
        parts += ["", f"## {title[0].upper()}{title[1:]}", "", _seeds(methods), "", _means_table(methods)]
        parts += ["", _from_grpo(methods), "", _from_parts(methods), "", _front(methods)]
    parts += ["", "## Tuning", "", _tuning_table(report)]
    return "\n".join(parts) + "\n"


def _head(report: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return (
        "Written by `benchmarks/controls.py`; [controls.md](../controls.md) says what was done and what it shows. "
        f"Entropies in nats a token, accuracies from 0 to 1, on {report['eval_prompts']:,} held-out prompts with 16 "
        f"samples each; all runs start from one warm start. {versions}."
    )


def _seeds(methods: Methods) -> str:
    return f"Seeds {', '.join(str(result['seed']) for result in methods['grpo'])}."


_MEANS = ("final_entropy", "mean_entropy", "greedy", "avg@16", "pass@4", "pass@16")


def _means_table(methods: Methods) -> str:
    head = ["method", "final entropy, by seed", "over the run", *_MEANS[2:], "time / GRPO"]
    lines = [_row(head), _row(["---"] * len(head))]
    seconds = [result["cpu_seconds"] for result in methods["grpo"]]
    for method, results in methods.items():
        values = {name: [result[name] for result in results] for name in (*_MEANS, "cpu_seconds")}
        cells = [CASES[method].label, *(_digits(fmean(values[name])) for name in _MEANS)]
        cells[1] += f" [{' '.join(map(_digits, values['final_entropy']))}]"
        cells.append(f"{fmean(a / b for a, b in zip(values['cpu_seconds'], seconds, strict=True)):.2f}")
        lines.append(_row(cells))
    return "\n".join(lines)


def _from_grpo(methods: Methods) -> str:
    pairs = {CASES[method].label: (method, "grpo") for method in methods if method != "grpo"}
    title = (
        "Difference from GRPO with the same seed, 95% interval; bold where Holm's procedure over the column rejects "
        "that there is none, at 5%."
    )
    return _differences_table(title, "method", pairs, methods)


def _from_parts(methods: Methods) -> str:
    pairs = {
        f"{CASES[method].label} - {CASES[other].label}": (method, other)
        for method in methods
        for other in CASES[method].compared_with
        if other in methods
    }
    title = "Difference from the same number of tokens at random, and of a combination from its parts:"
    return _differences_table(title, "", pairs, methods) if pairs else ""


def _differences_table(title: str, head: str, pairs: Mapping[str, tuple[str, str]], methods: Methods) -> str:
    """A row a pair of methods: how the first differs from the second."""
    columns = [_differences(list(pairs.values()), methods, metric) for metric in COMPARED]
    rows = [_row([label, *cells]) for label, *cells in zip(pairs, *columns, strict=True)]
    return "\n".join([title, "", _row([head, *COMPARED]), _row(["---"] * (1 + len(COMPARED))), *rows])


def _differences(pairs: Sequence[tuple[str, str]], methods: Methods, metric: str) -> list[str]:
    """A column of differences."""
    found = [
        difference([r[metric] for r in methods[method]], [r[metric] for r in methods[other]]) for method, other in pairs
    ]
    cells = [f"{d.mean:+.3f} [{d.mean - d.half:+.3f}, {d.mean + d.half:+.3f}]" for d in found]
    rejected, *_ = multipletests([d.p for d in found], 0.05, method="holm")
    return [f"**{cell}**" if is_rejected else cell for cell, is_rejected in zip(cells, rejected, strict=True)]


def _front(methods: Methods) -> str:
    names = ", ".join(CASES[method].label for method in undominated(methods))
    return f"No other method is at least as good, by these means, in {', '.join(TOGETHER)} together: {names}."


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _tuning_table(report: Mapping[str, Any]) -> str:
    rates = ", ".join(
        f"{_digits(r['avg@16'])} at {r['rate']:g}" for r in sorted(report["rates"], key=lambda r: r["rate"])
    )
    scores = tuning_scores(report["tuning"])
    lines = [
        f"GRPO's avg@16 by learning rate: {rates}.",
        "",
        f"The score, the mean of avg@16 and pass@16, at {report['hot_rate']:g} (mean of two seeds) and at "
        f"{report['tuned_rate']:g}; in bold the setting with the best mean of the two.",
        "",
        _row(["method", *(f"setting {i + 1}" for i in range(4))]),
        _row(["---"] * 5),
    ]
    for method, chosen in report["chosen"].items():
        settings = CASES[method].settings
        cells = [CASES[method].label]
        for index, setting in enumerate(settings):
            by_rate = scores.get((method, index))
            if by_rate is not None:  # a null is not tuned
                values = " ".join(_digits(by_rate[rate]) for rate in sorted(by_rate, reverse=True))
                text = f"{describe(setting, settings)}: {values}"
                cells.append(f"**{text}**" if index == chosen else text)
        if len(cells) > 1:
            lines.append(_row(cells))
    return "\n".join(lines)


def data(report: Mapping[str, Any]) -> str:
    """The results as JSON, a line a run; the arguments of a method's settings once."""
    left_out = ("arguments", "versions", "rollouts", "eval_prompts")

    def rows(results: Iterable[Result], *more: str) -> str:
        kept = ({k: v for k, v in result.items() if k not in (*left_out, *more)} for result in results)
        return "[\n" + ",\n".join(json.dumps(_rounded(result)) for result in kept) + "\n]"

    fixed = {key: value for key, value in report.items() if key not in ("rates", "tuning", "results")}
    fixed["settings"] = {case: CASES[case].settings for case in report["chosen"]}
    parts = [f'"{key}": {json.dumps(value)}' for key, value in fixed.items()]
    parts += [f'"{key}": {rows(report[key], "curve")}' for key in ("rates", "tuning")]
    parts.append(f'"results": {rows(report["results"])}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _rounded(result: Result) -> dict[str, Any]:
    return {k: round(v, 5) if isinstance(v, float) and k != "rate" else v for k, v in result.items()}


def draw(report: Mapping[str, Any], folder: Path) -> None:
    """`methods.png`: entropy and accuracy of each method. `curves.png`: entropy over training."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = by_cell(report)
    if not cells:
        return
    figure = Figure(figsize=(11, 0.28 * len(report["chosen"]) + 1.6), layout="constrained")
    FigureCanvasAgg(figure)
    _draw_methods(figure, cells, list(report["chosen"]), report["hot_rate"])
    figure.savefig(folder / "methods.png", dpi=100)

    figure = Figure(figsize=(16, 3.2 * len(cells)), layout="constrained")
    FigureCanvasAgg(figure)
    _draw_curves(figure, cells, report["hot_rate"])
    figure.savefig(folder / "curves.png", dpi=80)


def _draw_methods(figure: Any, cells: Mapping[Cell, Any], methods: Sequence[str], hot: float) -> None:
    for axes, metric in zip(figure.subplots(1, len(TOGETHER), sharey=True), TOGETHER, strict=True):
        for shift, (colour, (cell, cases)) in enumerate(zip(COLOURS, cells.items(), strict=False)):
            for row, method in enumerate(methods):
                values = [result[metric] for result in cases[method]]
                y = row + 0.18 * (shift - (len(cells) - 1) / 2)
                axes.plot([min(values), max(values)], [y, y], color=colour, linewidth=1.2)
                label = _cell_name(cell, hot) if row == 0 else None
                axes.plot([fmean(values)], [y], "o", color=colour, markersize=3.5, label=label)
        axes.set_yticks(range(len(methods)), [CASES[method].label for method in methods], fontsize=8)
        axes.set_xlabel({"final_entropy": "final entropy, nats a token"}.get(metric, metric))
        axes.grid(alpha=0.3)
        axes.set_ylim(len(methods) - 0.5, -0.5)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=8, frameon=False)


def _draw_curves(figure: Any, cells: Mapping[Cell, Any], hot: float) -> None:
    panels = figure.subplots(len(cells), len(GROUPS), sharex=True, sharey=True, squeeze=False)
    for row, (cell, cases) in zip(panels, cells.items(), strict=True):
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
        row[0].set_ylabel(_cell_name(cell, hot).replace(", ", ",\n"), fontsize=7)
    figure.supxlabel("share of the training", fontsize=9)
    figure.suptitle("entropy, nats a token, mean over seeds", fontsize=9)


def write(report: Mapping[str, Any], folder: Path) -> None:
    """Write `tables.md`, `results.json`, `methods.png` and `curves.png` into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tables.md").write_text(tables(report))
    (folder / "results.json").write_text(data(report))
    draw(report, folder)
