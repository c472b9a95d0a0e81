"""Results as tables like the paper's, alone and beside the published ones."""

import json
import logging
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from entropy_trl.analysis.tables import markdown_table
from entropy_trl.evaluation.benchmarks import BENCHMARKS
from entropy_trl.evaluation.metrics import bootstrap_means, interval
from entropy_trl.evaluation.run import read_completions, read_mapping


Results = dict[str, Any]

RESULTS = "results.json"

logger = logging.getLogger(__name__)


def published() -> dict[str, Any]:
    """The published table: `columns`, `rows` (scores in percent) and `source`."""
    table: dict[str, Any] = json.loads((files("entropy_trl") / "evaluation" / "published.json").read_text())
    return table


def average(results: Results, folder: Path) -> dict[str, Any] | None:
    """The plain mean of the accuracies on the paper's seven benchmarks, with its interval.

    None if one of them is missing, or if its completions are, which the interval is made of.
    """
    columns = published()["columns"]
    benchmarks = results["benchmarks"]
    if not set(columns) <= set(benchmarks):
        return None
    means = []
    for name in columns:
        scores: dict[int, list[bool]] = {}
        try:
            records = read_completions(folder / "completions" / f"{name}.jsonl")
        except (ValueError, OSError) as error:
            logger.warning("The mean of the seven benchmarks is left out: %s", error)
            return None
        for record in records:
            scores.setdefault(record["problem"], []).append(record["correct"])
        means.append(bootstrap_means([sum(right) / len(right) for right in scores.values()], name))
    accuracy = sum(benchmarks[name]["accuracy"] for name in columns) / len(columns)
    return {"accuracy": accuracy, "ci95": interval(np.mean(means, axis=0))}


def load_results(run: str) -> list[Results]:
    """The results in a folder: those of one model, or of several in its folders.

    Raises:
        FileNotFoundError: There are none.
        ValueError: One of them is damaged.
    """
    path = Path(run).expanduser()
    found = [path / RESULTS] if (path / RESULTS).exists() else sorted(path.glob(f"*/{RESULTS}"))
    if not found:
        raise FileNotFoundError(f"{run!r} has no {RESULTS} of an evaluation, nor has a folder in it.")
    return [read_results(file) for file in found]


def read_results(file: Path) -> Results:
    """The results of one model, checked to be what the tables need.

    Raises:
        ValueError: The file is damaged.
    """
    results = read_mapping(file)
    benchmarks = results.get("benchmarks")
    named = isinstance(results.get("name"), str) and "average" in results
    if named and isinstance(benchmarks, dict) and all(map(_is_score, benchmarks.values())):
        mean = results["average"]
        if mean is None or (isinstance(mean, dict) and _is_share(mean.get("accuracy")) and _is_interval(mean)):
            return results
    raise ValueError(f"{file} is damaged: it does not hold the scores of an evaluation. Delete it, or restore it.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**53


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _is_interval(scores: Mapping[str, Any]) -> bool:
    ends = scores.get("ci95")
    return isinstance(ends, list) and len(ends) == 2 and all(map(_is_share, ends))


def _is_score(scores: object) -> bool:
    if not isinstance(scores, dict) or not _is_interval(scores):
        return False
    shares = [value for key, value in scores.items() if key.startswith(("pass@", "majority@"))]
    return (
        all(map(_is_share, [scores.get("accuracy"), scores.get("truncated"), *shares]))
        and all(_is_number(scores.get(key)) for key in ("problems", "samples", "mean_length"))
        and "entropy" in scores
        and (scores["entropy"] is None or _is_number(scores["entropy"]))
    )


def scores_table(runs: Sequence[Results], compare: bool = False) -> str:
    """Accuracy in percent, one row a model, as Markdown; with `compare`, below the published rows."""
    paper = published()
    given = {name for run in runs for name in run["benchmarks"]}
    columns = [name for name in BENCHMARKS if name in given or (compare and name in paper["columns"])]
    columns += sorted(given - set(columns))
    rows: list[list[str]] = []
    for row in paper["rows"] if compare else ():
        scores = dict(zip(paper["columns"], row["scores"], strict=True))
        cells = [f"{scores[name]:.1f}" if name in scores else "" for name in columns]
        mean = sum(row["scores"]) / len(row["scores"])
        rows.append([f"{row['model']}, {row['method']} (published)", *cells, f"{mean:.1f}", f"{row['average']:.1f}"])
    for run in runs:
        cells = [_accuracy(run["benchmarks"].get(name)) for name in columns]
        rows.append([run["name"], *cells, _accuracy(run["average"]), *([""] if compare else [])])
    titles = [BENCHMARKS[name].title if name in BENCHMARKS else name for name in columns]
    table = markdown_table(["", *titles, "Mean of 7", *(["as printed"] if compare else [])], rows, aligned=True)
    notes = "Accuracy in percent (avg@n), with the 95% bootstrap interval over problems."
    return f"{table}\n\n{notes}" + (f" Published: {paper['source']}" if compare else "")


def details_table(run: Results) -> str:
    """All metrics of one model, one row a benchmark, as Markdown."""
    rows = []
    for name, scores in run["benchmarks"].items():
        n = scores["samples"]
        percent = [scores["accuracy"], scores.get(f"pass@{n}"), scores.get(f"majority@{n}"), scores["truncated"]]
        cells = ["" if value is None else f"{100 * value:.1f}" for value in percent]
        entropy = "" if scores["entropy"] is None else f"{scores['entropy']:.3f}"
        title = BENCHMARKS[name].title if name in BENCHMARKS else name
        rows.append([title, str(scores["problems"]), str(n), *cells, f"{scores['mean_length']:.0f}", entropy])
    head = ["", "problems", "n", "avg@n", "pass@n", "majority@n", "truncated", "mean length", "entropy"]
    return markdown_table(head, rows, aligned=True)


def _accuracy(scores: Mapping[str, Any] | None) -> str:
    if scores is None:
        return ""
    low, high = scores["ci95"]
    return f"{100 * scores['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
