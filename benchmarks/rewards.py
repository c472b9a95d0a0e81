"""Completions per second, and mistakes, of `math_reward` and of TRL's `accuracy_reward` on the same labelled cases.

`--cases` are JSON Lines files, by default those of `reward_cases/` under the folder that `ENTROPY_TRL_DATA` names. A
row has a reference (`gold` or `solution`) and either

- a `solution` and a `label` (1 for a right one): model solutions of GSM8K, which end with a line `A: 40`. They are read
  as they are, by the format `answer_line`, and once more with their `model_answer` in a box at the end, which both can
  read;
- a `completion`, a `solution`, an `answer_format`, `expected` (1 for a right one) and a `kind`, by which accepts and
  rejects are reported: `tests/rewards/answers.jsonl`;
- or a `prediction` and `expected`: recorded comparisons of math-verify's own tests. Those with the default settings
  that have a box, or are nothing but an answer, which is then put in a box, are read by the format `boxed`.

Both functions see the same texts in the same order, `--repeats` times, by turns, after one call of each that is not
timed. No cache is as large as the set of cases. What several workers gain depends on free processors.
"""

import argparse
import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trl.rewards import accuracy_reward

from entropy_trl.rewards import MathReward


TARGET = 1.8  # math_reward's completions per second over TRL's, with 2 workers

Case = tuple[str, str, bool, str]  # completion, reference, is right, answer format


def read_cases(path: Path) -> dict[str, list[Case]]:
    """The cases of a file, by the way in which they are given to the functions."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    cases: dict[str, list[Case]] = {}
    for row in rows:
        if "completion" in row:
            case = (row["completion"], row["solution"], bool(row["expected"]), row.get("answer_format") or "any")
            cases.setdefault(row.get("kind", "cases"), []).append(case)
            continue
        if "solution" in row:
            label = bool(row["label"])
            boxed = f"{row['solution']}\n\\boxed{{{row['model_answer']}}}"
            cases.setdefault("answer_line", []).append((row["solution"], row["gold"], label, "answer_line"))
            cases.setdefault("boxed", []).append((boxed, row["gold"], label, "boxed"))
            continue
        config = row.get("config", {})
        if config.get("precision", 6) != 6 or not config.get("strict", True) or config.get("allow_set_relation_comp"):
            continue
        text = row["prediction"]
        if "boxed" not in text and row.get("pred_kind") == "answer_only":
            text = f"\\boxed{{{_without_delimiters(text.strip())}}}"
        if "boxed" in text:
            cases.setdefault("boxed", []).append((text, row["gold"], bool(row["expected"]), "boxed"))
    return {f"{path.stem}/{name}": group for name, group in cases.items()}


def _without_delimiters(text: str) -> str:
    for left, right in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(left) and text.endswith(right) and len(text) > len(left + right):
            return text[len(left) : -len(right)]
    return text


def trl_reward(cases: Sequence[Case]) -> list[float | None]:
    rewards: list[float | None] = accuracy_reward(
        [[{"content": case[0]}] for case in cases], [case[1] for case in cases]
    )
    return rewards


def our_reward(reward: MathReward) -> Callable[[Sequence[Case]], list[float]]:
    return lambda cases: reward(
        [case[0] for case in cases], solution=[case[1] for case in cases], answer_format=[case[3] for case in cases]
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=Path, nargs="+", help="JSON Lines files")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="where to write the report as JSON")
    options = parser.parse_args(argv)
    if options.cases is None:
        if "ENTROPY_TRL_DATA" not in os.environ:
            parser.error("give --cases, or set ENTROPY_TRL_DATA")
        options.cases = sorted((Path(os.environ["ENTROPY_TRL_DATA"]) / "reward_cases").glob("*.jsonl"))
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # TRL's parses time out on some cases, and say so

    groups = {name: group for path in options.cases for name, group in read_cases(path).items()}
    functions: dict[str, Callable[[Sequence[Case]], Sequence[float | None]]] = {"trl": trl_reward}
    for workers in options.workers:
        functions[f"math_reward, {workers} workers"] = our_reward(MathReward(workers))
    results: dict[str, Any] = {}
    for name, cases in groups.items():
        results[name] = {"cases": len(cases), "right": sum(case[2] for case in cases), "functions": {}}
        seconds: dict[str, list[float]] = {function: [] for function in functions}
        rewards: dict[str, Sequence[float | None]] = {}
        for repeat in range(options.repeats + 1):
            for function, call in functions.items():
                start = time.perf_counter()
                rewards[function] = call(cases)
                if repeat:  # the first time starts workers and fills caches
                    seconds[function].append(time.perf_counter() - start)
        for function in functions:
            pairs = [(case[2], bool(reward)) for case, reward in zip(cases, rewards[function], strict=True)]
            results[name]["functions"][function] = {
                "false_positives": pairs.count((False, True)),
                "false_negatives": pairs.count((True, False)),
                "seconds": seconds[function],
            }
    report = {
        "versions": {name: version(name) for name in ("trl", "math-verify", "sympy")}
        | {"python": platform.python_version()},
        "processors": os.cpu_count(),
        "results": results,
        "speedup": {function: _speedup(results, function) for function in functions},
        "target": TARGET,
    }
    _print(report)
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=2))
    return report


def _speedup(results: dict[str, Any], function: str) -> dict[str, float]:
    """TRL's seconds over the function's, by group and for all of them: medians over the repeats of each ratio."""
    ratios: dict[str, list[float]] = {"all": []}
    for name, result in results.items():
        times = result["functions"]
        ratios[name] = [t / own for t, own in zip(times["trl"]["seconds"], times[function]["seconds"], strict=True)]
    totals = {
        key: [sum(times) for times in zip(*(r["functions"][key]["seconds"] for r in results.values()), strict=True)]
        for key in ("trl", function)
    }
    ratios["all"] = [t / own for t, own in zip(totals["trl"], totals[function], strict=True)]
    return {name: statistics.median(values) for name, values in ratios.items()}


def _print(report: dict[str, Any]) -> None:
    print("| cases | function | right answers rejected | wrong ones accepted | completions/s | speed / TRL's |")
    print("|---|---|---|---|---|---|")
    for name, result in report["results"].items():
        for function, row in result["functions"].items():
            rejected = f"{row['false_negatives']} of {result['right']}"
            accepted = f"{row['false_positives']} of {result['cases'] - result['right']}"
            rate = result["cases"] / statistics.median(row["seconds"])
            speedup = report["speedup"][function][name]
            print(f"| {name} | {function} | {rejected} | {accepted} | {rate:.0f} | {speedup:.2f} |")
    for function, speedups in report["speedup"].items():
        print(f"all cases, {function}: {speedups['all']:.2f} times TRL's speed (target, 2 workers: {report['target']})")


if __name__ == "__main__":
    main()
