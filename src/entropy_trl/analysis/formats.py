"""The file formats of logs: each reader gives the entries of one or more runs, in order, each with its step."""

import csv
import json
import logging
import math
import re
import sqlite3
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from entropy_trl.analysis.pages import terminal


logger = logging.getLogger(__name__)

#: Where an entry may have its step, the first that the log has anywhere counts. W&B's `_step` counts the calls of
#: `log`, so it is taken only where the trainer's own step is not there.
STEP_NAMES = (
    "step",
    "train/global_step",
    "eval/global_step",
    "training/global_step",
    "trainer/global_step",
    "global_step",
    "Step",
    "_step",
)

_SUFFIXES = (".jsonl", ".csv", ".parquet", ".db")
#: What trackio writes beside the metrics of a project.
_NOT_METRICS = ("_system.parquet", "_configs.parquet", "_traces.parquet")
_NUMBERS = {"NaN": math.nan, "nan": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass
class Log:
    """The entries of one run, and the name and the settings that are stored with them."""

    entries: list[dict[str, Any]]
    name: str = ""
    config: dict[str, Any] = field(default_factory=dict)


def is_log(file: Path) -> bool:
    """Whether a file looks like a log by its name; trackio's export beside its store is the same once more."""
    if file.suffix == ".parquet" and file.with_suffix(".db").exists():
        return False
    return file.is_file() and file.suffix in _SUFFIXES and not file.name.endswith(_NOT_METRICS)


def is_event_file(file: Path) -> bool:
    """Whether a file is TensorBoard's."""
    return file.is_file() and "tfevents" in file.name


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
    readers = {
        ".json": _read_json,
        ".jsonl": _read_json_lines,
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".parquet": _read_parquet,
        ".db": _read_trackio,
        ".wandb": _read_wandb,
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
    """The settings that the quickstart stores beside its log."""
    file = folder / "settings.json"
    return _mapping(file) if file.is_file() else {}


def read_results(folder: Path) -> dict[str, float]:
    """The final evaluation that the quickstart stores beside its log."""
    file = folder / "result.json"
    return {k: float(v) for k, v in _mapping(file).items() if isinstance(v, int | float)} if file.is_file() else {}


def trainer_step(file: Path) -> int:
    """The step at which a `trainer_state.json` was written.

    Raises:
        ValueError: The file is damaged, or its step is no number.
    """
    step = _mapping(file).get("global_step", 0)
    if not _is_finite(step):
        raise ValueError(f"{str(file)!r} has the global_step {step!r}, which is not a number.")
    return int(step)


def _mapping(file: Path) -> dict[str, Any]:
    value = _load_json(file)
    if not isinstance(value, dict):
        raise ValueError(f"{str(file)!r} is not a JSON object.")
    return value


def _load_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # nested too deeply, or a number of thousands of digits
        raise ValueError(f"{str(file)!r} is not valid JSON: {error}.") from error


# Entries


def _with_steps(rows: Iterable[Mapping[str, Any]], source: Path) -> list[dict[str, Any]]:
    """Flat entries, each with an int `"step"`: its own, or that of the entry before it.

    Raises:
        ValueError: No entry has a step.
    """
    flat = [dict(_flatten(row)) for row in rows]
    name = next((name for name in STEP_NAMES if any(_is_finite(row.get(name)) for row in flat)), None)
    if name is None and flat:
        columns = ", ".join(list(flat[0])[:8]) or "nothing"
        raise ValueError(f"{str(source)!r} has no steps: one of {', '.join(STEP_NAMES)} is needed, it has {columns}.")
    # Trainers that log train/global_step may log eval/global_step with evaluations instead.
    names = [name, *(n for n in STEP_NAMES if n and n.endswith("/global_step") and n != name)] if name else []
    step = 0
    entries = []
    for row in flat:
        if any(_is_infinite(row.get(n)) for n in names):
            logger.warning(terminal(f"{str(source)!r} has an entry whose step is too large: it is not read."))
            continue
        step = next((int(row[n]) for n in names if _is_finite(row.get(n))), step)
        entries.append({"step": step} | {k: v for k, v in row.items() if k != "step" and v is not None})
    return entries


def _flatten(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested metrics joined with "/"; verl's file logger puts all of them under "data"."""
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, prefix if key == "data" else f"{prefix}{key}/")
        else:
            value = _NUMBERS.get(value, value) if isinstance(value, str) else value
            huge = isinstance(value, int) and abs(value) >= 2**63  # it fits into no array: infinity as a float
            yield f"{prefix}{key}", (math.inf if value > 0 else -math.inf) if huge else value


def _is_infinite(value: Any) -> bool:
    return isinstance(value, float) and abs(value) >= 2**63


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 2**63 if isinstance(value, int) else math.isfinite(value) and abs(value) < 2**63


# Text


def _read_json(file: Path) -> list[Log]:
    """transformers' `trainer_state.json`, a list of entries, a table of columns, or `trackio get metric --json`."""
    content = _load_json(file)
    if isinstance(content, list):
        rows = content
    elif isinstance(content, dict) and "log_history" in content:
        rows = content["log_history"]
    elif isinstance(content, dict) and {"metric", "values"} <= content.keys():
        rows = [{"step": point["step"], content["metric"]: point["value"]} for point in content["values"]]
        return [Log(_with_steps(rows, file), str(content.get("run") or ""))]
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
    return [Log(_with_steps(rows, file))]


def _read_json_lines(file: Path) -> list[Log]:
    rows: list[dict[str, Any]] = []
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
            raise ValueError(f"{str(file)!r}, line {number} is not valid JSON: {error}.") from error
        if not isinstance(row, dict):
            raise ValueError(f"{str(file)!r}, line {number} is not a JSON object.")
        rows.append(row)
    return [Log(_with_steps(rows, file))]


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
    return [Log(_with_steps(rows, file))]


_CHART_COLUMN = re.compile(r"(?P<run>.+?) - (?P<metric>.+?)(?P<extreme>__MIN|__MAX)?")
_DOWNLOAD = re.compile(r"run-(?P<run>.+)-tag-(?P<metric>.+)")


def _read_csv(file: Path) -> list[Log]:
    rows = _csv_rows(file)
    columns = list(rows[0]) if rows else []
    if not rows:
        raise ValueError(f"{str(file)!r} has no rows.")
    if set(columns) == {"Wall time", "Step", "Value"}:
        return read_tensorboard_downloads([file])
    if {"metric", "value"} <= set(columns):  # one row a value, of one run or with a column `run`
        step = next((name for name in STEP_NAMES if name in columns), "step")
        named: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            run = row.get("run", row.get("run_name"))
            named.setdefault("" if run is None else str(run), []).append(
                {"step": row.get(step), str(row["metric"]): row["value"]}
            )
        return [Log(_in_step_order(_with_steps(entries, file)), run) for run, entries in named.items()]
    matches = {column: _CHART_COLUMN.fullmatch(column) for column in columns[1:]}
    if matches and all(matches.values()):  # W&B's chart export
        charts: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            for column, match in matches.items():
                if match and not match["extreme"] and row[column] is not None:
                    charts.setdefault(match["run"], []).append({"step": row[columns[0]], match["metric"]: row[column]})
        return [Log(_with_steps(entries, file), run) for run, entries in charts.items()]
    return _by_run(rows, file)


def _csv_rows(file: Path) -> list[dict[str, Any]]:
    rows = []
    with file.open(newline="", encoding="utf-8-sig") as lines:
        reader = csv.DictReader(lines, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
        try:
            for row in reader:
                rows.append({str(name): _cell(value) for name, value in row.items() if name})
        except csv.Error as error:  # a quote that is never closed, or a cell of more than 128 KiB
            logger.warning(
                terminal(
                    f"{str(file)!r} is damaged after {len(rows)} rows, near line {reader.line_num} ({error}): the rest "
                    "is not read."
                )
            )
    return rows


def _cell(text: str | None) -> Any:
    if text is None or not text.strip():
        return None
    try:
        return float(text)
    except ValueError:
        return text


def _in_step_order(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(entries, key=lambda entry: int(entry["step"]))


def read_tensorboard_downloads(files: Iterable[Path]) -> list[Log]:
    """TensorBoard's CSV downloads, one a metric, named `run-RUN-tag-METRIC.csv`; "/" in names has become "_"."""
    named: dict[str, list[dict[str, Any]]] = {}
    for file in files:
        match = _DOWNLOAD.fullmatch(file.stem)
        run, metric = (match["run"], match["metric"]) if match else ("", file.stem)
        rows = _csv_rows(file)
        if rows and not {"Step", "Value"} <= rows[0].keys():
            raise ValueError(f"{str(file)!r} has not the columns Wall time, Step and Value of a TensorBoard download.")
        named.setdefault(run, []).extend({"step": row["Step"], metric: row["Value"]} for row in rows)
    return [
        Log(_in_step_order(_with_steps(entries, file)), "" if run in (".", "") else run)
        for run, entries in named.items()
    ]


# Stores of trackers


def _by_run(rows: Iterable[Mapping[str, Any]], file: Path) -> list[Log]:
    """The runs of a table that may have a column with the run's name (and trackio's id)."""
    named: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        name = row.get("run_name")
        key = (str(name) if isinstance(name, str) else "", str(row.get("run_id") or ""))
        entry = {k: v for k, v in row.items() if k not in ("run_name", "run_id")}
        if key[1] and "step" in entry:  # trackio's, which counts the calls of `log`
            entry["_step"] = entry.pop("step")
        named.setdefault(key, []).append(entry)
    return [Log(_with_steps(entries, file), name) for (name, _), entries in named.items()]


def _read_parquet(file: Path) -> list[Log]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{str(file)!r} is not a Parquet file: {error}.") from error
    return _by_run(table.to_pylist(), file)


def _read_trackio(file: Path) -> list[Log]:
    """trackio's store of a project. Older versions have no `run_id`."""
    with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as connection:
        try:
            columns = [row[1] for row in connection.execute("PRAGMA table_info(metrics)")]
            if not {"run_name", "step", "metrics"} <= set(columns):
                raise ValueError(f"{str(file)!r} is not a store of trackio: it has no table of metrics.")
            key = "run_id" if "run_id" in columns else "run_name"
            rows = connection.execute(f"SELECT {key}, run_name, step, metrics FROM metrics ORDER BY id").fetchall()
            config_columns = [row[1] for row in connection.execute("PRAGMA table_info(configs)")]
            configs = {}
            if {key, "config"} <= set(config_columns):
                configs = dict(connection.execute(f"SELECT {key}, config FROM configs").fetchall())
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{str(file)!r} is not a store of trackio: {error}.") from error
    entries: dict[str, list[dict[str, Any]]] = {}
    names = {}
    for run, name, step, metrics in rows:
        names[run] = name
        entries.setdefault(run, []).append({"_step": step} | json.loads(metrics))
    return [
        Log(_with_steps(rows_of_run, file), names[run], json.loads(configs[run]) if run in configs else {})
        for run, rows_of_run in entries.items()
    ]


def _tell_damage(file: Path) -> None:
    """Warn where a damaged event file ends: TensorBoard reads up to there, and says nothing.

    A record is its length (8 bytes), the checksum of that (4), the data, and their checksum (4). A last record that is
    cut off is no damage: the run may still write it.
    """
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    data = file.read_bytes()
    start, count = 0, 0
    while start + 12 <= len(data):
        length, check = struct.unpack_from("<QI", data, start)
        end = start + 12 + length
        whole = masked_crc32c(data[start : start + 8]) == check
        if whole and end + 4 > len(data):
            return
        if not whole or masked_crc32c(data[start + 12 : end]) != struct.unpack_from("<I", data, end)[0]:
            logger.warning(
                terminal(
                    f"{str(file)!r} is damaged after {count} records, at byte {start} of {len(data)}: the rest is not "
                    "read."
                )
            )
            return
        start, count = end + 4, count + 1


def read_events(path: Path) -> list[Log]:
    """The scalars in TensorBoard's event files (a folder or one file), with transformers' arguments as settings."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import (
            SCALARS,
            TENSORS,
            EventAccumulator,
        )
        from tensorboard.util.tensor_util import make_ndarray
    except ImportError as error:
        raise ImportError(f"{str(path)!r} is TensorBoard's: pip install tensorboard to read it.") from error
    for file in sorted(filter(is_event_file, path.iterdir())) if path.is_dir() else [path]:
        _tell_damage(file)
    events = EventAccumulator(str(path), size_guidance={SCALARS: 0, TENSORS: 0})
    events.Reload()
    points = [(e.step, tag, e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag)]
    config: dict[str, Any] = {}
    for tag in events.Tags()["tensors"]:
        tensors = events.Tensors(tag)
        if tag == "args/text_summary":  # what transformers writes
            config = json.loads(make_ndarray(tensors[-1].tensor_proto).item().decode())
        elif events.SummaryMetadata(tag).plugin_data.plugin_name == "scalars":
            points += [(e.step, tag, make_ndarray(e.tensor_proto).item()) for e in tensors]
    by_step: dict[int, dict[str, Any]] = {}
    for step, tag, value in points:
        by_step.setdefault(step, {"step": step})[tag] = value
    if not by_step:
        raise ValueError(f"{str(path)!r} has no scalars.")
    return [Log([by_step[step] for step in sorted(by_step)], config=config)]


_WANDB_HEADER = b":W&B\xe1\xbe\x00"
_BLOCK = 32768


def _read_wandb(file: Path) -> list[Log]:
    """W&B's record of an offline run, through the messages that W&B's own package defines."""
    try:
        from wandb.proto import wandb_internal_pb2
    except ImportError as error:
        raise ImportError(f"{str(file)!r} is W&B's: pip install wandb to read it.") from error
    rows = []
    config: dict[str, Any] = {}
    name = ""
    for message in _wandb_records(file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(message)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            name = record.run.display_name or record.run.run_id
        if kind in ("run", "config"):
            updates = record.run.config.update if kind == "run" else record.config.update
            config |= {update.key: json.loads(update.value_json) for update in updates if update.key != "_wandb"}
        if kind == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return [Log(_with_steps(rows, file), name, config)]


def _wandb_records(file: Path) -> Iterator[bytes]:
    """The records of a `.wandb` file: the log format of LevelDB, with its own checksum and header.

    Blocks of 32 KiB hold pieces of records: checksum (4 bytes), length (2), kind (1: whole, 2: first, 3: middle, 4:
    last), data. The last record of a run that is not over may be cut: it is left out.
    """
    data = file.read_bytes()
    if not data.startswith(_WANDB_HEADER):
        raise ValueError(
            f"{str(file)!r} is not a .wandb file of a version that is known here: export the run's history instead, "
            "wandb.Api().run(...).history(samples=100000).to_csv(...), or its history artifact as Parquet."
        )
    position, record = len(_WANDB_HEADER), b""
    while position + 7 <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < 7:
            position += left
            continue
        checksum, length, kind = struct.unpack("<IHB", data[position : position + 7])
        piece = data[position + 7 : position + 7 + length]
        if kind == 0 or len(piece) < length:
            return
        if zlib.crc32(piece, zlib.crc32(bytes([kind]))) != checksum:
            raise ValueError(f"{str(file)!r} is damaged at byte {position}: sync it with `wandb sync`, then export it.")
        position += 7 + length
        record = piece if kind in (1, 2) else record + piece
        if kind in (1, 4):
            yield record
