"""The stores of trackers: Parquet and trackio's SQLite, and TensorBoard's event files."""

import json
import sqlite3
import struct
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from entropy_trl.analysis.logs.entries import Log, with_steps
from entropy_trl.analysis.logs.unread import note_unread


def is_event_file(file: Path) -> bool:
    """Whether a file is TensorBoard's."""
    return file.is_file() and "tfevents" in file.name


def by_run(rows: Iterable[Mapping[str, Any]], file: Path) -> list[Log]:
    """The runs of a table that may have a column with the run's name (and trackio's id)."""
    named: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        name = row.get("run_name")
        key = (str(name) if isinstance(name, str) else "", str(row.get("run_id") or ""))
        entry = {k: v for k, v in row.items() if k not in ("run_name", "run_id")}
        if key[1] and "step" in entry:  # trackio's, which counts the calls of `log`
            entry["_step"] = entry.pop("step")
        named.setdefault(key, []).append(entry)
    return [Log(with_steps(entries, file), name) for (name, _), entries in named.items()]


def read_parquet(file: Path) -> list[Log]:
    import pyarrow
    import pyarrow.parquet

    rows: list[dict[str, Any]] = []
    damaged = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            for group in range(parquet.num_row_groups):
                try:
                    rows += parquet.read_row_group(group).to_pylist()
                except (pyarrow.ArrowException, OSError, ValueError):  # the others can be read without it
                    damaged += parquet.metadata.row_group(group).num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{str(file)!r} is not a Parquet file: {error}.") from error
    if damaged and not rows:
        raise ValueError(f"{str(file)!r} is damaged: none of its {damaged} rows can be read.")
    if damaged:
        total = damaged + len(rows)
        note_unread(f"{str(file)!r} has {damaged} damaged rows of {total}: they are not read.")
    return by_run(rows, file)


def read_trackio(file: Path) -> list[Log]:
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
    names, damaged = {}, 0
    for run, name, step, metrics in rows:
        values = _object(metrics)
        if values is None:
            damaged += 1
            continue
        names[run] = name
        entries.setdefault(run, []).append({"_step": step} | values)
    if damaged:
        note_unread(f"{str(file)!r} has {damaged} damaged rows of {len(rows)}: they are not read.")
    if not entries:
        raise ValueError(f"{str(file)!r} has no row of metrics that can be read.")
    return [
        Log(with_steps(rows_of_run, file), names[run], _object(configs.get(run)) or {})
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
            note_unread(
                f"{str(file)!r} is damaged after {count} records, at byte {start} of {len(data)}: the rest is not read."
            )
            return
        start, count = end + 4, count + 1


def _object(text: Any) -> dict[str, Any] | None:
    """The JSON object in a cell; None if there is none."""
    try:
        value = json.loads(text)
    except (TypeError, ValueError, RecursionError):  # of another type, no JSON, or nested too deeply
        return None
    return value if isinstance(value, dict) else None


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
