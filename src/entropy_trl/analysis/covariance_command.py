"""The command `entropy-trl covariance`: its options, what it computes from token records, and what it prints."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from entropy_trl.analysis import covariance, regions, tokens
from entropy_trl.analysis.covariance import Level, Relation
from entropy_trl.analysis.pages import terminal
from entropy_trl.analysis.records import StepRecords, read_records


#: Rows that a printed table has at most; the JSON file has all.
_PRINTED_ROWS = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `entropy-trl covariance`."""
    parser.add_argument("run", help="output folder of a run that recorded tokens, or a file of records")
    parser.add_argument("--steps", nargs="+", type=int, metavar="STEP", help="the recorded steps to use (default: all)")
    parser.add_argument(
        "--level",
        choices=("token", "sequence"),
        default="token",
        help="token: Eq. 10 over the step, as the controls use it (default). sequence: whole completions of a prompt, "
        "by log-probability a token, as in the paper's Fig. 8",
    )
    parser.add_argument(
        "--window",
        type=int,
        default=1,
        help="recorded steps that one point of the entropy change averages (default: 1)",
    )
    parser.add_argument(
        "--fraction",
        type=float,
        help="which tokens: the share with the highest covariance (default: those that the control restrained, or 0.02 "
        "without one)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write completions with their tokens coloured")
    parser.add_argument(
        "--completions", type=int, default=3, help="--html: completions of the first, middle and last step (default: 3)"
    )


@dataclass(frozen=True)
class Results:
    """All that the command computes; `entropy_change` is None where too few steps measured it."""

    run: str
    level: Level
    quantiles: list[covariance.QuantileTable]
    training: list[covariance.StepCovariance]
    entropy_change: covariance.EntropyChange | None
    difficulty: list[covariance.DifficultyGroup] | None
    regions: regions.EntropyRegions
    tokens: tokens.SelectedTokens


def analyse(options: argparse.Namespace) -> tuple[Results, list[StepRecords]]:
    """Reads the records and computes everything.

    Raises:
        ValueError, OSError: A mistake of the user's, in one line.
    """
    for name in ("window", "completions"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}.")
    if options.fraction is not None and not 0 < options.fraction <= 1:
        raise ValueError(f"--fraction is a share of the tokens, in (0, 1], got {options.fraction:g}.")
    for file in (options.json, options.html):
        if file is not None and not file.absolute().parent.is_dir():
            raise FileNotFoundError(f"There is no folder {str(file.parent)!r} to write {file.name!r} to.")
    unread: list[str] = []
    records = read_records(options.run, options.steps, unread)
    for line in unread:
        print(terminal(f"warning: {line}"), file=sys.stderr)
    training = covariance.covariance_over_training(records, options.level)
    fraction = options.fraction
    if fraction is None and not any(point.selected for point in training):
        fraction = 0.02
    measured = sum(record.mean_entropy_after is not None for record in records)
    low, high = _accuracy_range(records)
    results = Results(
        run=str(options.run),
        level=options.level,
        quantiles=covariance.quantile_table(records, options.level),
        training=training,
        entropy_change=(
            covariance.entropy_change(records, options.level, options.window)
            if measured // options.window >= 3
            else None
        ),
        difficulty=covariance.by_difficulty(records, options.level) if 0 <= low <= high <= 1 else None,
        regions=regions.entropy_regions(records),
        tokens=tokens.selected_tokens(records, fraction),
    )
    return results, records


def _accuracy_range(records: Sequence[StepRecords]) -> tuple[float, float]:
    columns = [record.table("group_accuracy")["group_accuracy"] for record in records]
    return min(float(column.min()) for column in columns), max(float(column.max()) for column in columns)


def main(results: Results, records: Sequence[StepRecords], options: argparse.Namespace) -> int:
    """Prints, and writes what was asked for. Returns the exit code."""
    print(terminal(report(results)))
    if options.json is not None:
        options.json.write_text(json.dumps(_plain(asdict(results)), indent=2, allow_nan=False) + "\n")
        print(f"\nAll results are in {options.json}.")
    if options.html is not None:
        shown = [records[i] for i in sorted({0, len(records) // 2, len(records) - 1})]
        page = tokens.render_completions(shown, options.completions)
        options.html.write_text(page, encoding="utf-8")
        print(f"\nCompletions with their tokens coloured are in {options.html}.")
    return 0


def report(results: Results) -> str:
    """The results as text: a heading, a sentence and a table for each question."""
    parts = (_quantiles, _training, _entropy_change, _difficulty, _regions, _tokens)
    return "\n\n".join(part(results) for part in parts)


def _unit(results: Results) -> str:
    return "tokens" if results.level == "token" else "completions"


def _quantiles(results: Results) -> str:
    """Table 1 for the first, the middle and the last step."""
    tables = [results.quantiles[i] for i in sorted({0, len(results.quantiles) // 2, len(results.quantiles) - 1})]
    rows = []
    for i, row in enumerate(tables[0].rows):
        name = "all" if row.fraction == 1 else f"top {100 * row.fraction:g}%"
        cells = [f"{table.rows[i].covariance:.4g} ({table.rows[i].count})" for table in tables]
        rows.append([name, *cells])
    sampled = [table.step for table in results.quantiles if table.sampled]
    note = (
        f" Of {len(sampled)} of {len(results.quantiles)} steps only some completions were recorded: the table is of "
        "those, and their highest covariances are below the step's."
        if sampled
        else ""
    )
    unit = _unit(results)
    return (
        f"Mean covariance of the {unit} with the highest one (Table 1 of arXiv 2505.22617), with the number of {unit}; "
        f"a share is at least one.{note}\n\n" + _table(["", *(f"step {table.step}" for table in tables)], rows)
    )


def _training(results: Results) -> str:
    rows = [
        [
            f"{point.step}",
            f"{point.learning_rate:.3g}",
            f"{point.covariance:.4g}",
            f"{100 * point.positive:.1f}%",
            _number(point.selected_covariance),
            f"{100 * point.selected:.3g}%",
            f"{point.entropy:.4f}",
            _number(None if point.entropy_after is None else point.entropy_after - point.entropy, "+.2e"),
        ]
        for point in _spread(results.training)
    ]
    positive = sum(point.covariance > 0 for point in results.training)
    head = ["step", "learning rate", "covariance", "positive", "of restrained", "restrained", "entropy", "its change"]
    return (
        f"Covariance over training: the mean is above 0 in {positive} of {len(results.training)} recorded steps. "
        f"'positive' is the share of {_unit(results)}, entropies are in nats.\n\n" + _table(head, rows)
    )


def _entropy_change(results: Results) -> str:
    change = results.entropy_change
    if change is None:
        return (
            "Entropy change against covariance: not computed, since fewer than three points have the entropy after the "
            "update, which a recorder measures with `entropy_change: true`."
        )
    rows = [
        [name, f"{relation.points}", *_correlations(relation), relation.resampled]
        for name, relation in (
            ("steps" if change.window == 1 else f"means of {change.window} steps", change.over_steps),
            ("prompts", change.over_prompts),
            ("prompts, less the step's mean", change.within_steps),
        )
    ]
    head = ["over", "points", "Pearson [95%]", "Spearman [95%]", "slope", "bootstrap draws"]
    return (
        "Entropy change on the same states against learning rate x covariance (Fig. 8). The theory says negative. "
        f"Covariance above 0 in {100 * change.covariance_positive:.0f}% of the points, entropy fell in "
        f"{100 * change.entropy_fell:.0f}%, and moved as the sign of the covariance says in "
        f"{100 * change.sign_agrees:.0f}%.\n\n" + _table(head, rows)
    )


def _correlations(relation: Relation) -> list[str]:
    cells = []
    for value, interval in (
        (relation.pearson, relation.pearson_ci95),
        (relation.spearman, relation.spearman_ci95),
    ):
        text = "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"
        cells.append(_number(value, ".2f") + text)
    return [*cells, _number(relation.slope, ".3g")]


def _difficulty(results: Results) -> str:
    if results.difficulty is None:
        return "Covariance by difficulty: not computed, since the rewards are not between 0 and 1."
    rows = [
        [
            group.accuracy,
            f"{group.prompts}",
            _number(group.covariance),
            _number(group.standard_error, ".2g"),
            _number(group.entropy, ".4f"),
            _number(group.change, "+.2e"),
        ]
        for group in results.difficulty
    ]
    return (
        "Covariance by how often the prompt is solved: means over prompts. Where all completions of a prompt have the "
        "same reward (first and last row), GRPO's advantages are 0.\n\n"
        + _table(["accuracy", "prompts", "covariance", "standard error", "entropy", "its change"], rows)
    )


def _regions(results: Results) -> str:
    rows = [
        [
            row.region,
            *(_percent(share.mean) for share in (row.tokens, row.restrained, row.gradient)),
            _number(row.entropy_change.mean, "+.2e"),
            _number(row.entropy_change.standard_error, ".1e"),
        ]
        for row in results.regions.means
    ]
    return (
        "Entropy regions (arXiv 2602.09782): A > 0 in e1 and e2, A < 0 in e3 and e4; -ln p is below the entropy in e1 "
        "and e3, above it in e2 and e4. Means over recorded steps of the share of the tokens, of these the restrained "
        "ones, the share of the gradient, and the estimated part in the change of the entropy, nats a token and unit "
        "of step on the logits; the last two before any ratio clip and control. The bias of the estimate differs by "
        "region: compare a region with itself, not with others.\n\n"
        + _table(["region", "tokens", "restrained", "gradient", "entropy change", "standard error"], rows)
    )


def _tokens(results: Results) -> str:
    chosen = results.tokens
    rows = [
        [
            json.dumps(row.token, ensure_ascii=False),
            f"{row.count}",
            f"{row.chosen}",
            f"{row.lift:.2f}",
            f"{row.keyness:.1f}",
        ]
        for row in chosen.tokens[:_PRINTED_ROWS]
        if row.keyness > 0
    ]
    positions = [
        [f"{100 * part.start:.0f}-{100 * part.end:.0f}%", f"{part.count}", f"{part.chosen}", f"{part.lift:.2f}"]
        for part in chosen.positions
    ]
    return (
        f"Which tokens are {chosen.chosen_by}: {chosen.chosen} of {chosen.count}. The lift is a token's share of these "
        "over its share of all; G2 weighs it by the evidence.\n\n"
        + _table(["token", "recorded", "chosen", "lift", "G2"], rows)
        + "\n\nWhere in the completion:\n\n"
        + _table(["position", "recorded", "chosen", "lift"], positions)
    )


def _spread(points: Sequence[Any]) -> list[Any]:
    """At most `_PRINTED_ROWS` of the points, evenly spread, the first and the last among them."""
    if len(points) <= _PRINTED_ROWS:
        return list(points)
    return [points[round(i * (len(points) - 1) / (_PRINTED_ROWS - 1))] for i in range(_PRINTED_ROWS)]


def _number(value: float | None, form: str = ".4g") -> str:
    return "-" if value is None else f"{value:{form}}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.3g}%"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = (
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in (head, *rows)
    )
    return "\n".join(line.rstrip() for line in lines)


def _plain(value: Any) -> Any:
    """The value for JSON, which has no NaN and no infinity: null stands for them."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
