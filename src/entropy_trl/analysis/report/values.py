"""Numbers and names as the report writes them."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from entropy_trl.analysis.secrets import masked


NONE = "\u2013"  # a dash, where there is no value

_TABLE_ROWS = 12  # of the numbers below a figure


def number(value: float | None) -> str:
    """A number with three digits that count, or all before the decimal point."""
    if value is None or math.isnan(value):
        return NONE
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0 or abs(value) >= 99.95:  # three digits of 99.95 are "100."
        return f"{value:,.0f}"
    return f"{value:#.3g}"


def sentence(parts: Iterable[str]) -> str:
    """The parts as one sentence."""
    return "; ".join(parts) + "."


def gathered(notes: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Each note once, with the runs that it is about."""
    runs: dict[str, list[str]] = {}
    for note, run in notes:
        runs.setdefault(note, []).append(run)
    return [(note, ", ".join(of_note)) for note, of_note in runs.items()]


def spread(items: Sequence[Any]) -> list[Any]:
    """As many of the items as a table has rows, evenly spread, the first and the last among them."""
    if len(items) <= _TABLE_ROWS:
        return list(items)
    return [items[round(i * (len(items) - 1) / (_TABLE_ROWS - 1))] for i in range(_TABLE_ROWS)]


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """The settings with dotted names, values as text; secrets are masked."""
    for key, stored in config.items():
        value = masked(str(key), stored)
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, default=str)


def plain(value: Any) -> Any:
    """The value for JSON, which has no arrays, no NaN and no infinity: null stands for the last two. Six digits."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
