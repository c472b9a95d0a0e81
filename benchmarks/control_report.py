"""Data, tables and figures of `controls.py`, from the results of its runs.

Tables and figures are made from the data alone, so that they can be made again anywhere:

    python benchmarks/control_report.py docs/controls
"""

import argparse
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from control_cases import CASES, GROUPS, Setting
from scipy.stats import spearmanr
from scipy.stats import t as student

from entropy_trl.files import write_text
from entropy_trl.quickstart import task


Result = Mapping[str, Any]
Methods = Mapping[str, Sequence[Result]]  # the results of each method, by seed in one order
Cell = tuple[str, float]  # recipe and learning rate

#: What an entropy control is to raise together, and the differences in it that count ([`presets`]). One run's sampling
#: error in avg@16 is up to .004.
MARGINS = {"final_entropy": 0.03, "avg@16": 0.01, "pass@16": 0.02}
#: The least share of the pairs in which a method that is ahead is above the other.
MIN_SHARE_ABOVE = 0.8
#: Nats a token of a policy that draws all operators but the last evenly, and is sure of everything else.
OPEN_ENTROPY = (task.N_OPERATORS - 1) * math.log(len(task.OPERATORS)) / task.COMPLETION_LENGTH
#: Metrics of the tables of differences.
COMPARED = ("final_entropy", "greedy", "avg@16", "pass@16")
#: One colour a cell, from the palette of Okabe and Ito.
COLOURS = ("#D55E00", "#0072B2", "#CC79A7", "#009E73", "#E69F00", "#56B4E9")


@dataclass(frozen=True)
class Difference:
    """The mean of differences paired by seed.

    Attributes:
        mean: of the differences.
        half_width: half of its 95% interval, Student's;
            NaN where all differences are equal, which says nothing of others.
    """

    mean: float
    half_width: float


def mean_difference(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """By how much `values` differ from `baseline`, in the order of the seeds."""
    differences = _paired(values, baseline)
    if len(set(differences)) == 1:
        return Difference(differences[0], math.nan)
    error = stdev(differences) / math.sqrt(len(differences))
    return Difference(fmean(differences), float(student.ppf(0.975, len(differences) - 1)) * error)


def _paired(values: Sequence[float], baseline: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(values, baseline, strict=True)]


def tuning_scores(results: Iterable[Result]) -> dict[tuple[str, int], dict[float, float]]:
    """What the settings are tuned for: for each case and setting, by rate, avg@16 and pass@16's mean over the seeds."""
    scores: dict[tuple[str, int], dict[float, list[float]]] = {}
    for result in results:
        by_rate = scores.setdefault((result["case"], result["setting"]), {})
        by_rate.setdefault(result["rate"], []).append((result["avg@16"] + result["pass@16"]) / 2)
    return {key: {rate: fmean(values) for rate, values in by_rate.items()} for key, by_rate in scores.items()}


def by_method(results: Iterable[Result], methods: Sequence[str], seeds: Sequence[int]) -> Methods | None:
    """The results of each method with each seed, in the order of `seeds`; None if one is missing."""
    found = {(result["case"], result["seed"]): result for result in results}
    wanted = {method: [(method, seed) for seed in seeds] for method in methods}
    if not all(key in found for keys in wanted.values() for key in keys):
        return None
    return {method: [found[key] for key in keys] for method, keys in wanted.items()}


def by_cell(report: Mapping[str, Any]) -> dict[Cell, Methods]:
    """The results of each recipe and rate. A cell of which a run is missing is left out."""
    cells: dict[Cell, list[Result]] = {}
    for result in report["results"]:
        cells.setdefault((result["recipe"], result["rate"]), []).append(result)
    found = {cell: by_method(of, list(report["chosen"]), report["seeds"]) for cell, of in cells.items()}
    return {cell: methods for cell, methods in found.items() if methods is not None}


def from_other_starts(report: Mapping[str, Any]) -> Methods | None:
    """The results of each method from the other warm starts, in their order; None while a run is missing."""
    part = report.get("other_warm_starts")
    return by_method(part["results"], list(part["settings"]), part["seeds"]) if part is not None else None


def has_collapsed(methods: Methods) -> bool:
    """Whether GRPO's final entropy, the mean over seeds, is below half of [`OPEN_ENTROPY`]."""
    return fmean(result["final_entropy"] for result in methods["grpo"]) < OPEN_ENTROPY / 2


def paired_by_cell(cells: Iterable[Methods], method: str, other: str, metric: str) -> list[list[float]]:
    """By how much a method differs from another, for each cell by seed."""
    return [_paired(*([result[metric] for result in methods[name]] for name in (method, other))) for methods in cells]


def is_behind(pairs_by_cell: Sequence[Sequence[float]], margin: float) -> bool:
    """Whether differences are below -margin in the mean over the cells, or below twice that in one of them."""
    means = [fmean(of_cell) for of_cell in pairs_by_cell]
    return fmean(means) < -margin or min(means) < -2 * margin


def is_ahead(pairs_by_cell: Sequence[Sequence[float]], margin: float) -> bool:
    """Whether differences exceed the margin in the mean over the cells, and 0 in `MIN_SHARE_ABOVE` of the pairs."""
    pairs = [pair for of_cell in pairs_by_cell for pair in of_cell]
    return fmean(map(fmean, pairs_by_cell)) > margin and sum(pair > 0 for pair in pairs) >= MIN_SHARE_ABOVE * len(pairs)


def rivals_ahead(cells: Sequence[Methods], method: str) -> dict[str, list[str]]:
    """For each metric of `MARGINS` the methods that this one is behind. The nulls are nobody's rivals."""
    others = [name for name in cells[0] if name != method and CASES[name].null_of is None]
    return {
        metric: [other for other in others if is_behind(paired_by_cell(cells, method, other, metric), margin)]
        for metric, margin in MARGINS.items()
    }


def presets(cells: Sequence[Methods]) -> list[str]:
    """Methods that are best on entropy, accuracy and pass@k together.

    Such a one is ahead of GRPO in final entropy and pass@16 where GRPO collapses, and over all cells not behind any
    method, null or GRPO's aside, in any metric of `MARGINS`. A preset is made of a single one alone.
    """
    collapsed = [methods for methods in cells if has_collapsed(methods)]
    return [
        method
        for method in (cells[0] if collapsed else ())
        if CASES[method].null_of is None
        and all(
            is_ahead(paired_by_cell(collapsed, method, "grpo", metric), MARGINS[metric])
            for metric in ("final_entropy", "pass@16")
        )
        and not any(rivals_ahead(cells, method).values())
    ]


def presets_without_a_seed(cells: Sequence[Methods]) -> list[list[str]]:
    """[`presets`] with each of the seeds left out."""
    count = len(cells[0]["grpo"])
    return [
        presets([{method: [*of[:i], *of[i + 1 :]] for method, of in methods.items()} for methods in cells])
        for i in range(count if count > 1 else 0)
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


def _named_cells(report: Mapping[str, Any]) -> dict[str, Methods]:
    hot = report["hot_rate"]
    return {
        f"{recipe} recipe, {'hot' if rate == hot else 'tuned'} learning rate ({rate:g})": methods
        for (recipe, rate), methods in by_cell(report).items()
    }


def tables(report: Mapping[str, Any]) -> str:
    """All tables, as Markdown."""
    cells = _named_cells(report)
    parts = ["# Controls and baselines: tables", "", _head(report)]
    if cells:
        parts += ["", "## Over all cells", "", _summary(cells)]
    for title, methods in cells.items():
        parts += ["", f"## {title[0].upper()}{title[1:]}", "", f"Seeds {_listed(report['seeds'])}. {_fate(methods)}."]
        parts += ["", _means_table(methods, [report["warm_start"]]), "", _from_grpo(methods)]
        parts += ["", _from_parts(methods), "", _correlations(methods)]
    from_others = from_other_starts(report)
    if from_others is not None:
        starts = report["other_warm_starts"]
        settings = (
            f"{CASES[method].label} {describe(setting, report['settings'][method])}"
            for method, setting in starts["settings"].items()
            if method in report["settings"]
        )
        about = (
            f"{starts['rollouts']} rollouts at {starts['rate']:g} from the warm starts "
            f"{_listed(starts['warm_starts'])}, each with one seed ({_listed(starts['seeds'])}), in this order. "
            f"{_fate(from_others)}. Settings: {'; '.join(settings)}. {_versions(starts)}."
        )
        parts += ["", "## Other warm starts", "", about, "", _means_table(from_others, starts["before"])]
        parts += ["", _accuracies(starts["before"], from_others), "", _summary({"other warm starts": from_others})]
        parts += ["", _from_grpo(from_others), "", _from_parts(from_others)]
        parts += ["", _foresight(starts["before"], from_others)]
    parts += ["", "## Tuning", "", _tuning_table(report)]
    return "\n".join(parts) + "\n"


def _versions(part: Mapping[str, Any]) -> str:
    return _listed(f"{name} {version}" for name, version in part["versions"].items())


def _head(report: Mapping[str, Any]) -> str:
    lines = [
        "Written by `benchmarks/controls.py`; [controls.md](../controls.md) says what was done and what it shows. "
        f"Entropies in nats a token, accuracies from 0 to 1, on {report['eval_prompts']:,} held-out prompts with 16 "
        'samples each: final entropy is that of the policy\'s own samples there, "over the run" the mean of what the '
        f"trainer logs. {_versions(report)}.",
        "",
        f"A policy that draws the first two operators evenly and is sure of the rest has an entropy of "
        f"{_digits(OPEN_ENTROPY)} (more where two third operators are right); GRPO is said to collapse below half of "
        "that. What a policy solves that chooses the last operators right, and the others whatever the target is:",
        "",
        _row(["prompts", "the same two first, by the two", "two drawn evenly", "only the first drawn evenly"]),
        _row(["---"] * 4),
    ]
    for part, shares in report["solvable"].items():
        two, one = shares["two operators fixed"], shares["one operator fixed"]
        lines.append(
            _row([part, f"{_digits(min(two))} to {_digits(max(two))}", _digits(fmean(two)), _digits(fmean(one))])
        )
    return "\n".join(lines)


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def _fate(methods: Methods) -> str:
    return "GRPO collapses" if has_collapsed(methods) else "GRPO does not collapse"


def _labelled(before: Sequence[Result], methods: Methods) -> list[tuple[str, Sequence[Result]]]:
    """The results of the warm starts and of each method, by the name of their row."""
    return [("warm start", before), *((CASES[method].label, of) for method, of in methods.items())]


def _foresight(before: Sequence[Result], methods: Methods) -> str:
    """How often the first two operators allow for a right answer, and how often if written for another target."""
    lines = [
        "Answers whose first two operators some third one completes to the target; the same with the two operators "
        "that the policy writes for these digits and another target; and the difference, by seed: foresight.",
        "",
        _row(["method", "own", "for another target", "foresight"]),
        _row(["---"] * 4),
    ]
    for label, of in _labelled(before, methods):
        own, other = ([result[name] for result in of] for name in ("completable", "completable_blind"))
        gains = _paired(own, other)
        by_seed = " ".join(map(_digits, gains))
        lines.append(_row([label, _digits(fmean(own)), _digits(fmean(other)), f"{_digits(fmean(gains))} [{by_seed}]"]))
    return "\n".join(lines)


def _accuracies(before: Sequence[Result], methods: Methods) -> str:
    """The accuracies from each warm start."""
    columns = ("greedy", "avg@16", "pass@16")
    lines = ["By warm start:", "", _row(["method", *columns]), _row(["---"] * (1 + len(columns)))]
    for label, of in _labelled(before, methods):
        lines.append(_row([label, *(" ".join(_digits(result[name]) for result in of) for name in columns)]))
    return "\n".join(lines)


def _correlations(methods: Methods) -> str:
    runs = [result for of in methods.values() for result in of]
    entropies = [run["mean_entropy"] for run in runs]
    found = {name: spearmanr(entropies, [run[name] for run in runs])[0] for name in ("greedy", "avg@16", "pass@16")}
    return (
        f"Spearman's rank correlation of the entropy over the run, over all {len(runs)} runs of all methods: "
        f"{_listed(f'{_digits(float(value))} with {name}' for name, value in found.items())}."
    )


def _summary(cells: Mapping[str, Methods]) -> str:
    """Differences from GRPO over all cells, and which methods are behind which."""
    margins = ", ".join(f"{_digits(margin)} in {metric}" for metric, margin in MARGINS.items())
    names = "; ".join(f"{cell}, {_fate(methods)}" for cell, methods in cells.items())
    every = list(cells.values())
    several = len(every) > 1
    where = f": mean over the cells, in brackets by cell ({names})" if several else ""
    far = " over the cells, or by twice the margin in one cell" if several else ""
    lines = [
        f"Difference from GRPO{where}, and in how many of the pairs with one seed the method is above GRPO. Behind: "
        f"the methods of this table that it is behind by more than the margin{far}, and in what; margins {margins}. "
        "The nulls are left out there.",
        "",
        _row(["method", *MARGINS, "behind"]),
        _row(["---"] * (2 + len(MARGINS))),
    ]
    for method in every[0]:
        row = [CASES[method].label]
        for metric in MARGINS:
            found = paired_by_cell(every, method, "grpo", metric)
            means = [fmean(of_cell) for of_cell in found]
            pairs = [pair for of_cell in found for pair in of_cell]
            per_cell = f" [{' '.join(f'{mean:+.3f}' for mean in means)}]" if several else ""
            above = f"{sum(pair > 0 for pair in pairs)}/{len(pairs)}"
            row.append(f"{fmean(means):+.3f}{per_cell} {above}" if method != "grpo" else "0")
        ahead = {metric: names for metric, names in rivals_ahead(every, method).items() if names}
        row.append("; ".join(f"{len(names)} in {metric}" for metric, names in ahead.items()) or "none")
        lines.append(_row(row))
    best = [CASES[method].label for method in presets(every)]
    without = [[CASES[method].label for method in found] for found in presets_without_a_seed(every)]
    lines += [
        "",
        "Ahead of GRPO in final entropy and pass@16 where it collapses, and behind no method in anything: "
        f"{_listed(best) or 'none'}. With each of the seeds left out: "
        f"{'; '.join(_listed(found) or 'none' for found in without) or 'there is one only'}.",
    ]
    return "\n".join(lines)


_MEANS = ("final_entropy", "mean_entropy", "greedy", "avg@16", "pass@4", "pass@16")


def _means_table(methods: Methods, before: Sequence[Result]) -> str:
    """Means of the methods, after a row with those of the warm starts."""
    head = ["method", "final entropy, by seed", "over the run", *_MEANS[2:], "time / GRPO"]
    lines = [_row(head), _row(["---"] * len(head))]
    seconds = [result["cpu_seconds"] for result in methods["grpo"]]
    start = {name: [result[name] for result in before] for name in _MEANS if name != "mean_entropy"}
    lines.append(_row(["warm start", *(_digits(fmean(start[name])) if name in start else "" for name in _MEANS), ""]))
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
        "Difference from GRPO with the same seed, and Student's 95% interval of this row alone (none where all seeds "
        "have the same difference):"
    )
    return _differences_table(title, "method", pairs, methods)


def _from_parts(methods: Methods) -> str:
    pairs = {
        f"{CASES[method].label} - {CASES[other].label}": (method, other)
        for method in methods
        for other in CASES[method].compared_with
        if other in methods
    }
    title = (
        "The same from as many tokens at random, from another setting, and of a combination from the parts with "
        "settings of their own:"
    )
    return _differences_table(title, "", pairs, methods) if pairs else ""


def _differences_table(title: str, head: str, pairs: Mapping[str, tuple[str, str]], methods: Methods) -> str:
    """A row a pair of methods: how the first differs from the second."""
    columns = [_differences(list(pairs.values()), methods, metric) for metric in COMPARED]
    rows = [_row([label, *cells]) for label, *cells in zip(pairs, *columns, strict=True)]
    return "\n".join([title, "", _row([head, *COMPARED]), _row(["---"] * (1 + len(COMPARED))), *rows])


def _differences(pairs: Sequence[tuple[str, str]], methods: Methods, metric: str) -> list[str]:
    """A column of differences."""
    found = [
        mean_difference([r[metric] for r in methods[method]], [r[metric] for r in methods[other]])
        for method, other in pairs
    ]
    return [
        f"{d.mean:+.3f}"
        + ("" if math.isnan(d.half_width) else f" [{d.mean - d.half_width:+.3f}, {d.mean + d.half_width:+.3f}]")
        for d in found
    ]


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
        settings = report["settings"][method]
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
    """The report as JSON, a line a run, without what follows from case, setting and part, and the tuning's curves."""
    shared = {"arguments", "versions", "rollouts", "eval_prompts"}
    left_out = {"results": shared, "rates": shared | {"curve"}, "tuning": shared | {"curve"}}

    def encoded(key: str, value: Any) -> str:
        if key == "other_warm_starts":
            return data(value).rstrip()
        if key not in left_out:
            return json.dumps(value)
        kept = ({k: v for k, v in result.items() if k not in left_out[key]} for result in value)
        return "[\n" + ",\n".join(json.dumps(_rounded(result)) for result in kept) + "\n]"

    return "{\n" + ",\n".join(f'"{key}": {encoded(key, value)}' for key, value in report.items()) + "\n}\n"


def _rounded(result: Result) -> dict[str, Any]:
    return {k: round(v, 7) if isinstance(v, float) and k != "rate" else v for k, v in result.items()}


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

    cells = _named_cells(report)
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


def read(folder: Path) -> dict[str, Any]:
    """The data in the folder."""
    return json.loads((folder / "results.json").read_text())


def write(report: Mapping[str, Any], folder: Path) -> None:
    """Write `results.json`, and from it `tables.md` and the figures, into the folder."""
    write_text(folder / "results.json", data(report))
    render(folder)


def render(folder: Path) -> None:
    """Make tables and figures from the data in the folder."""
    report = read(folder)
    (folder / "tables.md").write_text(tables(report))
    draw(report, folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with results.json")
    render(parser.parse_args().folder)
