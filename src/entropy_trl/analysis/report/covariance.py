"""The section on the covariance, and coloured completions, from the token records of the runs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from entropy_trl.analysis import covariance, figures
from entropy_trl.analysis.covariance import regions, tokens
from entropy_trl.analysis.covariance.records import FOLDER, StepRecords, read_records
from entropy_trl.analysis.covariance.result import chosen_tokens
from entropy_trl.analysis.logs.runs import Run, Series
from entropy_trl.analysis.report.curves import COVARIANCE_UNIT, curve, curve_numbers, numbers_of
from entropy_trl.analysis.report.page import Page, PageFigure, full_name
from entropy_trl.analysis.tables import NONE, number


_TOKEN_ROWS = 8
_REGIONS = {"e1": "right, likely", "e2": "right, unlikely", "e3": "wrong, likely", "e4": "wrong, unlikely"}
_COMPLETIONS, _COMPLETION_TOKENS = 2, 400  # a step, and tokens of each that are shown


def section(page: Page) -> dict[str, Any] | None:
    """The analyses of the token records; None where no run has any."""
    recorded: dict[str, dict[str, list[StepRecords]]] = {}
    for group, label, run in page.each():
        folder = _records_folder(run)
        if folder is None:
            continue
        unread: list[str] = []
        try:
            recorded.setdefault(group, {})[label] = read_records(folder, unread=unread)
        except ValueError as error:  # none of its records can be read: the rest of the page needs none
            unread = [str(error)]
        page.missing += [f"Token records of {full_name(group, label)}: {line}" for line in unread]
    recorded = {group: of_group for group, of_group in recorded.items() if of_group}
    if not recorded:
        page.missing.append("Covariance of tokens: no token records (token_records of the trainer).")
        return None
    first = {group: next(iter(of_group.items())) for group, of_group in recorded.items()}
    records = {group: of_run for group, (_, of_run) in first.items()}
    numbers = page.numbers["covariance"] = {"runs": {group: label for group, (label, _) in first.items()}}
    tables = {
        group: covariance.quantile_table([of_run[0], of_run[-1]] if len(of_run) > 1 else of_run)
        for group, of_run in records.items()
    }
    numbers["quantiles"] = {group: [asdict(table) for table in of_run] for group, of_run in tables.items()}
    found = {group: chosen_tokens(of_run) for group, of_run in records.items()}
    numbers["tokens"] = {
        group: {
            "chosen_by": chosen.chosen_by,
            "tokens": [asdict(row) for row in chosen.tokens[:_TOKEN_ROWS]],
        }
        for group, chosen in found.items()
    }
    drawn = [_covariance_curve(page, recorded), _covariance_histogram(page, records)]
    drawn += [figure for figure in (_entropy_change(page, records), _difficulty(page, records)) if figure]
    drawn.append(_regions(page, records))
    runs = [full_name(group, label) for group, (label, _) in first.items()]
    return {
        "figures": drawn,
        "runs": ", ".join(runs),
        "quantiles": _quantile_rows(tables),
        "tokens": [(group, chosen, chosen.tokens[:_TOKEN_ROWS]) for group, chosen in found.items()],
        "visible": lambda token: json.dumps(token, ensure_ascii=False),
        "completions": {group: _completions(of_run) for group, of_run in records.items()},
        "shares": tokens.SHADE_SHARES,
    }


def _covariance_curve(page: Page, recorded: Mapping[str, Mapping[str, list[StepRecords]]]) -> PageFigure:
    lines = {
        group: curve({label: _record_series(of_run) for label, of_run in of_group.items()})
        for group, of_group in recorded.items()
    }
    page.numbers["covariance"]["over_training"] = {g: curve_numbers(line) for g, line in lines.items()}
    findings = []
    for group, of_group in recorded.items():
        means = np.array([record.mean_covariance for of_run in of_group.values() for record in of_run])
        positive = 100 * float((means > 0).mean())
        findings.append(
            f"{group} has {number(float(means.mean()))} on average, above 0 in {positive:.0f}% of the steps"
        )
    drawing = figures.curves(lines, page.styles, COVARIANCE_UNIT)
    head, rows = numbers_of(lines)
    note = "The theory of the paper: entropy falls while it is above 0."
    title = "Mean covariance over training"
    return page.figure(drawing, "recorded-covariance", title, findings, note, (head, rows), lines)


def _covariance_histogram(page: Page, records: Mapping[str, list[StepRecords]]) -> PageFigure:
    values = {
        group: np.concatenate([record.table("covariance")["covariance"].to_numpy(np.float64) for record in of_run])
        for group, of_run in records.items()
    }
    drawing = figures.histogram(values, page.styles, f"covariance, {COVARIANCE_UNIT}")
    levels = (0.01, 0.5, 0.98, 0.998)
    quantiles = {group: np.quantile(of_run, levels) for group, of_run in values.items()}
    head = ["", "tokens", "lowest", *(f"{100 * level:g}% quantile" for level in levels), "highest"]
    rows = [
        [g, f"{len(v):,}", number(v.min()), *(number(q) for q in quantiles[g]), number(v.max())]
        for g, v in values.items()
    ]
    page.numbers["covariance"]["distribution"] = {
        group: {"tokens": len(v), "lowest": v.min(), "highest": v.max()}
        | {"quantiles": dict(zip(map(str, levels), quantiles[group].tolist(), strict=True))}
        for group, v in values.items()
    }
    findings = [
        f"{group} has a median of {number(float(np.median(v)))} and a highest covariance of {number(v.max())}"
        for group, v in values.items()
    ]
    note = (
        "All recorded tokens of all recorded steps, on a logarithmic scale. The first and the last bar count all "
        "tokens beyond the 0.1% and the 99.9% quantile."
    )
    title = "Covariance of the tokens"
    return page.figure(drawing, "covariance-histogram", title, findings, note, (head, rows), values)


def _entropy_change(page: Page, records: Mapping[str, list[StepRecords]]) -> PageFigure | None:
    changes = {
        group: covariance.entropy_change(of_run)
        for group, of_run in records.items()
        if sum(record.mean_entropy_after is not None for record in of_run) >= 3
    }
    if not changes:
        page.missing.append("Entropy change by an update: not recorded in three steps (entropy_change: true).")
        return None
    points = {
        group: (
            np.array([1e3 * step.learning_rate * step.covariance for step in change.steps]),
            np.array([1e3 * step.change for step in change.steps]),
        )
        for group, change in changes.items()
    }
    drawing = figures.scatter(points, page.styles, "1000 * learning rate * covariance", "entropy change, nats / 1000")
    page.numbers["covariance"]["entropy_change"] = {group: asdict(change) for group, change in changes.items()}
    findings = [
        f"{group} has a correlation of {_correlation(change.over_steps)} over {change.over_steps.points} steps, "
        f"and of {_correlation(change.over_prompts)} over {change.over_prompts.points} prompts"
        for group, change in changes.items()
    ]
    head = ["", "over", "points", "Pearson [95%]", "Spearman [95%]", "entropy moved as the sign says"]
    rows = [
        [
            group,
            over,
            str(relation.points),
            _correlation(relation),
            _correlation(relation, rank=True),
            f"{100 * change.sign_agrees:.0f}%" if over == "steps" else "",
        ]
        for group, change in changes.items()
        for over, relation in (
            ("steps", change.over_steps),
            ("prompts", change.over_prompts),
            ("prompts within a step", change.within_steps),
        )
    ]
    note = "Measured on the same states before and after the update (Fig. 8). The theory says negative."
    title = "Entropy change against covariance"
    return page.figure(drawing, "entropy-change", title, findings, note, (head, rows), changes)


def _difficulty(page: Page, records: Mapping[str, list[StepRecords]]) -> PageFigure | None:
    by_group = {}
    for group, of_run in records.items():
        try:
            by_group[group] = covariance.by_difficulty(of_run)
        except ValueError as error:
            page.missing.append(f"Covariance by difficulty, {group}: {error}")
    if not by_group:
        return None
    names = [_short(row.accuracy) for row in next(iter(by_group.values()))]
    values = {group: [(row.covariance, row.standard_error) for row in rows] for group, rows in by_group.items()}
    drawing = figures.categories(values, names, page.styles, "accuracy of the prompt in its rollout", COVARIANCE_UNIT)
    page.numbers["covariance"]["difficulty"] = {g: [asdict(row) for row in rows] for g, rows in by_group.items()}
    findings = [
        f"{group} is highest for an accuracy of {max(known, key=lambda row: row.covariance or 0.0).accuracy}"
        for group, rows in by_group.items()
        if (known := [row for row in rows if row.covariance is not None])
    ]
    head = ["", "accuracy", "prompts", "covariance", "standard error", "entropy"]
    table = [
        [g, row.accuracy, str(row.prompts), *map(number, (row.covariance, row.standard_error, row.entropy))]
        for g, rows in by_group.items()
        for row in rows
    ]
    note = "Means over prompts with standard errors. All completions right or all wrong: the advantages are 0."
    title = "Covariance by difficulty of the prompt"
    return page.figure(drawing, "covariance-difficulty", title, findings, note, (head, table), by_group)


def _regions(page: Page, records: Mapping[str, list[StepRecords]]) -> PageFigure:
    by_group = {group: regions.entropy_regions(of_run) for group, of_run in records.items()}
    values = {
        group: [(row.entropy_change.mean, row.entropy_change.standard_error) for row in found.means]
        for group, found in by_group.items()
    }
    means = next(iter(by_group.values())).means
    names = ["\n".join(_REGIONS[row.region].split(", ")) for row in means]
    drawing = figures.categories(values, names, page.styles, "tokens", "nats a token and unit of step")
    page.numbers["covariance"]["regions"] = {group: asdict(found) for group, found in by_group.items()}
    findings = [
        f"{group} has {', '.join(f'{number(row.entropy_change.mean)} in {row.region}' for row in found.means)}"
        for group, found in by_group.items()
    ]
    head = ["", "region", "tokens", "gradient", "restrained", "entropy change", "standard error"]
    table = [
        [
            group,
            f"{row.region}: {_REGIONS[row.region]}",
            *(_percent(share.mean) for share in (row.tokens, row.gradient, row.restrained)),
            *map(number, (row.entropy_change.mean, row.entropy_change.standard_error)),
        ]
        for group, found in by_group.items()
        for row in found.means
    ]
    note = (
        "The tokens of right completions (advantage above 0) and of wrong ones (below 0). A token is likely if -ln p "
        "is below the entropy of its distribution, and unlikely if it is above. In the order of the figure these are "
        "e1 to e4 of arXiv 2602.09782. To first order, for a step on the logits, before any ratio clip and control; "
        "means over recorded steps with standard errors. The bias of the estimate differs by region: compare a region "
        "with itself, not with others."
    )
    title = "Estimated entropy change by region"
    return page.figure(drawing, "entropy-regions", title, findings, note, (head, table), by_group)


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.3g}%"


def _short(interval: str) -> str:
    """`(0.25, 0.5]` as `≤0.5`, for the axis."""
    if "," not in interval:
        return interval
    return ("≤" if interval.endswith("]") else "<") + interval.partition(", ")[2][:-1]


def _records_folder(run: Run) -> Path | None:
    """The folder of the run, if it has token records."""
    if run.path is None:
        return None
    folder = run.path if run.path.is_dir() else run.path.parent
    candidates = (folder, folder.parent) if folder.name.startswith("checkpoint-") else (folder,)
    return next((f for f in candidates if any((f / FOLDER).glob("step-*.parquet"))), None)


def _record_series(records: Sequence[StepRecords]) -> Series:
    steps: npt.NDArray[np.int64] = np.array([record.step for record in records], dtype=np.int64)
    return Series(steps, np.array([record.mean_covariance for record in records], dtype=np.float64))


def _quantile_rows(tables: Mapping[str, list[covariance.QuantileTable]]) -> dict[str, Any]:
    columns = [(group, table) for group, of_group in tables.items() for table in of_group]
    fractions = [row.fraction for row in columns[0][1].rows]
    rows = [
        [
            "all" if fraction == 1 else f"top {100 * fraction:g}%",
            *(f"{number(table.rows[i].covariance)} ({table.rows[i].count:,})" for _, table in columns),
        ]
        for i, fraction in enumerate(fractions)
    ]
    sampled = any(table.sampled for _, table in columns)
    return {"head": ["tokens", *(f"{group}, step {table.step}" for group, table in columns)], "rows": rows} | {
        "sampled": sampled
    }


def _correlation(relation: covariance.Relation, rank: bool = False) -> str:
    value = relation.spearman if rank else relation.pearson
    interval = relation.spearman_ci95 if rank else relation.pearson_ci95
    if value is None:
        return NONE
    return f"{value:.2f}" + ("" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]")


def _completions(records: Sequence[StepRecords]) -> list[dict[str, Any]]:
    """The completions with the largest covariances of the first and the last recorded step, for the template."""
    steps = []
    for record in [records[0], records[-1]] if len(records) > 1 else records:
        table = record.table()
        scale = tokens.covariance_scale(table["covariance"].to_numpy())
        items = []
        for row_id, unordered in tokens.completions_with_largest(table, _COMPLETIONS):
            completion = unordered.sort_values("position")
            first = completion.iloc[0]
            title = tokens.completion_title(row_id, first)
            shown = _around_largest(completion)
            if len(shown) < len(completion):
                ends = shown["position"].iloc[[0, -1]]
                title += f"; tokens {ends.iloc[0]} to {ends.iloc[1]} of {len(completion)}"
            items.append(tokens.shown_completion(shown, scale, title, record.prompts.get(int(first["group"]))))
        steps.append({"step": record.step, "scale": scale, "completions": items})
    return steps


def _around_largest(completion: pd.DataFrame) -> pd.DataFrame:
    """At most `_COMPLETION_TOKENS` tokens, those around the one with the largest covariance."""
    if len(completion) <= _COMPLETION_TOKENS:
        return completion
    largest = int(completion["covariance"].abs().to_numpy().argmax())
    start = min(max(largest - _COMPLETION_TOKENS // 2, 0), len(completion) - _COMPLETION_TOKENS)
    return completion.iloc[start : start + _COMPLETION_TOKENS]
