"""The entries of a log: flat, in order, each with its step. And the JSON files that have them."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from entropy_trl.analysis.logs.unread import note_unread


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
_NUMBERS = {"NaN": math.nan, "nan": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass
class Log:
    """The entries of one run, and the name and the settings that are stored with them."""

    entries: list[dict[str, Any]]
    name: str = ""
    config: dict[str, Any] = field(default_factory=dict)


def mapping(file: Path) -> dict[str, Any]:
    value = load_json(file)
    if not isinstance(value, dict):
        raise ValueError(f"{str(file)!r} is not a JSON object.")
    return value


def load_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # nested too deeply, or a number of thousands of digits
        raise ValueError(f"{str(file)!r} is not valid JSON: {error}.") from error


def with_steps(rows: Iterable[Mapping[str, Any]], source: Path) -> list[dict[str, Any]]:
    """Flat entries, each with an int `"step"`: its own, or that of the entry before it.

    Raises:
        ValueError: No entry has a step.
    """
    flat = [dict(flatten(row)) for row in rows]
    name = next((name for name in STEP_NAMES if any(is_finite(row.get(name)) for row in flat)), None)
    if name is None and flat:
        columns = ", ".join(list(flat[0])[:8]) or "nothing"
        raise ValueError(f"{str(source)!r} has no steps: one of {', '.join(STEP_NAMES)} is needed, it has {columns}.")
    # Trainers that log train/global_step may log eval/global_step with evaluations instead.
    names = [name, *(n for n in STEP_NAMES if n and n.endswith("/global_step") and n != name)] if name else []
    step = 0
    entries = []
    for row in flat:
        if any(_is_infinite(row.get(n)) for n in names):
            note_unread(f"{str(source)!r} has an entry whose step is too large: it is not read.")
            continue
        step = next((int(row[n]) for n in names if is_finite(row.get(n))), step)
        entries.append({"step": step} | {k: v for k, v in row.items() if k != "step" and v is not None})
    return entries


def flatten(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested metrics joined with "/"; verl's file logger puts all of them under "data"."""
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from flatten(value, prefix if key == "data" else f"{prefix}{key}/")
        else:
            value = _NUMBERS.get(value, value) if isinstance(value, str) else value
            huge = isinstance(value, int) and abs(value) >= 2**63  # it fits into no array: infinity as a float
            yield f"{prefix}{key}", (math.inf if value > 0 else -math.inf) if huge else value


def _is_infinite(value: Any) -> bool:
    return isinstance(value, float) and abs(value) >= 2**63


def is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 2**63 if isinstance(value, int) else math.isfinite(value) and abs(value) < 2**63


def in_step_order(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(entries, key=lambda entry: int(entry["step"]))
