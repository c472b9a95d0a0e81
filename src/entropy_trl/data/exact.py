"""JSON and CSV files with numbers that 64 bits cannot hold, or with values of several types in a column."""

import csv
import json
import math
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa


_INT64 = range(-(2**63), 2**63)
_SURE_DIGITS = 15  # decimal digits that a float keeps of any number
_CHUNK = 1 << 24
_DIGITS = bytes(48 if 48 <= byte <= 57 else 32 for byte in range(256))
_MISSING = {"", "nan", "null", "none", "n/a", "na", "#n/a", "<na>"}


def has_long_numbers(file: Path) -> bool:
    """Whether a file has more digits in a row than a float keeps. Reads about a gigabyte a second."""
    before, run = b"", b"0" * (_SURE_DIGITS + 1)
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            digits = before + chunk.translate(_DIGITS)
            if run in digits:
                return True
            before = digits[-_SURE_DIGITS:]
    return False


def json_rows(files: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Generate the rows of files of JSON lines, or of a JSON list. A number that no 64 bits hold is its text.

    Raises:
        ValueError: A file is not that; the message has the line and, of several files, the name.
    """
    for file in files:
        try:
            yield from _rows(Path(file))
        except ValueError as error:
            raise ValueError(f"{error} ({Path(file).name})" if len(files) > 1 else str(error)) from error


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="\n") as opened:
        start = opened.read(_CHUNK).lstrip()[:1]
        opened.seek(0)
        if start == "[":
            yield from map(_row, _loaded(opened.read(), "the list"))
            return
        for number, line in enumerate(opened, 1):
            if line.strip():
                yield _row(_loaded(line, f"line {number}"))


def json_table(files: Sequence[str]) -> datasets.Dataset:
    """Return the same as a table. A column with values of several types is text."""
    rows = list(json_rows(files))
    names = dict.fromkeys(name for row in rows for name in row)
    return datasets.Dataset(pa.table({name: _column([row.get(name) for row in rows]) for name in names}))


def csv_names(file: Path) -> list[str]:
    """Return the names of a CSV file's columns.

    Raises:
        ValueError: A name is there twice, or the first row has more values than there are names, which would move all
            values to other columns.
    """
    with file.open(encoding="utf-8-sig", newline="") as opened:
        rows = (row for row in csv.reader(opened) if row)
        names = next(rows, [])
        try:
            first = next(rows, [])
        except csv.Error:  # a longer text than this reader takes; pandas has no such limit
            first = []
    if twice := [name for name in dict.fromkeys(names) if name and names.count(name) > 1]:
        raise ValueError(f"the column {twice[0]!r} is there twice")
    if len(first) > len(names):
        raise ValueError(f"the first row has {len(first)} values for {len(names)} columns: put commas in quotes")
    return names


def csv_text(value: str) -> str | None:
    """Return the value of a CSV file as it is written, None where it says that there is none."""
    return None if value.strip().lower() in _MISSING else value


def _loaded(text: str, where: str) -> Any:
    try:
        value = json.loads(text, parse_int=_integer, parse_float=_decimal, object_pairs_hook=_object)
        if "\\ud" in text.lower():  # half a surrogate pair is no text for Arrow and tokenizers
            value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", errors="replace"))
        return value
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{where} cannot be parsed: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def _row(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"a row is no JSON object, but {json.dumps(row)[:40]}")
    return row


def _integer(text: str) -> int | str:
    return int(text) if len(text) <= 20 and int(text) in _INT64 else text


def _decimal(text: str) -> float | str:
    value = float(text)
    return value if math.isfinite(value) and Decimal(repr(value)) == Decimal(text) else text


def _column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError):
        return pa.array([_text(value) for value in values], pa.string())


def _text(value: Any) -> str | None:
    if value is None:
        return None
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
