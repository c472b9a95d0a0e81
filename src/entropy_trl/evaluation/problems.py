"""Problems in files that are text: every number stays as it is written.

`datasets` reads JSON and CSV into columns of one type. An integer of more than 64 bits, or one beside a decimal,
becomes a float: `123456789012345678901` would be the reference `1.2345678901234568e+20`, and no answer right.
"""

import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


SUFFIXES = (".jsonl", ".json", ".csv")


def read_problems(path: Path) -> dict[str, list[Any]]:
    """Read a file of problems into columns.

    Args:
        path (`Path`): JSON lines, JSON (a list of objects, or an object of lists) or CSV with a header.

    Returns:
        `dict[str, list]`: The columns, of one length; `None` where a row has no value. Numbers are texts.

    Raises:
        ValueError: The file is damaged, or is none of these.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"Data file {str(path)!r} cannot be read: it is not UTF-8 text ({error}).") from error
    if not text.strip():
        raise ValueError(f"Data file {str(path)!r} is empty.")
    if path.suffix == ".csv":
        return _columns(path, _csv_rows(path, text))
    if path.suffix == ".json":
        try:
            value = _parse(text)
        except json.JSONDecodeError as error:
            if not error.msg.startswith("Extra data"):  # which JSON lines are, to a reader of JSON
                raise ValueError(f"Data file {str(path)!r} cannot be read as .json: {error}.") from error
        else:
            if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
                return _same_length(path, value)
            return _columns(path, enumerate(value if isinstance(value, list) else [value], 1))
    return _columns(path, _json_lines(path, text))


def _parse(text: str) -> Any:
    try:
        return json.loads(text, parse_int=str, parse_float=str, parse_constant=lambda _: None)
    except RecursionError as error:
        raise json.JSONDecodeError("It is nested too deeply", "", 0) from error


def _json_lines(path: Path, text: str) -> Iterable[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines, which cuts at U+2028 in a string too
        if line.strip():
            try:
                yield number, _parse(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"Data file {str(path)!r} cannot be read: line {number} is not JSON ({error})."
                ) from error


def _csv_rows(path: Path, text: str) -> Iterable[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row:
                raise csv.Error("more cells than the header has")
            yield reader.line_num, {name: value or None for name, value in row.items()}
    except csv.Error as error:
        raise ValueError(
            f"Data file {str(path)!r} cannot be read as .csv: line {reader.line_num} is damaged ({error})."
        ) from error


def _columns(path: Path, rows: Iterable[tuple[int, Any]]) -> dict[str, list[Any]]:
    read: list[Mapping[str, Any]] = []
    names: dict[str, None] = {}
    for number, row in rows:
        if not isinstance(row, dict):
            raise ValueError(
                f"Data file {str(path)!r} cannot be read: row or line {number} holds no fields. Each is an object "
                'such as {"problem": "1+1?", "answer": "2"}.'
            )
        read.append(row)
        names.update(dict.fromkeys(row))
    if not read:
        raise ValueError(f"Data file {str(path)!r} has no rows.")
    return {name: [row.get(name) for row in read] for name in names}


def _same_length(path: Path, columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"Data file {str(path)!r} cannot be read: its columns have different lengths ({lengths}).")
    return columns
