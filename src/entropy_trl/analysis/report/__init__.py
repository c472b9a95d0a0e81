"""One page on one or more runs: curves, the law, the covariance, settings and results.

[`write_report`] writes `report.html`, which needs no network and no script, `report.json` with its numbers, and its
figures as SVG and PNG. What was not logged is left out and named. The page is `page.html` (a Jinja template, so that
all text from logs is escaped) with `page.css`.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from entropy_trl._version import __version__
from entropy_trl.analysis import figures
from entropy_trl.analysis.covariance import tokens
from entropy_trl.analysis.law.points import one_benchmark
from entropy_trl.analysis.logs.runs import Run
from entropy_trl.analysis.pages import environment, style_sheet
from entropy_trl.analysis.report import covariance, curves, law, verdicts
from entropy_trl.analysis.report.page import Page, full_name
from entropy_trl.analysis.report.state import state_of
from entropy_trl.analysis.report.values import flat
from entropy_trl.analysis.svg import PAGE_COLOURS
from entropy_trl.analysis.tables import NONE, number, plain
from entropy_trl.files import write_output


SMOOTH = 5

#: Groups that a title names.
_TITLE_GROUPS = 4
#: Settings that differ between any two runs and mean nothing; they are among all settings.
_NAMES_OF_RUNS = ("output_dir", "logging_dir", "run_name", "hub_model_id", "command")
#: SVG's `stroke-dasharray` for matplotlib's line styles, in the legend.
_DASHES = {"-": "none", "--": "6 3", "-.": "6 2 1.5 2", ":": "1.5 2.5"}


def write_report(
    runs: Sequence[Run],
    output: str | Path,
    title: str | None = None,
    entropy: str | None = None,
    reward: str | None = None,
    benchmark: str | None = None,
    smooth: int = SMOOTH,
    unread: Sequence[str] = (),
) -> Path:
    """Write the report of some runs. Runs of one group are seeds: one line, the mean, with their range as a band.

    Args:
        runs (`Sequence[Run]`): The runs, from [`read_runs`](entropy_trl.analysis.logs.runs.read_runs).
        output (`str | Path`): A folder for `report.html`, or the page itself, `NAME.html`. `NAME.json` and the folder
            `figures` go beside it.
        title (`str`, *optional*): Title of the page.
        entropy (`str`, *optional*): The metric to take as the entropy; by default the first known name that a run
            logged.
        reward (`str`, *optional*): The metric to take as the reward, in the curves and in the law. By default the
            curves have the training reward, and the law the accuracy of an evaluation if there are enough.
        benchmark (`str`, *optional*): The evaluation data set, where TRL evaluated on several and logged all under the
            same names.
        smooth (`int`, *optional*, defaults to `SMOOTH`): Logged points in the running mean of noisy training metrics;
            1 for none.
        unread (`Sequence[str]`, *optional*): What could not be read, a sentence each: the page says it at its top.

    Returns:
        `Path`: The page.

    Raises:
        ValueError: There are no runs, no run logged a metric that is asked for, a run has several evaluation data sets
            and none was chosen, or a file of records is damaged.
        OSError: The files cannot be written.
        ImportError: SciPy is missing.
    """
    if smooth < 1:
        raise ValueError(f"smooth must be at least 1 point, got {smooth}.")
    if not runs:
        raise ValueError("There are no runs to report on.")
    runs = [one_benchmark(run, benchmark) for run in runs]
    check_metrics(runs, (entropy, reward))
    file = page_path(Path(output))
    page = Page(runs, file.parent / "figures", {"entropy": entropy, "reward": reward}, smooth)
    page.folder.mkdir(parents=True, exist_ok=True)
    html = (
        environment()
        .get_template("page.html")
        .render(
            _content(page, title, unread),
            css=Markup(tokens.COMPLETION_CSS + style_sheet("page.css")),
            version=__version__,
        )
    )
    write_output(file, html)
    write_output(file.with_suffix(".json"), json.dumps(plain(page.numbers, digits=6), allow_nan=False) + "\n")
    return file


def page_path(output: Path) -> Path:
    """The page that [`write_report`] writes for an `output`."""
    return output if output.suffix == ".html" else output / "report.html"


def check_metrics(runs: Sequence[Run], metrics: Iterable[str | None]) -> None:
    """Check that a run logged each metric that is asked for, and that every run has something to draw.

    Raises:
        ValueError: A metric was not logged (the error names the nearest), or a run has none that is known.
    """
    chosen = [metric for metric in metrics if metric is not None]
    for metric in chosen:
        if not any(metric in run.metrics for run in runs):
            runs[0].series(metric)
    for run in runs:
        if not curves.has_a_panel(run) and not set(chosen) & set(run.metrics):
            logged = ", ".join(repr(name) for name in run.metrics[:8]) or "no numbers"
            raise ValueError(
                f"{str(run.path or run.name)!r} has no metric that is known here (it has {logged}): there is nothing "
                "to draw. Name yours with --entropy METRIC or --reward METRIC."
            )


def _content(page: Page, title: str | None, unread: Sequence[str]) -> dict[str, Any]:
    """The variables of the template."""
    page.numbers["unread"] = list(unread)
    page.numbers["title"] = title = title or _default_title(list(page.groups))
    sections = curves.sections(page)
    return {
        "title": title,
        "groups": page.styles,
        "dashes": _DASHES,
        "markers": {style.marker: figures.marker_outline(style.marker) for style in page.styles.values()},
        "colours": PAGE_COLOURS,
        "states": [*unread, *_unfinished(page)],
        "verdicts": verdicts.section(page),
        "symbols": verdicts.SYMBOLS,
        "advice": verdicts.common_advice(page),
        "sections": sections,
        "several": any(len(members) > 1 for members in page.groups.values()),
        "law": law.section(page),
        "covariance": covariance.section(page),
        "settings": _settings(page),
        "results": _results(page),
        "runs": _runs(page),
        "missing": page.missing,
    }


def _default_title(groups: Sequence[str]) -> str:
    named = ", ".join(groups if len(groups) <= _TITLE_GROUPS else groups[: _TITLE_GROUPS - 1])
    more = "" if len(groups) <= _TITLE_GROUPS else f" and {len(groups) - _TITLE_GROUPS + 1} more"
    return f"Run report: {named}{more}"


def _unfinished(page: Page) -> list[str]:
    """A sentence on each run that did not come to its end."""
    said = []
    for group, label, run in page.each():
        step, planned, finished = state_of(run)
        if finished is False:
            of = "" if planned is None else f" of {planned:,}"
            said.append(f"{full_name(group, label)}: still running, or interrupted, at step {step:,}{of}.")
    return said


def _runs(page: Page) -> dict[str, Any]:
    """Where the runs were read from."""
    states = {(group, label): state_of(run) for group, label, run in page.each()}
    rows = [
        [
            full_name(group, label),
            str(run.path or NONE),
            f"{states[group, label].step:,}",
            states[group, label].words,
        ]
        for group, label, run in page.each()
    ]
    page.numbers["runs"] = [
        {
            "group": group,
            "label": label,
            "name": run.name,
            "seed": run.seed,
            "path": None if run.path is None else str(run.path),
            "last_step": states[group, label].step,
            "finished": states[group, label].finished,
            "results": run.results,
        }
        for group, label, run in page.each()
    ]
    return {"head": ["run", "read from", "last step", "state"], "rows": rows}


def _settings(page: Page) -> dict[str, Any]:
    """Settings in which the groups differ, and all settings."""
    by_group: dict[str, dict[str, list[str]]] = {}
    for group, members in page.groups.items():
        values = by_group.setdefault(group, {})
        for run in members.values():
            for key, value in flat(run.config):
                if value not in values.setdefault(key, []):
                    values[key].append(value)
        for of_key in values.values():
            of_key.sort()
    keys = list(dict.fromkeys(key for values in by_group.values() for key in values))
    stored = [values for values in by_group.values() if values]  # where nothing is stored, nothing is known to differ
    differing = [
        key
        for key in keys
        if key not in _NAMES_OF_RUNS and any(values.get(key) != stored[0].get(key) for values in stored)
    ]
    page.numbers["settings"] = {"differences": differing, "groups": by_group}

    def rows(of_keys: Iterable[str]) -> list[list[str]]:
        return [[key, *(", ".join(values.get(key, [NONE])) for values in by_group.values())] for key in of_keys]

    return {
        "head": ["setting", *by_group],
        "rows": rows(differing),
        "all": rows(keys),
        "compared": len(stored) > 1,
        "without": [group for group, values in by_group.items() if not values],
    }


def _results(page: Page) -> dict[str, Any]:
    """The last values of the curves and the final evaluation: rows of (whether a group's own, cells)."""
    shown = {"entropy": "entropy", "reward": "reward", "accuracy": "accuracy", "pass-at-k": "pass@k"}
    logged = {key: name for key, name in shown.items() if key in page.last}
    final = list(dict.fromkeys(name for _, _, run in page.each() for name in run.results))
    rows: list[tuple[bool, list[str]]] = []
    numbers: dict[str, list[float | None]] = {}
    for group, members in page.groups.items():
        steps = [state_of(run).step for run in members.values()]
        values = [
            [*(page.last[key].get((group, label)) for key in logged), *(run.results.get(name) for name in final)]
            for label, run in members.items()
        ]
        if len(members) > 1:
            name = f"{group}, mean of {len(members)}"
            numbers[name] = [_mean(column) for column in zip(*values, strict=True)]
            reached = f"{min(steps):,}" if min(steps) == max(steps) else f"{min(steps):,} to {max(steps):,}"
            rows.append((True, [name, reached, *map(number, numbers[name])]))
        for label, step, of_run in zip(members, steps, values, strict=True):
            name = full_name(group, label)
            numbers[name] = of_run
            rows.append((False, [name, f"{step:,}", *map(number, of_run)]))
    columns = [f"last {name}" for name in logged.values()]
    columns += [f"final {name.removeprefix('final_')}" for name in final]
    page.numbers["results"] = {"columns": columns, "rows": numbers}
    return {"head": ["run", "last step", *columns], "rows": rows, "final": bool(final)}


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean of the runs that have a value."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
