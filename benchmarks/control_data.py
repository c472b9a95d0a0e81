"""Data of `controls.py`: the results of its runs, differences between methods, and the rule for a preset."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from control_cases import CASES
from scipy.stats import t as student

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
    differences = paired(values, baseline)
    if len(set(differences)) == 1:
        return Difference(differences[0], math.nan)
    error = stdev(differences) / math.sqrt(len(differences))
    return Difference(fmean(differences), float(student.ppf(0.975, len(differences) - 1)) * error)


def paired(values: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """`values` minus `baseline`, pair by pair."""
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
    return [paired(*([result[metric] for result in methods[name]] for name in (method, other))) for methods in cells]


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


def named_cells(report: Mapping[str, Any]) -> dict[str, Methods]:
    """[`by_cell`] by the name that tables and figures call a cell."""
    hot = report["hot_rate"]
    return {
        f"{recipe} recipe, {'hot' if rate == hot else 'tuned'} learning rate ({rate:g})": methods
        for (recipe, rate), methods in by_cell(report).items()
    }


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


def read(folder: Path) -> dict[str, Any]:
    """The data in the folder."""
    return json.loads((folder / "results.json").read_text())
