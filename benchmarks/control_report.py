"""Tables, figures and data of `controls.py`, from the results of its runs."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from control_cases import CASES, GROUPS, Setting
from scipy.stats import t as student


Result = Mapping[str, Any]
Cell = tuple[str, float]  # recipe and learning rate

#: What an entropy control is to raise together.
TOGETHER = ("final_entropy", "avg@16", "pass@16")
#: One colour a cell, from the palette of Okabe and Ito.
COLOURS = ("#D55E00", "#0072B2", "#CC79A7", "#009E73", "#E69F00", "#56B4E9")


def difference(values: Sequence[float], baseline: Sequence[float]) -> tuple[float, float]:
    """Mean of the differences, paired by seed, and half of its 95% interval (Student's; NaN for one seed)."""
    differences = [a - b for a, b in zip(values, baseline, strict=True)]
    if len(differences) < 2:
        return fmean(differences), math.nan
    half = float(student.ppf(0.975, len(differences) - 1)) * stdev(differences) / math.sqrt(len(differences))
    return fmean(differences), half


def by_cell(results: Iterable[Result]) -> dict[Cell, dict[str, dict[int, Result]]]:
    """The results by recipe and rate, method and seed."""
    cells: dict[Cell, dict[str, dict[int, Result]]] = {}
    for result in results:
        cell = cells.setdefault((result["recipe"], result["rate"]), {})
        cell.setdefault(result["case"], {})[result["seed"]] = result
    return cells


def undominated(cell: Mapping[str, Mapping[int, Result]]) -> list[str]:
    """Methods of which none other is at least as good on all of `TOGETHER` and better on one, by means over seeds."""
    means = {
        case: [fmean(result[metric] for result in by_seed.values()) for metric in TOGETHER]
        for case, by_seed in cell.items()
    }
    return [
        case
        for case, own in means.items()
        if not any(other != own and all(b >= a for a, b in zip(own, other, strict=True)) for other in means.values())
    ]


def describe(setting: Setting, others: Sequence[Setting]) -> str:
    """The values of a setting that differ among those that it was chosen from."""
    flat = [dict(_flatten(other)) for other in others]
    keys = dict.fromkeys(key for other in flat for key in other)
    varying = [key for key in keys if len({json.dumps(other.get(key)) for other in flat}) > 1]
    own = dict(_flatten(setting))
    return ", ".join(f"{key} {_plain(own[key])}" for key in varying if key in own) or "published"


def _flatten(values: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value)
        else:
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
    for cell, cases in by_cell(report["results"]).items():
        parts += [
            "",
            f"## {_cell_name(cell, report['hot_rate']).capitalize()}",
            "",
            _cell_table(cases, report["chosen"]),
        ]
    parts += ["", "## Tuning", "", _tuning_table(report)]
    return "\n".join(parts) + "\n"


def _head(report: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return (
        "Written by `benchmarks/controls.py`; [controls.md](../controls.md) says what the columns are and what they "
        f"show. Versions: {versions}."
    )


def _cell_table(cases: Mapping[str, Mapping[int, Result]], chosen: Mapping[str, int]) -> str:
    front = undominated(cases)
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in cases.values())))
    head = ["method", "setting", "final entropy", "mean entropy", "greedy", "avg@16", "pass@4", "pass@16"]
    head += ["avg@16 to GRPO", "pass@16 to GRPO", "time"]
    lines = [f"Seeds {', '.join(map(str, seeds))}.", "", _row(head), _row(["---"] * len(head))]
    for case, by_seed in cases.items():
        values = {name: [by_seed[seed][name] for seed in seeds] for name in (*_MEANS, "cpu_seconds")}
        grpo = {name: [cases["grpo"][seed][name] for seed in seeds] for name in values}
        label = CASES[case].label
        cells = [f"**{label}**" if case in front else label]
        cells.append(describe(CASES[case].settings[chosen[case]], CASES[case].settings))
        for name in _MEANS:
            spread = f" [{' '.join(map(_digits, values[name]))}]" if name == "final_entropy" else ""
            cells.append(_digits(fmean(values[name])) + spread)
        for name in ("avg@16", "pass@16"):
            cells.append("" if case == "grpo" else _interval(*difference(values[name], grpo[name])))
        ratios = [a / b for a, b in zip(values["cpu_seconds"], grpo["cpu_seconds"], strict=True)]
        cells.append(f"{fmean(ratios):.2f}")
        lines.append(_row(cells))
    return "\n".join(lines)


_MEANS = ("final_entropy", "mean_entropy", "greedy", "avg@16", "pass@4", "pass@16")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _interval(mean: float, half: float) -> str:
    text = f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"
    return f"**{text}**" if abs(mean) > half else text


def _tuning_table(report: Mapping[str, Any]) -> str:
    rates = ", ".join(
        f"{_digits(result['avg@16'])} at {result['rate']:g}"
        for result in sorted(report["rates"], key=lambda r: r["rate"])
    )
    lines = [
        f"GRPO's avg@16 by learning rate: {rates}.",
        "",
        "The score (mean of avg@16 and pass@16) at the hot and at the tuned rate; in bold the setting that was chosen.",
        "",
        _row(["method", *(f"setting {i + 1}" for i in range(4))]),
        _row(["---"] * 5),
    ]
    scores: dict[tuple[str, int], list[float]] = {}
    for result in sorted(report["tuning"], key=lambda r: -r["rate"]):
        scores.setdefault((result["case"], result["setting"]), []).append((result["avg@16"] + result["pass@16"]) / 2)
    for case, chosen in report["chosen"].items():
        settings = CASES[case].settings
        cells = [CASES[case].label]
        for index, setting in enumerate(settings):
            text = f"{describe(setting, settings)}: {' '.join(map(_digits, scores[case, index]))}"
            cells.append(f"**{text}**" if index == chosen else text)
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

    cells = by_cell(report["results"])
    figure = Figure(figsize=(11, 0.28 * len(report["chosen"]) + 1.6), layout="constrained")
    FigureCanvasAgg(figure)
    _draw_methods(figure, cells, list(report["chosen"]), report["hot_rate"])
    figure.savefig(folder / "methods.png", dpi=100)

    figure = Figure(figsize=(11, 2.6 * len(cells)), layout="constrained")
    FigureCanvasAgg(figure)
    _draw_curves(figure, cells, report["hot_rate"])
    figure.savefig(folder / "curves.png", dpi=80)


def _draw_methods(figure: Any, cells: Mapping[Cell, Any], methods: Sequence[str], hot: float) -> None:
    names = ("final_entropy", "avg@16", "pass@16")
    for axes, metric in zip(figure.subplots(1, len(names), sharey=True), names, strict=True):
        for shift, (colour, (cell, cases)) in enumerate(zip(COLOURS, cells.items(), strict=False)):
            for row, method in enumerate(methods):
                values = [result[metric] for result in cases.get(method, {}).values()]
                if values:
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
                mean = [fmean(values) for values in zip(*(r["curve"] for r in cases[case].values()), strict=True)]
                progress = [(i + 0.5) / len(mean) for i in range(len(mean))]
                style: dict[str, Any] = {"color": "#999999"} if case == "grpo" else {}
                axes.plot(progress, mean, linewidth=1, label=CASES[case].label, **style)
            axes.set_title(title if axes in panels[0] else "", fontsize=8)
            axes.legend(fontsize=5, frameon=False)
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
