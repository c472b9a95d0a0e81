"""Tables of `smollm2.py`, from the runs in a folder alone: `python benchmarks/smollm2_tables.py docs/smollm2`."""

import argparse
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from control_data import mean_difference
from smollm2_cases import CASES, SEEDS, TUNING_SEED

from entropy_trl.evaluation.metrics import bootstrap_means, interval, pass_at_k
from entropy_trl.files import write_text


Result = dict[str, Any]

METRICS = ("entropy", "greedy", "avg@16", "pass@16", "majority@16", "distinct_right")

#: The score of each problem, where a metric is their mean.
BY_PROBLEM: dict[str, Callable[[Result], list[float]]] = {
    "greedy": lambda run: run["greedy_right"],
    "avg@16": lambda run: [count / run["samples"] for count in run["right"]],
    "pass@16": lambda run: [pass_at_k(run["samples"], count, 16) for count in run["right"]],
    "majority@16": lambda run: run["majority"],
    "distinct_right": lambda run: run["distinct_right"],
}


def read(folder: Path) -> list[Result]:
    """The runs in the folder."""
    return [json.loads(path.read_text()) for path in sorted((folder / "runs").glob("*.json"))]


def one_line(result: Result) -> str:
    return " ".join(f"{name} {result['metrics'][name]:.3f}" for name in METRICS)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def settings_of(result: Result) -> str:
    """What tells a setting from the others of its case."""
    flat = [{**s, **s.get("entropy_control_kwargs", {})} for s in CASES[result["case"]].settings]
    own = flat[result["setting"]]
    varying = [key for key in own if key != "entropy_control_kwargs" and len({repr(s.get(key)) for s in flat}) > 1]
    return ", ".join(f"{key} {own[key]:g}" for key in varying) or "-"


def _cells(result: Result) -> list[str]:
    trajectory = [f"{result['trajectory_entropy']:.3f}"] if "trajectory_entropy" in result else ["-"]
    return trajectory + [f"{result['metrics'][name]:.3f}" for name in METRICS]


def _means(results: Sequence[Result]) -> list[str]:
    trajectory = fmean(result["trajectory_entropy"] for result in results)
    return [f"{v:.3f}" for v in (trajectory, *(fmean(r["metrics"][name] for r in results) for name in METRICS))]


def difference(ours: Sequence[Result], theirs: Sequence[Result], metric: str) -> str:
    """The mean difference over the seeds that both have, with its 95% interval over seeds, and over problems."""
    pairs = [(a, b) for a in ours for b in theirs if a["seed"] == b["seed"]]
    values = [[result["metrics"][metric] for result in side] for side in zip(*pairs, strict=True)]
    if len(pairs) < 2:
        return f"{values[0][0] - values[1][0]:+.3f}"
    over_seeds = mean_difference(*values)
    text = f"{over_seeds.mean:+.3f}"
    if not math.isnan(over_seeds.half_width):
        text += f" ± {over_seeds.half_width:.3f}"
    if metric in BY_PROBLEM:
        score = BY_PROBLEM[metric]
        by_seed = [[x - y for x, y in zip(score(a), score(b), strict=True)] for a, b in pairs]
        low, high = interval(bootstrap_means([fmean(of) for of in zip(*by_seed, strict=True)], metric))
        text += f" [{low:+.3f}, {high:+.3f}]"
    return text


def tables(runs: Sequence[Result]) -> str:
    """All tables, as Markdown."""
    head = ["trajectory entropy", "final entropy", *METRICS[1:-1], "distinct right answers"]
    parts = ["# Tables: SmolLM2-135M, countdown in words", "`benchmarks/smollm2_tables.py` writes this page."]
    warm = [run for run in runs if run["case"] == "warm_start"]
    if warm:
        parts += ["## The warm start", table(["problems", *head], ([run["problems"], *_cells(run)] for run in warm))]
    trained = [run for run in runs if run["case"] != "warm_start"]
    tuning = [run for run in trained if run["seed"] == TUNING_SEED]
    rates = sorted((run for run in tuning if run["case"] == "grpo"), key=lambda run: run["rate"])
    if rates:
        rows = ([f"{run['rate']:g}", *_cells(run)] for run in rates)
        parts += ["## GRPO's learning rate, on the problems for tuning", table(["learning rate", *head], rows)]
    others = [run for name in CASES for run in tuning if run["case"] == name != "grpo"]
    if others:
        rows = ([run["method"], settings_of(run), *_cells(run)] for run in others)
        parts += ["## Settings, on the problems for tuning", table(["method", "setting", *head], rows)]
    compared = {name: [r for r in trained if r["case"] == name and r["seed"] in SEEDS] for name in CASES}
    compared = {name: of for name, of in compared.items() if of}
    if compared:
        rows = ([CASES[name].label, str(len(of)), settings_of(of[0]), *_means(of)] for name, of in compared.items())
        parts += ["## The comparison, on the problems for testing", "Means over seeds."]
        parts.append(table(["method", "seeds", "setting", *head], rows))
    for other in ("grpo", "kl_reference", "kl_random", "clip_random"):
        against = {
            name: of
            for name, of in compared.items()
            if other in compared and name != other and CASES[other].null_of in (None, name)
            and {run["seed"] for run in of} & {run["seed"] for run in compared[other]}
        }  # fmt: skip
        if against:
            rows = (
                [CASES[name].label, *(difference(of, compared[other], metric) for metric in METRICS)]
                for name, of in against.items()
            )
            parts += [
                f"## Differences from {CASES[other].label}",
                "Mean over the seeds that both have ± half of its 95% interval over seeds (Student's) [95% interval "
                "over problems (bootstrap)].",
                table(["method", *head[1:]], rows),
            ]
    return "\n\n".join(parts) + "\n"


def render(folder: Path) -> None:
    """Write `tables.md` from the runs in the folder."""
    write_text(folder / "tables.md", tables(read(folder)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="with the folder `runs`")
    render(parser.parse_args().folder)
