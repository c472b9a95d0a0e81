"""Tables of `controls.py`, as Markdown."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from control_cases import CASES, Setting
from control_data import (
    MARGINS,
    OPEN_ENTROPY,
    Methods,
    Result,
    from_other_starts,
    has_collapsed,
    mean_difference,
    named_cells,
    paired,
    paired_by_cell,
    presets,
    presets_without_a_seed,
    rivals_ahead,
    tuning_scores,
)
from scipy.stats import spearmanr


#: Metrics of the tables of differences.
COMPARED = ("final_entropy", "greedy", "avg@16", "pass@16")


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


def tables(report: Mapping[str, Any]) -> str:
    """All tables, as Markdown."""
    cells = named_cells(report)
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
        gains = paired(own, other)
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
