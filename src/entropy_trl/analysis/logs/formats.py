"""The file formats of logs: each reader gives the entries of one or more runs, in order, each with its step."""

import csv
import json
import re
import shlex
from pathlib import Path
from typing import Any

from entropy_trl.analysis.logs.entries import STEP_NAMES, Log, in_step_order, is_finite, load_json, mapping, with_steps
from entropy_trl.analysis.logs.trackers import by_run, is_event_file, read_events, read_parquet, read_trackio
from entropy_trl.analysis.logs.unread import note_unread


_SUFFIXES = (".jsonl", ".csv", ".parquet", ".db")
#: What trackio writes beside the metrics of a project.
_NOT_METRICS = ("_system.parquet", "_configs.parquet", "_traces.parquet")


def is_log(file: Path) -> bool:
    """Whether a file looks like a log by its name; trackio's export beside its store is the same once more."""
    if file.suffix == ".parquet" and file.with_suffix(".db").exists():
        return False
    return file.is_file() and file.suffix in _SUFFIXES and not file.name.endswith(_NOT_METRICS)


def read_file(file: Path) -> list[Log]:
    """The runs in a file, by the format that its name says.

    Raises:
        ValueError: The format is not known, or the file is not of it.
        ImportError: The package whose format it is is missing.
    """
    if not file.is_file():  # such as a pipe, which would never end
        raise ValueError(f"{str(file)!r} is not a regular file: give a folder or the file of a log.")
    if is_event_file(file):
        return read_events(file)
    if file.suffix == ".wandb":
        raise ValueError(
            f"{str(file)!r} is W&B's own record of an offline run, which is not read. Upload it with `wandb sync`, and "
            "give the run's history: wandb.Api().run(...).history(samples=100000).to_csv('run.csv')."
        )
    readers = {
        ".json": _read_json,
        ".jsonl": _read_json_lines,
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".parquet": read_parquet,
        ".db": read_trackio,
        ".log": _read_verl_console,
        ".txt": _read_verl_console,
    }
    if file.suffix not in readers:
        raise ValueError(
            f"{str(file)!r} has a format that is not known here: give a folder, or a file with one of "
            f"{', '.join(readers)}."
        )
    try:
        return readers[file.suffix](file)
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(file)!r} is not a text file: {error}.") from error


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings that are stored beside a log: `settings.json`, as a training or the quickstart writes it.

    A training stores its configuration under `config`, beside `versions`, `command` and `commit`; the quickstart
    stores the settings themselves. Both give the settings, with the other three among them.
    """
    stored = _beside(folder / "settings.json")
    config = stored.pop("config") if isinstance(stored.get("config"), dict) else {}
    if isinstance(command := stored.get("command"), list):
        stored["command"] = shlex.join(map(str, command))
    return config | stored


def read_results(folder: Path) -> dict[str, float]:
    """The final evaluation that the quickstart stores beside its log."""
    return {name: float(value) for name, value in _beside(folder / "result.json").items() if is_finite(value)}


def _beside(file: Path) -> dict[str, Any]:
    """A file beside a log; empty if there is none, or if it is damaged: the log can be read without it."""
    if not file.is_file():
        return {}
    try:
        return mapping(file)
    except ValueError as error:
        note_unread(f"Left out: {error}")
        return {}


def trainer_step(file: Path) -> int:
    """The step at which a `trainer_state.json` was written.

    Raises:
        ValueError: The file is damaged, or its step is no number.
    """
    step = mapping(file).get("global_step", 0)
    if not is_finite(step):
        raise ValueError(f"{str(file)!r} has the global_step {step!r}, which is not a number.")
    return int(step)


def _read_json(file: Path) -> list[Log]:
    """transformers' `trainer_state.json`, a list of entries, a table of columns, or `trackio get metric --json`."""
    content = load_json(file)
    if isinstance(content, list):
        rows = content
    elif isinstance(content, dict) and "log_history" in content:
        rows = content["log_history"]
    elif isinstance(content, dict) and {"metric", "values"} <= content.keys():
        rows = [{"step": point["step"], content["metric"]: point["value"]} for point in content["values"]]
        return [Log(with_steps(rows, file), str(content.get("run") or ""))]
    elif isinstance(content, dict) and content and all(isinstance(v, list | dict) for v in content.values()):
        columns = {k: list(v.values()) if isinstance(v, dict) else v for k, v in content.items()}
        if len({len(column) for column in columns.values()}) > 1:
            raise ValueError(f"{str(file)!r} is not a table: its columns have different lengths.")
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    else:
        raise ValueError(
            f"{str(file)!r} has no log_history (as trainer_state.json), and is no list of entries or table of columns."
        )
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{str(file)!r} has entries that are not JSON objects.")
    return [Log(with_steps(rows, file))]


def _read_json_lines(file: Path) -> list[Log]:
    rows: list[dict[str, Any]] = []
    damaged: list[str] = []
    text = file.read_text(encoding="utf-8-sig")
    lines = text.split("\n")  # a text in JSON may have U+2028 and other line separators
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if rows and number == len(lines) and not text.endswith("\n"):  # the run is still writing it
                break
            damaged.append(f"line {number} is not valid JSON: {error}.")
            continue
        if isinstance(row, dict):
            rows.append(row)
        else:
            damaged.append(f"line {number} is not a JSON object.")
    if damaged and not rows:
        raise ValueError(f"{str(file)!r}, {damaged[0]}")
    if damaged:
        total = len(damaged) + len(rows)
        note_unread(f"{str(file)!r} has {len(damaged)} damaged lines of {total}, which are not read: {damaged[0]}")
    return [Log(with_steps(rows, file))]


_CONSOLE_STEP = re.compile(r"\bstep:(\d+) - (.*)")
_CONSOLE_METRIC = re.compile(r"(\S+?):(?:np\.\w+\()?(-?(?:[\d.]+(?:[eE][-+]?\d+)?|nan|inf))\)?$")


def _read_verl_console(file: Path) -> list[Log]:
    """verl's console logger: lines with `step:1 - actor/entropy:0.31 - critic/score/mean:0.5 - ...`."""
    rows = []
    for line in file.read_text(errors="replace").splitlines():
        match = _CONSOLE_STEP.search(line)
        if match:
            metrics = (_CONSOLE_METRIC.match(part.strip()) for part in match[2].split(" - "))
            rows.append({"step": int(match[1])} | {m[1]: float(m[2]) for m in metrics if m})
    if not rows:
        raise ValueError(f"{str(file)!r} has no line such as 'step:1 - actor/entropy:0.31 - ...', verl's console log.")
    return [Log(with_steps(rows, file))]


_CHART_COLUMN = re.compile(r"(?P<run>.+?) - (?P<metric>.+?)(?P<extreme>__MIN|__MAX)?")


def _read_csv(file: Path) -> list[Log]:
    rows = _csv_rows(file)
    columns = list(rows[0]) if rows else []
    if not rows:
        raise ValueError(f"{str(file)!r} has no rows.")
    if set(columns) == {"Wall time", "Step", "Value"}:
        raise ValueError(
            f"{str(file)!r} is one metric that TensorBoard's page has downloaded, and an analysis needs several. Give "
            "the folder with the event files."
        )
    if {"metric", "value"} <= set(columns):  # one row a value, of one run or with a column `run`
        step = next((name for name in STEP_NAMES if name in columns), "step")
        named: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            run = row.get("run", row.get("run_name"))
            named.setdefault("" if run is None else str(run), []).append(
                {"step": row.get(step), str(row["metric"]): row["value"]}
            )
        return [Log(in_step_order(with_steps(entries, file)), run) for run, entries in named.items()]
    matches = {column: _CHART_COLUMN.fullmatch(column) for column in columns[1:]}
    if matches and all(matches.values()):  # W&B's chart export
        charts: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            for column, match in matches.items():
                if match and not match["extreme"] and row[column] is not None:
                    charts.setdefault(match["run"], []).append({"step": row[columns[0]], match["metric"]: row[column]})
        return [Log(with_steps(entries, file), run) for run, entries in charts.items()]
    return by_run(rows, file)


def _csv_rows(file: Path) -> list[dict[str, Any]]:
    rows = []
    with file.open(newline="", encoding="utf-8-sig") as lines:
        reader = csv.DictReader(lines, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
        try:
            for row in reader:
                rows.append({str(name): _cell(value) for name, value in row.items() if name})
        except csv.Error as error:  # a quote that is never closed, or a cell of more than 128 KiB
            note_unread(
                f"{str(file)!r} is damaged after {len(rows)} rows, near line {reader.line_num} ({error}): the rest "
                "is not read."
            )
    return rows


def _cell(text: str | None) -> Any:
    if text is None or not text.strip():
        return None
    try:
        return float(text)
    except ValueError:
        return text
